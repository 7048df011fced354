"""`extract_lora` against the whole SVD of the difference of two models in fp64, and its files in PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

peft = pytest.importorskip("peft", reason="PEFT is not installed")
st = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
from support.rank_files import IDS, Mixed, deltas, relative, truncated  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.analysis import extract as module  # noqa: E402
from lora_kernels.analysis import extract_lora  # noqa: E402

STEP = 2.0**-24


def models(change: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return a model that was trained in its linear layers and its convolution, and the one before."""
    torch.manual_seed(0)
    base = Mixed().to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (tuned.mlp.q, tuned.mlp.v, tuned.conv):
            layer.weight += change * torch.randn(layer.weight.shape).to(dtype)
    return tuned, base


def change_of(tuned: nn.Module, base: nn.Module, name: str) -> Tensor:
    return (tuned.get_submodule(name).weight.double() - base.get_submodule(name).weight.double()).detach().flatten(1)


def put(directory: Path, model: nn.Module, shards: int = 1) -> Path:
    """Write a model as transformers does, in one file or in several with an index."""
    directory.mkdir()
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    if shards == 1:
        st.save_file(tensors, directory / "model.safetensors")
        return directory
    places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        st.save_file({name: tensors[name] for name, place in places.items() if place == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [{"r": 3}, {"energy": 0.8}, {"r": 4, "energy": 0.99}, {"r": 99}], ids=str)
def test_each_layer_is_the_nearest_update_and_peft_computes_it(keep, dtype, tmp_path):
    tuned, base = models(dtype=dtype)
    report = extract_lora(tuned, base, tmp_path / "out", **keep)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    got = deltas(adapted)
    assert sorted(got) == ["conv", "mlp.q", "mlp.v"] and not report.left
    for layer in report.layers:
        wanted = change_of(tuned, base, layer.name)
        s = torch.linalg.svdvals(wanted)
        energies = s.square().cumsum(0) / s.square().sum()
        k = len(s) if "energy" not in keep else int((energies < keep["energy"]).sum()) + 1
        k = min(k, keep.get("r", k), len(s))
        assert (layer.r, layer.before) == (k, len(s))
        assert relative(got[layer.name], truncated(wanted, k)) < 2 * STEP
        assert layer.norm == pytest.approx(wanted.norm().item(), rel=1e-6)
        assert layer.distance == pytest.approx((got[layer.name] - wanted).norm().item(), rel=1e-5, abs=1e-7)


def test_the_whole_rank_gives_the_tuned_model_back_and_this_package_reads_it(tmp_path):
    tuned, base = models()
    extract_lora(tuned, base, tmp_path, energy=1.0)
    lora_kernels.load_adapter(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(base(IDS), tuned(IDS))


@pytest.mark.parametrize("shards", [1, 3])
def test_two_directories_give_what_two_models_give(shards, tmp_path):
    tuned, base = models()
    with torch.no_grad():
        tuned.conv.weight.copy_(base.conv.weight)  # files do not tell what a convolution is
    one = extract_lora(tuned, base, r=4)
    two = extract_lora(put(tmp_path / "a", tuned, shards), put(tmp_path / "b", base), tmp_path / "out", r=4)
    assert sorted(two.tensors) == ["mlp.q", "mlp.v"]
    for name, parts in one.tensors.items():
        assert all(torch.equal(value, two.tensors[name][part]) for part, value in parts.items())
    assert one.config["target_modules"] == two.config["target_modules"] == ["q", "v"]
    assert extract_lora(tmp_path / "a", base, r=4).error == two.error
    assert deltas(peft.PeftModel.from_pretrained(base, tmp_path / "out")).keys() == one.tensors.keys()


def test_a_model_tells_what_the_tensors_of_files_are(tmp_path):
    tuned, base = models()
    report = extract_lora(put(tmp_path / "tuned", tuned), base, r=4)
    assert report.tensors["conv"]["lora_A.weight"].shape == (4, 9, 3)
    with pytest.warns(UserWarning, match="conv.weight .no weight of a linear layer or convolution"):
        extract_lora(tmp_path / "tuned", put(tmp_path / "base", base), r=4)


def test_what_differs_and_is_no_linear_weight_is_named_with_its_size(tmp_path):
    tuned, base = models()
    with torch.no_grad():
        tuned.mlp.q.bias += 1
        tuned.emb.weight *= 1.5
    tuned.extra = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"emb.weight .*mlp.q.bias|mlp.q.bias.*emb.weight"):
        report = extract_lora(tuned, base, r=2)
    assert sorted(report.left) == ["emb.weight", "extra.bias", "extra.weight", "mlp.q.bias"]
    assert report.left["emb.weight"] == ("an embedding: name it in target_modules", pytest.approx(0.5))
    assert report.left["mlp.q.bias"].relative == pytest.approx((14**0.5 / base.mlp.q.bias.norm()).item())
    assert report.left["extra.bias"] == ("only in one of the models", None)
    assert "changed by up to 0.5 of their norm" in str(report)
    told = json.loads(json.dumps(report.to_json()))["left"]
    assert told["extra.weight"] == {"reason": "only in one of the models", "relative": None}
    # The others are equal: biases of v, conv and head, and the weight of the head.
    assert report.unchanged == 4


def test_an_embedding_is_extracted_where_it_is_named(tmp_path):
    tuned, base = models()
    with torch.no_grad():
        tuned.emb.weight += torch.randn(20, 12)
    with pytest.warns(UserWarning, match="not in target_modules"):
        extract_lora(tuned, base, tmp_path, r=12, target_modules=["emb"])
    got = deltas(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    assert relative(got["emb"], change_of(tuned, base, "emb").T) < 2 * STEP


def test_layers_of_gpt2_are_extracted_from_models_and_from_files(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight += torch.randn(16, 48)
    for name, model in (("tuned", tuned), ("base", base)):
        model.save_pretrained(tmp_path / name)
    extract_lora(tuned, base, tmp_path / "one", r=16)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "two", r=16)
    for out in ("one", "two"):
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / out)
        with torch.no_grad():
            torch.testing.assert_close(adapted(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-4)


def _decaying(n: int, k: int, power: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, min(n, k), dtype=torch.float64)).Q for size in (n, k))
    s = torch.arange(1, min(n, k) + 1, dtype=torch.float64) ** -power
    return (u * s) @ v.T, s


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0])
def test_a_large_layer_is_within_a_hundredth_of_the_best_error(power, monkeypatch):
    monkeypatch.setattr(module, "EXACT", 64)
    e, s = _decaying(300, 400, power)
    norm = s.norm().item()
    for r in (1, 16, 60):
        a, b = module._factors(e, r, None, norm)
        far = (e - b.double() @ a.double()).norm().item()
        assert a.dtype == torch.float32  # the randomised way was taken
        assert s[r:].norm().item() <= far * (1 + 1e-6) and far <= 1.01 * s[r:].norm().item()
    wanted = int((s.square().cumsum(0) < 0.5 * norm**2).sum()) + 1
    a, _ = module._factors(e, None, 0.5, norm)
    assert wanted <= len(a) <= wanted + 2


