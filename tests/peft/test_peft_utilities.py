"""What PEFT's own tools do with a fused model is what they do with an unfused one."""

from __future__ import annotations

import copy

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoHaConfig, get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale  # noqa: E402
from peft.utils import hotswap  # noqa: E402
from support.peft_models import Net, config, fused_layers, make, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402


def loha() -> LoHaConfig:
    return LoHaConfig(r=4, target_modules=["up", "down"], init_weights=False)


def two_adapters() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a fused model with the adapters default and second, and an unfused one."""
    model = make()
    model.add_adapter("second", config(lora_alpha=3))
    randomise(model)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    return model, plain


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_mixed_model_is_fused_where_the_base_of_lora_is_a_linear(lora_first):
    first, second = (
        (config(init_lora_weights=False), loha()) if lora_first else (loha(), config(init_lora_weights=False))
    )
    lora_kernels.enable()
    try:
        torch.manual_seed(0)
        model = get_peft_model(Net(), first, mixed=True)
        model.add_adapter("second", second)
    finally:
        lora_kernels.disable()
    model.set_adapter(["default", "second"])
    plain, x = copy.deepcopy(model), torch.randn(4, 24)
    lora_kernels.unfuse(plain)
    report = lora_kernels.fuse(model)
    assert not fused_layers(plain) and len(fused_layers(model)) == 2
    same(run(model, x), run(plain, x))
    if lora_first:
        assert [layer.fused_calls for layer in fused_layers(model)] == [1, 1] and not report.not_fused
    else:
        assert set(report.not_fused.values()) == {"its base is another tuner's layer"} and not report.fused


@pytest.mark.parametrize("how", ["cat", "linear", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_a_weighted_sum_of_adapters_is_pefts(how):
    models, x = two_adapters(), torch.randn(4, 24)
    for each in models:
        torch.manual_seed(3)
        each.add_weighted_adapter(["default", "second"], [0.3, 0.9], "sum", combination_type=how, density=0.5)
        each.set_adapter("sum")
    same(run(models[0], x), run(models[1], x))
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(models[0]))


def test_scales_frozen_adapters_and_conversions_are_pefts():
    models, x = two_adapters(), torch.randn(4, 24)
    results = []
    for each in models:
        each.base_model.set_adapter(["default", "second"])
        each.set_requires_grad("second", False)
        with rescale_adapter_scale(each, 0.3), disable_input_dtype_casting(each):
            results.append(run(each, x))
    same(*results)
    assert not any("second" in name for name in results[0])
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(models[0]))
    if hasattr(peft, "convert_to_lora"):
        files = [peft.convert_to_lora(each, rank=3)[1] for each in models]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())


def test_an_adapter_is_swapped_in_place_also_for_one_of_another_rank(tmp_path):
    other, x = make(r=7, lora_alpha=20), torch.randn(4, 24)
    other.save_pretrained(tmp_path)
    model = make()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    lora_kernels.fuse(model, strict=True)
    hotswap.hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(model(x), other(x))
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))


def test_a_name_may_come_back_as_another_kind_of_adapter():
    model, x = make(use_dora=True), torch.randn(4, 24)
    lora_kernels.fuse(model, strict=True)
    model.add_adapter("second", config())
    model.set_adapter("second")
    model.delete_adapter("default")
    model.add_adapter("default", config(r=6))
    model.set_adapter("default")
    randomise(model)
    plain = copy.deepcopy(model)
    lora_kernels.unfuse(plain)
    assert not lora_kernels.fuse(model, strict=True).not_fused
    same(run(model, x), run(plain, x))
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_offloaded_model_merges_as_peft_merges_it(on_disk, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, x = make().eval(), torch.randn(4, 24)
    randomise(plain)
    fused, want = copy.deepcopy(plain), plain(x)
    lora_kernels.fuse(fused, strict=True)
    for name, model in (("fused", fused), ("plain", plain)):
        if on_disk:
            accelerate.disk_offload(model, tmp_path / name, execution_device="cpu")
        else:
            accelerate.cpu_offload(model, execution_device="cpu")
    for change in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        results = []
        for model in (fused, plain):
            after = getattr(model, change)() or model
            results.append(after(x))
            assert all(p.is_meta for p in after.parameters())
        assert torch.equal(*results)
        torch.testing.assert_close(results[0], want)
