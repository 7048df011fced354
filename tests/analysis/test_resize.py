"""`resize_adapter` against the whole SVD of PEFT's ΔW in fp64, and its files in PEFT and in this package."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
from support.adapter_models import WEIGHTS, edit_config, edit_weights  # noqa: E402
from support.rank_files import (  # noqa: E402
    IDS,
    Mixed,
    bits,
    deltas,
    loaded,
    ranks,
    relative,
    saved,
    truncated,
)

import lora_kernels  # noqa: E402
from lora_kernels.analysis import resize_adapter  # noqa: E402
from lora_kernels.analysis.resize import _resized  # noqa: E402
from lora_kernels.analysis.stored import StoredUpdate  # noqa: E402

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""The relative rounding error of a number."""


@pytest.mark.parametrize("keep", [{"r": 3}, {"energy": 0.8}, {"r": 4, "energy": 0.95}, {"r": 100}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "dtype": torch.bfloat16},
        {"rank_pattern": {"q": 9, "conv": 2}, "alpha_pattern": {"mlp.v": 5, "emb": 2}},
    ],
    ids=["plain", "rslora-bf16", "patterns"],
)
def test_peft_computes_the_nearest_update_of_each_rank_from_the_result(keep, settings, tmp_path):
    before = saved(tmp_path / "old", **settings)
    report = resize_adapter(tmp_path / "old", tmp_path / "new", **keep)
    after = loaded(tmp_path / "new")

    wanted, got = deltas(before), deltas(after)
    step = HALF_STEP[settings.get("dtype", torch.float32)]
    assert ranks(after) == {layer.name: layer.r for layer in report.layers}
    for layer in report.layers:
        s = torch.linalg.svdvals(wanted[layer.name])
        has = ranks(before)[layer.name]
        energies = s.square().cumsum(0) / s.square().sum()
        k = has if "energy" not in keep else int((energies < keep["energy"]).sum()) + 1
        k = min(k, keep.get("r", k), has)
        assert (layer.before, layer.r) == (has, k)
        best = truncated(wanted[layer.name], k)
        # A and B are rounded once each, and the products of their errors are smaller.
        assert relative(got[layer.name], best) < 2 * step
        assert layer.norm == pytest.approx(wanted[layer.name].norm().item(), rel=1e-9)
        assert layer.error == pytest.approx(relative(got[layer.name], wanted[layer.name]), rel=1e-6)
    whole = sum((got[n] - w).square().sum() for n, w in wanted.items()) / sum(w.square().sum() for w in wanted.values())
    assert report.error == pytest.approx(whole.sqrt().item(), rel=1e-6)
    assert report.parameters == sum(p.numel() for n, p in after.named_parameters() if "lora_" in n)


def test_a_planted_spectrum_gives_its_rank_and_error():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64)).Q for n in (40, 30))
    s = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    mixed = torch.randn(6, 6, dtype=torch.float64)  # A and B of trained layers are not orthogonal
    update = StoredUpdate(
        "lora_A.weight", "lora_B.weight", (mixed @ v.T)[None], (u * s @ torch.linalg.inv(mixed))[None], -3.0
    )
    total = (s**2).sum()
    for energy, k in (((64 / total).item() - 1e-12, 1), ((64 / total).item() + 1e-12, 2), (0.98, 3), (1.0, 5)):
        layer, parts = _resized("l", [update], None, energy)
        assert layer.r == k, energy
        # The error is that of a difference of products of size 10, in fp64.
        assert layer.error == pytest.approx((s[k:].square().sum() / total).sqrt().item(), abs=1e-14)
        made = parts["lora_B.weight"] @ parts["lora_A.weight"]
        torch.testing.assert_close(made, (u[:, :k] * s[:k]) @ v[:, :k].T, rtol=0, atol=1e-13)
        assert layer.norm == pytest.approx(3 * total.sqrt().item(), rel=1e-12)


def test_an_update_of_zeros_keeps_rank_one():
    update = StoredUpdate("lora_A.weight", "lora_B.weight", torch.randn(1, 4, 9), torch.zeros(1, 7, 4), 2.0)
    layer, parts = _resized("l", [update], None, 0.9)
    assert (layer.r, layer.error, layer.norm) == (1, 0.0, 0.0)
    assert not (parts["lora_B.weight"] @ parts["lora_A.weight"]).any()


def test_the_magnitudes_of_dora_stay_and_the_whole_rank_computes_the_same(tmp_path):
    before = saved(tmp_path / "old", use_dora=True)
    report = resize_adapter(tmp_path / "old", tmp_path / "same", r=6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "same")(IDS), before(IDS))
    assert "DoRA" in str(report)
    resize_adapter(tmp_path / "old", tmp_path / "low", r=2)
    kept = {n: p for n, p in loaded(tmp_path / "low").named_parameters() if "magnitude" in n}
    old = dict(before.named_parameters())
    assert kept and all(torch.equal(p, old[n]) for n, p in kept.items())


