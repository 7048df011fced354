"""Files of VeRA go between PEFT and this package and compute the same, and Tied-LoRA has files of its own."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import adapter_parameters, apply_lora, apply_tied_lora, apply_vera, load_adapter, save_adapter
from lora_kernels.models.shared import shared_layers

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

READS_FACTORS = hasattr(peft.tuners.vera.VeraModel, "_remap_adapter_state_dict_for_load")
"""Whether PEFT reads A and B of a file. Earlier versions draw them from the key, whatever the file holds, and save the
vectors of all adapters with each."""
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
NAMES = ["up", "middle", "down"]


class Net(nn.Module):
    """Its widest layer in and its widest layer out are two different ones, and one stores Wᵀ."""

    def __init__(self):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(12, 20), Conv1D(16, 20), nn.Linear(16, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))


@pytest.fixture(autouse=True)
def _no_warnings_of_peft():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(vera_A|fan_in_fan_out).*")
        yield


def net():
    torch.manual_seed(0)
    return Net()


def changed(model):
    """Return the model with a trained adapter that is not that of the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return model.eval()


def ours(**settings):
    model = net()
    apply_vera(model, r=8, **settings)
    return changed(model)


def theirs(targets=NAMES, **settings):
    return changed(peft.get_peft_model(net(), peft.VeraConfig(r=8, target_modules=list(targets), **settings)))


@pytest.mark.parametrize("projection", [True, False])
def test_peft_reads_our_file_and_computes_the_same(projection, tmp_path):
    model = ours(save_projection=projection, projection_prng_key=7)
    save_adapter(model, tmp_path)
    keys = set(st.load_file(tmp_path / "adapter_model.safetensors"))
    vectors = {f"base_model.model.{name}.vera_lambda_{part}" for name in NAMES for part in "bd"}
    assert keys == vectors | ({"base_model.vera_A", "base_model.vera_B"} if projection else set())
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].projection_prng_key == 7


@pytest.mark.parametrize("targets", [NAMES, ["up", "down"]])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_we_read_pefts_file_and_compute_the_same(plain, projection, targets, tmp_path):
    model = theirs(targets, save_projection=projection, projection_prng_key=5, vera_dropout=0.25)
    model.save_pretrained(tmp_path)
    loaded = net()
    if not plain:
        apply_vera(loaded, r=8, target_modules=targets, projection_prng_key=1)
        loaded.requires_grad_(False)
    report = load_adapter(loaded, tmp_path)
    assert [layer.name for layer in report.layers] == list(targets)
    torch.testing.assert_close(loaded.eval()(X), model(X), rtol=1e-5, atol=1e-5)
    assert loaded.lora_shared.key == 5 and loaded.up.lora_dropout == (0.25 if plain else 0.0)
    assert any(p.requires_grad for p in loaded.parameters()) == plain


def test_the_fused_layer_of_peft_has_the_same_files(tmp_path):
    import lora_kernels

    model = theirs()
    lora_kernels.fuse(model, strict=True)
    model.save_pretrained(tmp_path)
    loaded = net()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded.eval()(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [True, False])
