"""Fused layers can be switched, copied and unfused as PEFT's layers, and reports name what is left to PEFT."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from support.peft_models import Net, config, fused_layers, make, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft.fusing import FusedLinear  # noqa: E402


def test_disabled_and_merged_adapters_are_left_to_peft():
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(base, model.get_base_model().head(plain_base(model, x))) and not torch.allclose(base, y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)
    assert all(layer.fused_calls == 2 and not layer.passed_over for layer in fused_layers(model))


def plain_base(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model()
    return base.down.base_layer(torch.tanh(base.up.base_layer(x)))


def test_adapters_can_be_set_and_deleted():
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    first = model(x)
    model.add_adapter("other", config(r=5))
    randomise(model)
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.delete_adapter("default")
    lora_kernels.unfuse(other := copy.deepcopy(model))
    torch.testing.assert_close(model(x), other(x))
    assert [layer.fused_calls for layer in fused_layers(model)] == [3, 3]


def test_unfuse_gives_back_what_was():
    model = make()
    before = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    lora_kernels.fuse(model)
    assert list(model.state_dict()) == keys and len(fused_layers(model)) == 2
    lora_kernels.fuse(model)
    lora_kernels.unfuse(model)
    assert {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()} == before


def test_copies_pickles_and_loaded_adapters_give_the_same(tmp_path):
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y) and len(fused_layers(other)) == 2
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    loaded.get_base_model().load_state_dict(model.get_base_model().state_dict())
    lora_kernels.fuse(loaded, strict=True)
    torch.testing.assert_close(loaded(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_a_copy_begins_with_the_numbers_of_calls_of_its_original():
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    model(x)
    other = copy.deepcopy(model)
    other(x)
    assert [layer.fused_calls for layer in fused_layers(model)] == [1, 1]
    assert [layer.fused_calls for layer in fused_layers(other)] == [2, 2]
    layer = fused_layers(model)[0]
    layer.to(torch.float64)
    layer(torch.randn(2, layer.in_features, dtype=torch.float64))
    assert copy.deepcopy(layer).passed_over == layer.passed_over


def test_what_cannot_be_fused_is_left_to_peft_and_reported():
    model, x = make(target_modules=["up", "down", "emb"]), torch.randn(4, 24)
    model.base_model.model.down.base_layer.register_forward_hook(lambda _, args, y: y * 2)
    want = run(model, x)
    with pytest.raises(RuntimeError, match=r"(?s)nothing was changed.*2 of 3 LoRA layers fused.*has hooks"):
        lora_kernels.fuse(model, strict=True)
    assert not fused_layers(model)
    report = lora_kernels.fuse(model)
    assert list(report.fused) == ["base_model.model.emb", "base_model.model.up"]
    (name, why), *others = report.not_fused.items()
    assert name == "base_model.model.down" and not others
    assert why.startswith("its base layer has hooks, which the fused path would pass over (a forward hook, ")
    text = str(report)
    assert text.startswith("2 of 3 LoRA layers fused") and "24→40, default r=4" in text and "not fused" in text
    same(run(model, x), want)


def test_single_calls_are_left_to_peft_with_a_reason():
    model, x = make(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    up, down = fused_layers(model)
    want = model(x)
    hook = up.lora_A["default"].register_forward_hook(lambda module, args, y: y * 0)
    assert not torch.allclose(model(x), want)
    hook.remove()
    up.base_layer.weight.requires_grad_(True)
    assert run(model, x)["base_model.model.up.base_layer.weight"].abs().sum() > 0
    up.base_layer.weight.requires_grad_(False)
    up.lora_dropout["default"] = nn.Dropout(1.0)
    model(x)
    hooks, trained, drops = sorted(up.passed_over, reverse=True, key=lambda why: "hooks" in why)
    assert hooks.startswith("adapter 'default' has hooks, which the fused path would pass over (a forward hook, ")
    assert trained.startswith("its base weight is trained")
    assert drops.startswith("adapter 'default' drops everything: p = 1.0")
    assert set(up.passed_over.values()) == {1}
    assert (up.fused_calls, down.fused_calls) == (1, 4)


def test_variants_are_left_to_peft():
    config = getattr(peft.tuners.lora.config, "VeloraConfig", None)
    if config is None:
        pytest.skip(f"PEFT {peft.__version__} has no VeLoRA")
    model, x = make(velora_config=config(num_groups=4)), torch.randn(4, 24)
    report = lora_kernels.fuse(model)
    assert not report.fused and all("VeloraLinearVariant" in why for why in report.not_fused.values())
    other = copy.deepcopy(model)
    lora_kernels.unfuse(other)
    assert torch.equal(model(x), other(x)) and all(layer.fused_calls == 0 for layer in fused_layers(model))


def test_a_named_backend_is_used_and_never_replaced():
    model, x = make(), torch.randn(4, 24)
    with pytest.raises(ValueError, match="no back-end 'cublas'"):
        lora_kernels.fuse(model, backend="cublas")
    lora_kernels.fuse(model, backend="cuda")
    with pytest.raises(ValueError, match="cuda"):
        model(x)
    lora_kernels.fuse(model, backend="eager")
    model(x)


def test_enable_fuses_every_model_that_peft_makes():
    created = peft.tuners.lora.LoraModel.__dict__["_create_new_module"]
    lora_kernels.enable()
    lora_kernels.enable()
    try:
        model = make().eval()
        model.add_adapter("second", config())
    finally:
        lora_kernels.disable()
    assert peft.tuners.lora.LoraModel.__dict__["_create_new_module"] is created
    assert len(fused_layers(model)) == 2 and not fused_layers(make())
    x = torch.randn(4, 24)
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    torch.testing.assert_close(model(x), plain(x))
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


def test_the_repr_is_pefts_and_says_that_the_layer_is_fused():
    model = make()
    plain = repr(model.base_model.model.up)
    lora_kernels.fuse(model)
    assert repr(model.base_model.model.up) == plain.replace("(\n", "(\n  fused by lora_kernels\n", 1)


def test_the_report_says_that_a_model_has_no_peft_layers():
    report = lora_kernels.fuse(Net())
    assert str(report) == "0 of 0 LoRA layers fused: the model has none"


def test_five_hundred_layers_take_less_than_a_second():
    import time

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.ModuleDict({f"up{i}": nn.Linear(8, 8) for i in range(500)})
        model = get_peft_model(net, LoraConfig(target_modules=r"up\d+"))
    start = time.process_time()
    report = lora_kernels.fuse(model)
    assert time.process_time() - start < 1 and len(report.fused) == 500


def test_the_class_name_has_the_word_that_all_linear_looks_for():
    """PEFT matches layers of other adapters by the word Linear in their class's name."""
    assert "Linear" in FusedLinear.__name__ and issubclass(FusedLinear, PeftLinear)