def test_what_is_trained_beside_the_adapter_is_copied(tmp_path):
    before = saved(tmp_path / "old", target_modules=["q", "v"], modules_to_save=["head"], lora_bias=True, bias="all")
    report = resize_adapter(tmp_path / "old", tmp_path / "new", r=6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "new")(IDS), before(IDS))
    assert "tensors beside the adapter" in str(report)


def test_this_package_reads_the_result_as_peft_does(tmp_path):
    saved(tmp_path / "old", use_rslora=True, rank_pattern={"q": 3})
    resize_adapter(tmp_path / "old", tmp_path / "new", energy=0.9)
    torch.manual_seed(0)
    ours = Mixed()
    lora_kernels.load_adapter(ours, tmp_path / "new")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), loaded(tmp_path / "new")(IDS))


def test_attention_and_its_output_share_a_rank(tmp_path):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    torch.manual_seed(0)
    plain, x = Attention(), torch.randn(2, 5, 12)
    before = saved(tmp_path / "old", model=plain, target_modules=["attn"])
    for keep in ({"r": 6}, {"energy": 0.7}):
        (layer,) = resize_adapter(tmp_path / "old", tmp_path / "new", **keep).layers
    after = loaded(tmp_path / "new", plain)
    wrapper, old = (m.base_model.model.attn for m in (after, before))
    assert layer.size == "12 → 12, 12 → 36" and layer.r < 6

    def products(attention):
        pairs = (attention, attention.base_layer.out_proj)
        return [m.scaling["default"] * (m.lora_B["default"].weight @ m.lora_A["default"].weight) for m in pairs]

    wanted = [each.detach().double() for each in products(old)]
    spectra = [torch.linalg.svdvals(each).square() for each in wanted]
    total = sum(s.sum() for s in spectra)
    assert layer.r == next(k for k in range(1, 7) if sum(s[:k].sum() for s in spectra) >= 0.7 * total)
    for got, best in zip(products(wrapper), wanted, strict=True):
        assert relative(got, truncated(best, layer.r)) < 4 * HALF_STEP[torch.float32]
    with torch.no_grad():
        assert after(x).isfinite().all()


