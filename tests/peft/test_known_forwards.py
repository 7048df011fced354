"""A forward of PEFT that this package does not know is left to PEFT, with the name of what is new in it."""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft.tuners.adalora import layer as adalora  # noqa: E402
from peft.tuners.delora import layer as delora  # noqa: E402
from peft.tuners.lora import LoraModel, dora, layer, variants  # noqa: E402
from support import fold_models  # noqa: E402
from support.peft_models import config, fused_layers, make, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import folds, known, linear  # noqa: E402
from lora_kernels.peft.fused import LORA_USES  # noqa: E402

DORA = variants.DoraLinearVariant, dora.DoraLinearLayer


def why_not_lora(kind: type) -> str:
    return known.why_not(kind, LORA_USES, "forward", "_mixed_batch_forward")


def why_not_dora() -> str:
    return "".join(known.why_not(owner, linear.DORA_USES) for owner in DORA)


@pytest.fixture
def disabled() -> Iterator[None]:
    created = LoraModel.__dict__["_create_new_module"]
    yield
    lora_kernels.disable()
    LoraModel._create_new_module = created


def changed(function, old: str, new: str):
    """Return PEFT's function with one line of its source changed, as another version of PEFT would have it."""
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source
    names: dict = {}
    module = inspect.getmodule(function)
    exec(source.removeprefix("@staticmethod\n").replace(old, new), vars(module), names)
    return names[function.__name__]


def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give PEFT's LoRA linear a gate, as a newer PEFT might: one more attribute that its forward reads."""
    forward = changed(layer.Linear.forward, "* scaling\n", "* scaling * self.lora_gate\n")
    monkeypatch.setattr(layer.Linear, "forward", forward)
    monkeypatch.setattr(layer.Linear, "lora_gate", 0.5, raising=False)


def test_the_installed_pefts_forwards_are_known():
    from peft.tuners.lora import bnb

    kinds = [layer.Linear, *(getattr(bnb, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(bnb, name))]
    assert [why_not_lora(kind) for kind in kinds] == [""] * len(kinds)
    assert set(folds.UNKNOWN.values()) == {""}
    assert why_not_dora() == ""


def test_a_forward_that_uses_something_new_is_pefts(monkeypatch, disabled):
    gated(monkeypatch)
    lora_kernels.enable()
    model, x = make(), torch.randn(4, 24)
    assert not fused_layers(model)
    want = run(copy.deepcopy(model), x)
    report = lora_kernels.fuse(model)
    why = "PEFT's Linear.forward uses lora_gate, which this version of lora_kernels does not know"
    assert list(report.not_fused.values()) == [why, why] and not report.fused and not fused_layers(model)
    same(run(model, x), want)
    with pytest.raises(RuntimeError, match="lora_gate"):
        lora_kernels.fuse(model, strict=True)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("self.base_layer(x, ", "self.new_base(x, ", "new_base"),
        ("self._cast_input_dtype(x, ", "F.new_cast(x, ", "F, new_cast"),
        ("if self.disable_adapters:", 'if getattr(self, "lora_route", False):', "getattr, lora_route"),
        ("x=x,", "x=x, routing=result,", "routing"),
        ("for active_adapter in self.active_adapters:", "for active_adapter in [n for n in self.order]:", "order"),
    ],
)
def test_whatever_a_forward_reads_is_named(monkeypatch, old, new, name):
    monkeypatch.setattr(layer.Linear, "forward", changed(layer.Linear.forward, old, new))
    assert why_not_lora(layer.Linear) == (
        f"PEFT's Linear.forward uses {name}, which this version of lora_kernels does not know"
    )