def test_energy_on_a_large_layer_of_low_rank_finds_the_rank(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 64)
    torch.manual_seed(0)
    e = torch.randn(300, 70, dtype=torch.float64) @ torch.randn(70, 1600, dtype=torch.float64)
    s = torch.linalg.svdvals(e)
    for energy in (0.3, 0.9, 1 - 1e-9):
        a, b = module._factors(e, None, energy, s.norm().item())
        k = int((s.square().cumsum(0) < energy * s.square().sum()).sum()) + 1
        assert k <= len(a) <= k + 1, energy
        assert relative(b @ a, e) <= (1 - energy) ** 0.5 + 1e-6


def test_what_cannot_be_extracted_is_refused_by_name_and_nothing_is_written(tmp_path):
    tuned, base = models()
    out = tmp_path / "out"
    adapted = copy.deepcopy(base)
    lora_kernels.apply_lora(adapted, r=2, target_modules=["q"])
    nan = copy.deepcopy(tuned)
    nan.mlp.q.weight.data[0, 0] = torch.nan
    codes = copy.deepcopy(tuned)
    codes.mlp.q.weight = nn.Parameter(torch.zeros(14, 12, dtype=torch.int8), requires_grad=False)
    wrapped = copy.deepcopy(tuned)
    wrapped.mlp.q.weight = nn.Parameter(TwoTensor(tuned.mlp.q.weight.detach(), tuned.mlp.q.weight.detach()))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 20)
    for error, told, args in (
        (ValueError, "r=, the rank of each layer", (tuned, base, out)),
        (ValueError, "no layer that an adapter could hold differs", (base, base, out, 2)),
        (ValueError, "no names in common", (nn.Sequential(nn.Linear(3, 3)), base, out, 2)),
        (ValueError, "adapters in mlp.q", (adapted, base, out, 2)),
        (ValueError, "mlp.q.weight: .*not finite", (nan, base, out, 2)),
        (ValueError, "mlp.q.weight is torch.int8", (codes, base, out, 2)),
        (ValueError, r"mlp.q.weight .a TwoTensor.; give a whole, dense model", (wrapped, base, out, 2)),
        (ValueError, "meta device", (Mixed().to("meta"), base, out, 2)),
        (ValueError, "target_modules match no weight", (tuned, base, out, 2, None, ["nothing"])),
        (FileNotFoundError, "no safetensors file in .*empty", (tmp_path / "empty", base, out, 2)),
        (FileNotFoundError, "nowhere", (tmp_path / "nowhere", base, out, 2)),
        (ValueError, "not a safetensors file", (tmp_path / "broken", base, out, 2)),
    ):
        with pytest.raises(error, match=told):
            extract_lora(*args)
    assert not out.exists()