def test_the_experts_of_a_layer_share_a_rank(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from support.experts import STACKS, E, model_of
    from support.peft_experts import randomise

    model = model_of("Qwen3Moe")
    targets = [f"experts.{name}" for name in STACKS]
    lora_kernels.apply_lora(model, r=4, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
    randomise(model)
    lora_kernels.save_adapter(model, tmp_path / "old")
    report = resize_adapter(tmp_path / "old", tmp_path / "new", energy=0.9)
    after = model_of("Qwen3Moe")
    lora_kernels.load_adapter(after, tmp_path / "new")
    experts = [layer for layer in report.layers if layer.size.startswith(f"{E} × ")]
    assert len(experts) == 2 and {layer.before for layer in report.layers} == {4}
    for layer in experts:
        old, new = model.get_submodule(layer.name), after.get_submodule(layer.name)
        assert new.r == layer.r < 4 and new.scaling == old.scaling
        squares = left = 0.0
        for stack in STACKS:
            a, b, a2, b2 = (getattr(m, f"lora_{x}_{stack}").detach().double() for m in (old, new) for x in "AB")
            for expert in range(E):
                whole = old.scaling * (b[expert] @ a[expert])
                got = new.scaling * (b2[expert] @ a2[expert])
                torch.testing.assert_close(got, truncated(whole, layer.r), rtol=0, atol=1e-6 * whole.norm().item())
                squares += whole.square().sum().item()
                left += (whole - got).square().sum().item()
        assert layer.error == pytest.approx((left / squares) ** 0.5, rel=1e-6) and left / squares <= 0.1


def test_peft_reads_the_ranks_of_experts_from_the_result(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from support.experts import E, experts_of
    from support.peft_experts import Holder, config, randomise

    def two() -> nn.Module:
        return nn.ModuleDict({name: Holder(experts_of("Qwen3Moe", torch.float64, "eager")) for name in ("one", "two")})

    before = randomise(peft.get_peft_model(two(), config(r=4, lora_alpha=3, use_rslora=True)))
    with torch.no_grad():  # the second has a lower rank for the same energy
        for name, p in before.named_parameters():
            if "two" in name and "lora_B" in name:
                p.view(len(p), 4, E).mul_(torch.tensor([1, 0.1, 0.01, 0.01])[:, None])
    before.save_pretrained(tmp_path / "old")
    report = resize_adapter(tmp_path / "old", tmp_path / "new", energy=0.7)
    assert len(report.config["rank_pattern"]) == 2  # a key for each parameter of one of the layers
    after = peft.PeftModel.from_pretrained(two(), tmp_path / "new")
    ranks = {layer.name: layer.r for layer in report.layers}
    assert ranks["two.experts"] < ranks["one.experts"] < 4
    for name, r in ranks.items():
        old, new = (model.base_model.model.get_submodule(name) for model in (before, after))
        for _ in range(2):  # of the two parameters, one wraps the other
            wanted, got = (each.get_delta_weight("default").detach().double() for each in (old, new))
            for one, other in zip(got, wanted, strict=True):
                assert relative(one, truncated(other, r)) < 1e-6
            old, new = old.base_layer, new.base_layer


def test_a_directory_can_be_resized_in_place_and_a_file_of_a_compiled_model_is_read(tmp_path):
    before = deltas(saved(tmp_path))
    edit_weights(tmp_path, lambda t: [t.__setitem__(k.replace("mlp.", "mlp._orig_mod."), t.pop(k)) for k in list(t)])
    edit_config(tmp_path, target_modules=["emb", "mlp._orig_mod.q", "mlp._orig_mod.v", "conv"])
    resize_adapter(tmp_path, tmp_path, r=5)
    after = deltas(loaded(tmp_path))
    assert after.keys() == before.keys()
    assert all(relative(after[name], truncated(before[name], 5)) < 1e-6 for name in before)


def _nan(tensors):
    next(value for key, value in tensors.items() if "q.lora_A" in key)[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "keep", "told"),
    [
        (lambda d: None, {}, "r=, the rank of each layer, or energy="),
        (lambda d: None, {"r": 0}, "r must be an integer of at least 1, got 0"),
        (lambda d: None, {"r": True}, "r must be an integer"),
        (lambda d: None, {"energy": 1.1}, r"energy must lie in \(0, 1\], got 1.1"),
        (lambda d: edit_config(d, init_lora_weights="pissa"), {"r": 2}, "init_lora_weights='pissa'"),
        (lambda d: edit_config(d, ensure_weight_tying=True), {"r": 2}, "ensure_weight_tying"),
        (lambda d: edit_config(d, peft_type="LOHA"), {"r": 2}, "'LOHA'"),
        (lambda d: edit_config(d, r=5), {"r": 2}, "the two files are not of one adapter"),
        (lambda d: edit_weights(d, _nan), {"r": 2}, "mlp.q: .*NaN or infinite"),
        (lambda d: edit_weights(d, lambda t: t.update({"x.lora_E": torch.ones(2)})), {"r": 2}, "x.lora_E"),
        (lambda d: edit_weights(d, lambda t: t.pop(next(k for k in t if "q.lora_B" in k))), {"r": 2}, "lacks mlp.q"),
        (lambda d: (d / "adapter_config.json").write_text("{"), {"r": 2}, "not JSON"),
        (lambda d: (d / WEIGHTS).write_bytes(b"x" * 40), {"r": 2}, "not a safetensors file"),
    ],
)
def test_what_cannot_be_resized_is_refused_by_name_and_nothing_is_written(change, keep, told, tmp_path):
    saved(tmp_path / "old")
    saved(tmp_path / "new", seed=1)
    change(tmp_path / "old")
    before = bits(tmp_path / "new")
    with pytest.raises(ValueError, match=told):
        resize_adapter(tmp_path / "old", tmp_path / "new", **keep)
    assert bits(tmp_path / "new") == before


def test_a_convolution_with_groups_and_a_missing_directory_are_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=2))
    saved(tmp_path / "old", model=model, target_modules=["0"])
    with pytest.raises(ValueError, match="convolution with groups"):
        resize_adapter(tmp_path / "old", tmp_path / "new", r=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resize_adapter(tmp_path / "nowhere", tmp_path / "new", r=2)
    assert not (tmp_path / "new").exists()


def test_the_report_is_a_table_and_json(tmp_path):
    rich = pytest.importorskip("rich.console")
    saved(tmp_path / "old")
    report = resize_adapter(tmp_path / "old", tmp_path / "new", r=2)
    console = rich.Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    for text in (str(report), console.export_text()):
        assert "mlp.q" in text and "12 → 14" in text and f"{report.error:.3g}" in text
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["r"] == 2
    hostile = [dataclasses.replace(report.layers[0], name="[red]q[/red]\x1b[31m")]
    console.print(type(report)(hostile))
    assert "[red]q[/red]\\x1b[31m" in console.export_text() and "\x1b" not in str(type(report)(hostile))
    many = type(report)([layer for layer in report.layers for _ in range(20)], (), {}, report.tensors)
    assert "q (20)" in str(many) and len(str(many).splitlines()) == 6


def test_resizing_takes_a_hundredth_of_the_whole_svd():
    torch.manual_seed(0)
    a, b = torch.randn(1, 16, 1024), torch.randn(1, 1024, 16)
    update = StoredUpdate("lora_A.weight", "lora_B.weight", a, b, 1.0)

    def seconds(call, rounds):
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    ours = seconds(lambda: _resized("l", [update], 8, None), 10)
    assert 100 * ours < seconds(lambda: torch.linalg.svd(b[0] @ a[0], full_matrices=False), 1)