def test_a_round_trip_has_the_same_bits(projection, tmp_path):
    model = ours(save_projection=projection, vera_dropout=0.5, d_initial=0.2, projection_prng_key=3)
    save_adapter(model, tmp_path)
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(X), model(X))
    assert (loaded.up.lora_dropout, loaded.lora_shared.save_projection) == (0.5, projection)
    save_adapter(loaded, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    loaded.up.reset_adapter()
    assert torch.equal(loaded.up.lora_u, torch.full((8,), 0.2))


@pytest.mark.skipif(not READS_FACTORS, reason="this PEFT saves the vectors of all adapters with each")
def test_a_file_of_wider_factors_gives_the_layers_their_part(tmp_path):
    """PEFT's second adapter has the A and B of the first, which may have had wider layers."""
    model = theirs()
    model.add_adapter("second", peft.VeraConfig(r=8, target_modules=["down"]))
    model.set_adapter("second")
    changed(model).save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = net()
    load_adapter(loaded, tmp_path / "second")
    assert list(shared_layers(loaded)) == ["down"] and tuple(loaded.lora_shared.lora_A.shape) == (8, 16)
    torch.testing.assert_close(loaded.eval()(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_merged_model_is_saved_with_its_adapter(tmp_path):
    model = ours()
    want = model(X)
    for layer in shared_layers(model).values():
        layer.merge()
    save_adapter(model, tmp_path)
    loaded = net()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded.eval()(X), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="these layers are merged: up, middle, down"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("flags", [(1, 1, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1)], ids=str)
def test_tied_lora_comes_back_as_it_was_saved(flags, tmp_path):
    train = dict(zip(("train_a", "train_b", "train_u", "train_v"), map(bool, flags), strict=True))
    model = net()
    apply_tied_lora(model, r=4, lora_alpha=6, lora_dropout=0.1, **train)
    save_adapter(changed(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "TIED_LORA" and {name: config[name] for name in train} == train
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(X), model(X))
    wants = [{name: p.requires_grad for name, p in m.named_parameters()} for m in (loaded, model)]
    assert wants[0] == wants[1] and loaded.up.scaling == 1.5 and loaded.up.lora_dropout == 0.1
    other = net()
    apply_tied_lora(other, r=4, lora_alpha=1, **train)
    load_adapter(other, tmp_path)
    assert torch.equal(other.eval()(X), model(X))


def test_peft_refuses_tied_lora(tmp_path):
    model = net()
    apply_tied_lora(model, r=4)
    save_adapter(model, tmp_path)
    with pytest.raises((KeyError, ValueError), match="TIED_LORA"):
        peft.PeftModel.from_pretrained(net(), tmp_path)


def test_vera_with_another_scale_is_no_vera_in_the_file(tmp_path):
    """PEFT computes no s."""
    model = ours()
    for layer in shared_layers(model).values():
        layer.lora_alpha, layer.scaling = 4, 0.5
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TIED_LORA"
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(X), model(X)) and loaded.up.scaling == 0.5


# --- what is refused ---


def edited(folder, config=None, tensors=None, drop=()):
    """Write PEFT's file of VeRA into `folder`, with changes."""
    theirs().save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    weights = folder / "adapter_model.safetensors"
    kept = {name: t for name, t in st.load_file(weights).items() if name not in drop}
    st.save_file(kept | (tensors or {}), weights, metadata={"format": "pt"})
    return folder


REFUSED = [
    ({"config": {"bias": "all"}}, "not supported, or not known here: bias='all'.*lora_kernels.fuse"),
    ({"config": {"modules_to_save": ["down"]}}, "modules_to_save=.'down'."),
    ({"config": {"new_field": 3}}, "new_field=3"),
    ({"config": {"r": "8"}}, "r='8' is not what the config of VERA has there"),
    ({"config": {"r": 0}}, "r must be an integer of at least 1, got 0"),
    ({"config": {"r": True}}, "r=True is not what"),
    ({"config": {"r": 4}}, "should be .4, 20.|has r=4, and the model r=8"),
    ({"config": {"target_modules": None}}, "target_modules=None is not what"),
    ({"config": {"target_modules": []}}, "it has no target_modules"),
    ({"config": {"layers_to_transform": ["x"]}}, "layers_to_transform=.'x'. is not what"),
    ({"drop": ["base_model.vera_B"]}, "lacks base_model.vera_B"),
    ({"drop": ["base_model.vera_A", "base_model.vera_B"]}, "lacks base_model.vera_A, base_model.vera_B"),
    ({"drop": ["base_model.model.up.vera_lambda_d"]}, "lacks up.vera_lambda_d"),
    ({"drop": [f"base_model.model.up.vera_lambda_{p}" for p in "bd"]}, "it has nothing for up"),
    ({"tensors": {"base_model.model.up.lora_A.weight": torch.ones(2, 2)}}, "keys that are none of VERA"),
    ({"tensors": {"base_model.model.up.vera_lambda_d": torch.ones(9)}}, r"up has u \(9,\) for \(8,\)"),
    ({"tensors": {"base_model.model.up.vera_lambda_d": torch.ones(8, dtype=torch.int32)}}, "no adapter's: .*int32"),
    ({"tensors": {"base_model.vera_A": torch.ones(8, 19)}}, r"A \(8, 19\).*should be \[8, 20\]"),
    ({"tensors": {"base_model.model._orig_mod.up.vera_lambda_d": torch.ones(8)}}, "has two values"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), REFUSED)
@pytest.mark.parametrize("plain", [True, False])
def test_a_file_that_does_not_fit_changes_nothing(change, match, plain, tmp_path):
    edited(tmp_path, **change)
    model = net()
    if not plain:
        apply_vera(model, r=8)
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=match):
        load_adapter(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(("targets", "match"), [
    ("(a+)+b", "of another base"), (["up", "down"], "no adapted layer middle"),
])  # fmt: skip
def test_a_config_that_chooses_other_layers_of_a_plain_model_changes_nothing(targets, match, tmp_path):
    edited(tmp_path, config={"target_modules": targets})
    model = net()
    with pytest.raises(ValueError, match=match):
        load_adapter(model, tmp_path)
    assert type(model.up) is nn.Linear and not hasattr(model, "lora_shared") and model.up.weight.requires_grad


def test_vera_and_lora_do_not_go_into_each_other(tmp_path):
    theirs().save_pretrained(tmp_path / "vera")
    model = net()
    apply_lora(model, r=8)
    with pytest.raises(ValueError, match=r"share A and B, and these have some of their own: up, middle, down"):
        load_adapter(model, tmp_path / "vera")
    save_adapter(model, tmp_path / "lora")
    shared = ours()
    with pytest.raises(ValueError, match="shared by several layers"):
        load_adapter(shared, tmp_path / "lora")


def test_changed_factors_are_not_left_out_of_a_file(tmp_path):
    model = ours(save_projection=False)
    with torch.no_grad():
        model.lora_shared.lora_A.mul_(2)
    with pytest.raises(ValueError, match=r"not those that key 0 gives.*save_projection = True"):
        save_adapter(model, tmp_path)
    model.lora_shared.save_projection = True
    save_adapter(model, tmp_path)
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(X), model(X))
    if READS_FACTORS:
        torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path).eval()(X), model(X))


def test_an_adapter_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        empty = Net()
        apply_vera(empty, r=8)
    with pytest.raises(ValueError, match=r"lora_shared.lora_A \(Parameter on meta\).*nothing was saved"):
        save_adapter(empty, tmp_path)
    ours_there = ours()
    save_adapter(ours_there, tmp_path)
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_adapter(empty, tmp_path)


def test_the_names_of_wrappers_are_not_in_the_file(tmp_path):
    model = ours()
    compiled = torch.compile(model, backend="eager")
    save_adapter(compiled, tmp_path)
    assert all("_orig_mod" not in key for key in st.load_file(tmp_path / "adapter_model.safetensors"))
    loaded = net()
    load_adapter(torch.compile(loaded, backend="eager"), tmp_path)
    assert torch.equal(loaded.eval()(X), model(X)) and len(list(adapter_parameters(loaded))) == 8