def test_new_things_in_mixed_batches_and_in_dora_are_named(monkeypatch):
    mixed = changed(layer.LoraLayer._mixed_batch_forward, "self.base_layer(x, ", "self.by_sample(x, ")
    monkeypatch.setattr(layer.Linear, "_mixed_batch_forward", mixed)
    assert "by_sample" in why_not_lora(layer.Linear)
    for owner, old, new in (
        (DORA[0], "result = result + ", "result = result + module.shift + "),
        (DORA[1], "mag_norm_scale = ", "mag_norm_scale = self.temperature * "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", staticmethod(changed(owner.forward, old, new)))
            assert re.search(rf"{owner.__name__}.forward uses (shift|temperature),", why_not_dora())


@pytest.mark.parametrize(
    ("kind", "owner", "old", "new"),
    [
        ("adalora", adalora.SVDLinear, "* scaling / ranknum", "* scaling / ranknum * self.temperature"),
        ("delora", delora.DeloraLinear, "h = h * scaling", "h = h * scaling * self.temperature"),
    ],
)
def test_new_things_in_other_methods_are_named_and_left_to_peft(kind, owner, old, new, monkeypatch):
    monkeypatch.setattr(owner, "forward", changed(owner.forward, old, new))
    monkeypatch.setattr(owner, "temperature", 0.5, raising=False)
    model, x = fold_models.make(kind), torch.randn(4, 24)
    want = run(copy.deepcopy(model), x)
    why = f"PEFT's {owner.__name__}.forward uses temperature, which this version of lora_kernels does not know"
    assert set(lora_kernels.fuse(model).not_fused.values()) == {why}
    same(run(model, x), want)


@pytest.mark.parametrize("kind", ["kasa", "mica", "bdlora"])
def test_a_variant_of_an_unknown_kind_is_pefts(kind, monkeypatch):
    model, x = fold_models.make(kind), torch.randn(4, 24)
    variant = type(fold_models.layers_of(model)[0].lora_variant["default"])
    assert folds.UNKNOWN[variant] == ""
    forward = changed(variant.forward, "* scaling", "* scaling * module.temperature")
    with monkeypatch.context() as patch:
        patch.setattr(variant, "forward", staticmethod(forward))
        why = known.why_not(variant, folds._USES[variant.__name__])
    assert "uses temperature," in why
    monkeypatch.setitem(folds.UNKNOWN, variant, why)
    assert set(lora_kernels.fuse(model).not_fused.values()) == {why}
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))


def test_dora_of_an_unknown_kind_is_pefts(monkeypatch):
    why = "PEFT's DoraLinearVariant.forward uses shift, which this version of lora_kernels does not know"
    monkeypatch.setattr("lora_kernels.peft.linear._DORA_UNKNOWN", why)
    assert set(lora_kernels.fuse(make(use_dora=True)).not_fused.values()) == {why}
    assert not lora_kernels.fuse(make()).not_fused


def test_a_forward_that_another_package_has_put_in_place_is_kept(monkeypatch):
    original = layer.Linear.forward

    def doubled(self, x, *args, **kwargs):
        return original(self, x, *args, **kwargs) * 2

    monkeypatch.setattr(layer.Linear, "forward", doubled)
    model, x = make(), torch.randn(4, 24)
    want = run(copy.deepcopy(model), x)
    (why,) = set(lora_kernels.fuse(model).not_fused.values())
    assert why == f"PEFT's Linear.forward has been replaced by a function of {__name__}"
    same(run(model, x), want)
    monkeypatch.setattr(layer.Linear, "forward", torch._dynamo.disable(original))
    assert "has been replaced by a function of torch" in why_not_lora(layer.Linear)


def test_a_variant_that_does_not_exist_yet_is_pefts():
    class Shifted(variants.DoraLinearVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return result + 1

    model, x = make(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    for fused in fused_layers(model):
        fused.lora_variant["default"] = Shifted()
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))
    assert all(each.passed_over == {"adapter 'default' is a Shifted": 2} for each in fused_layers(model))


def test_a_factory_that_another_package_has_put_around_pefts_stays(disabled):
    made = []

    def factory(before):
        return staticmethod(lambda *args, **kwargs: made.append(before) or before.__func__(*args, **kwargs))

    own = LoraModel.__dict__["_create_new_module"]
    LoraModel._create_new_module = inner = factory(own)
    lora_kernels.enable()
    assert len(fused_layers(make())) == 2 and made == [own] * 2
    LoraModel._create_new_module = outer = factory(LoraModel.__dict__["_create_new_module"])
    lora_kernels.disable()
    assert LoraModel.__dict__["_create_new_module"] is outer and not fused_layers(make())
    lora_kernels.enable()
    assert len(fused_layers(make())) == 2
    lora_kernels.disable()
    assert LoraModel.__dict__["_create_new_module"] is outer
    LoraModel._create_new_module = inner
    assert not fused_layers(make())
