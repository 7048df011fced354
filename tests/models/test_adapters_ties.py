"""Adapters that are tied, offloaded, views or of rare dtypes: saved with their values, or refused with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from support import adapter_models
from support.adapter_models import WEIGHTS, adapted, assert_unchanged, edit_weights, run, state
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, load_adapter, load_loralib, save_adapter
from lora_kernels.models.inject import adapter_parameters

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")


def net() -> nn.Module:
    torch.manual_seed(0)
    return adapter_models.net()


class Two(nn.Module):
    """Two layers of one shape, so that their adapters may be tied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def tied() -> nn.Module:
    model = adapted(Two().eval(), r=2)
    model.b.lora_A = model.a.lora_A
    return model


def test_tied_adapters_are_saved_with_their_values(tmp_path):
    model = tied()
    with pytest.warns(UserWarning, match=r"tied: b\.lora_A \(to a\.lora_A\)\. Each is saved"):
        save_adapter(model, tmp_path)
    plain = Two().eval()
    load_adapter(plain, tmp_path)
    assert torch.equal(run(plain), run(model))
    theirs = peft.PeftModel.from_pretrained(Two().eval(), tmp_path)
    torch.testing.assert_close(run(theirs), run(model))
    again = tied()
    load_adapter(again, tmp_path)
    assert torch.equal(run(again), run(model)) and again.a.lora_A is again.b.lora_A


def test_two_values_for_one_parameter_are_refused(tmp_path):
    save_adapter(adapted(Two(), r=2), tmp_path)
    model = tied()
    before = state(model)
    with pytest.raises(ValueError, match="lora_A of a and of b are one parameter in this model"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_adapters_of_one_storage_are_saved(tmp_path):
    model = adapted(Two().eval(), r=2)
    flat = torch.randn(40)
    model.a.lora_A = nn.Parameter(flat[:10].view(2, 5))
    model.b.lora_A = nn.Parameter(flat[5:15].view(5, 2).t())  # overlaps the other, and is not contiguous
    model.b.lora_B = nn.Parameter(torch.randn(1, 2).expand(5, 2), requires_grad=False)
    save_adapter(model, tmp_path)
    plain = Two().eval()
    load_adapter(plain, tmp_path)
    assert torch.equal(run(plain), run(model))


class Shared(nn.Module):
    def __init__(self, same_parent: bool):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(5, 5))
        other = block if same_parent else nn.Sequential(block[0])
        self.layers = nn.ModuleList([block, other])

    def forward(self, x):
        return self.layers[1](self.layers[0](x).tanh())


def test_a_layer_at_two_places_is_saved_once_and_loaded_at_both(tmp_path, recwarn):
    for same_parent in (True, False):
        model = adapted(Shared(same_parent).eval(), r=2)
        recwarn.clear()
        save_adapter(model, tmp_path)
        # PEFT replaces a layer in its first parent only
        assert any("at several places of the model: layers.0.0" in str(w.message) for w in recwarn) == (not same_parent)
        assert len(st.load_file(tmp_path / WEIGHTS)) == 2
        plain = Shared(same_parent).eval()
        load_adapter(plain, tmp_path)
        assert torch.equal(run(plain), run(model)) and plain.layers[0][0] is plain.layers[1][0]
        if same_parent:
            torch.testing.assert_close(run(peft.PeftModel.from_pretrained(Shared(True).eval(), tmp_path)), run(model))


def offloads(folder):
    accelerate = pytest.importorskip("accelerate")
    return {
        "cpu": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
        "disk": lambda model: accelerate.disk_offload(model, str(folder), execution_device="cpu"),
        "some": lambda model: accelerate.dispatch_model(
            model, {"fc": "cpu", "norm": "cpu", "inner": "disk", "head": "disk"}, main_device="cpu",
            offload_dir=str(folder), force_hooks=True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("way", ["cpu", "disk", "some"])
def test_an_offloaded_model_is_saved(tmp_path, way, use_dora):
    model = adapted(net(), use_dora=use_dora, rank_pattern={"out": 3})
    save_adapter(model, tmp_path / "before")
    model = offloads(tmp_path)[way](model)
    assert any(p.is_meta for p in adapter_parameters(model))
    save_adapter(model, tmp_path / "after")
    assert (tmp_path / "before" / WEIGHTS).read_bytes() == (tmp_path / "after" / WEIGHTS).read_bytes()
    assert any(p.is_meta for p in adapter_parameters(model))


def test_an_offloaded_model_is_not_loaded_into(tmp_path):
    model = adapted(net())
    save_adapter(model, tmp_path)
    model = offloads(tmp_path)["cpu"](model)
    with pytest.raises(ValueError, match=r"meta device: fc, .*offloaded.*load the adapter before that"):
        load_adapter(model, tmp_path)


def test_an_adapter_without_values_is_refused(tmp_path):
    model = adapted(net()).to("meta")
    with pytest.raises(ValueError, match=r"on the meta device and have no values: fc\.lora_A.*nothing was saved"):
        save_adapter(model, tmp_path / "x")
    save_adapter(adapted(net()), tmp_path)
    for empty in (model, net().to("meta")):
        before = [id(module) for module in empty.modules()]
        with pytest.raises(ValueError, match=r"on the meta device: fc"):
            load_adapter(empty, tmp_path)
        assert [id(module) for module in empty.modules()] == before


def _replace(name: str, make):
    def change(model):
        setattr(model.head, name, nn.Parameter(make(getattr(model.head, name).detach()), requires_grad=False))

    return change


REFUSED = {
    "a magnitude of FSDP1": (_replace("lora_magnitude_vector", lambda m: m[:2]), r"head\.lora_magnitude_vector \(2,\)"),
    "flattened by FSDP1": (_replace("lora_A", lambda a: a.flatten()), r"head\.lora_A \(48,\).*summon_full_params"),
    "a shard of FSDP1": (_replace("lora_B", lambda b: b.new_empty(0)), r"head\.lora_B \(0,\).*summon_full_params"),
    "sparse": (_replace("lora_A", lambda a: a.to_sparse()), "not dense"),
    "integers": (_replace("lora_A", lambda a: a.int()), "not dense"),
    "complex": (_replace("lora_B", lambda b: b.to(torch.complex64)), "not dense"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_hold_is_refused(tmp_path, case):
    change, words = REFUSED[case]
    model = adapted(net(), use_dora="magnitude" in case)
    save_adapter(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(ValueError, match=words):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.float16])
def test_adapters_of_any_floating_dtype_are_saved_and_loaded(tmp_path, dtype):
    model = adapted(net())
    for parameter in adapter_parameters(model):
        parameter.data = parameter.detach().to(dtype)
    save_adapter(model, tmp_path)
    assert {value.dtype for value in st.load_file(tmp_path / WEIGHTS).values()} == {dtype}
    plain = net()
    load_adapter(plain, tmp_path)
    want = [parameter.float() for parameter in adapter_parameters(model)]
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(plain), want, strict=True))


# --- all or nothing ---


def other_values(model: nn.Module) -> nn.Module:
    for parameter in adapter_parameters(model):
        parameter.data += 1
    return model


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_an_error_between_two_layers_leaves_the_model_as_it_was(tmp_path, monkeypatch, plain, at):
    save_adapter(adapted(net(), lora_alpha=3), tmp_path)
    model = net() if plain else other_values(adapted(net()))
    model.norm.weight.requires_grad_(False)
    model.inner.train()
    before, modules = state(model), [(id(m), m.training) for m in model.modules()]
    real, calls = torch.Tensor.copy_, [0]

    def copy_(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise MemoryError("no memory")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_)
        with pytest.raises(MemoryError):
            load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert [(id(m), m.training) for m in model.modules()] == modules


def test_an_error_while_layers_are_put_in_place_leaves_the_model_as_it_was(tmp_path):
    class Stubborn(nn.Sequential):
        def __setattr__(self, name, value):
            if isinstance(value, FusedLoRALinear) and name == "out":
                raise AttributeError("not this one")
            super().__setattr__(name, value)

    save_adapter(adapted(net()), tmp_path)
    model = net()
    model.inner.__class__ = Stubborn
    before, modules = state(model), [id(m) for m in model.modules()]
    for change in (lambda: load_adapter(model, tmp_path), lambda: apply_lora(model)):
        with pytest.raises(AttributeError, match="not this one"):
            change()
        assert_unchanged(model, before)
        assert [id(m) for m in model.modules()] == modules


def test_a_parameter_that_cannot_be_written_leaves_the_others_as_they_were(tmp_path):
    save_adapter(adapted(net()), tmp_path)
    model = other_values(adapted(net()))
    with torch.inference_mode():
        model.head.lora_B = nn.Parameter(torch.randn(4, 8), requires_grad=False)
    values = [parameter.clone() for parameter in adapter_parameters(model)]
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(model), values, strict=True))


def test_biases_of_a_loralib_checkpoint_are_written_with_the_adapters_or_not_at_all():
    source = adapted(net(), target_modules=["head"])
    checkpoint = {k: v + 1 for k, v in source.state_dict().items() if "lora_" in k or k.endswith("bias")}
    model = net()
    model.head.__class__ = type("Odd", (nn.Linear,), {})
    before = state(model)
    with pytest.raises(ValueError, match="subclass of"):
        load_loralib(model, checkpoint, lora_alpha=1)
    assert_unchanged(model, before)
    edit = copy.deepcopy(source)
    load_loralib(edit, checkpoint)
    assert torch.equal(edit.norm.bias, source.norm.bias + 1) and torch.equal(edit.head.lora_A, source.head.lora_A + 1)


def test_a_nan_in_an_adapter_is_kept(tmp_path):
    model = adapted(net())
    save_adapter(model, tmp_path)
    key = "base_model.model.head.lora_A.weight"
    edit_weights(tmp_path, lambda tensors: tensors[key][0].fill_(float("nan")))
    load_adapter(model, tmp_path)
    assert model.head.lora_A[0].isnan().all() and not model.head.lora_A[1].isnan().any()
