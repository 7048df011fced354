"""AdaLoRA over bitsandbytes' weights of 4 and 8 bits gives, fused, what PEFT gives."""

from __future__ import annotations

import copy

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from peft import get_peft_model  # noqa: E402
from support import fold_models  # noqa: E402
from support.bnb_models import Net, Net8  # noqa: E402
from support.fold_models import config_of, layers_of  # noqa: E402
from support.peft_models import MaskOfSeed, fused_layers, run, same  # noqa: E402

import lora_kernels  # noqa: E402


def make(net: torch.nn.Module, p: float = 0.0) -> peft.PeftModel:
    model = get_peft_model(net, config_of("adalora", p)).train()
    fold_models.randomise(model)
    return model


def fused_equals_peft(model: peft.PeftModel, x: torch.Tensor, rtol: float = 1e-5) -> None:
    want = run(copy.deepcopy(model), x)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want, rtol)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_give_pefts_values_and_all_gradients(quant_type: str):
    fused_equals_peft(make(Net(quant_type=quant_type)), torch.randn(2, 5, 64))


def test_eight_bits_give_pefts_values_and_all_gradients():
    """In training mode on the CPU, bitsandbytes does not round x."""
    fused_equals_peft(make(Net8()), torch.randn(6, 64))


def test_a_computation_in_16_bits_is_pefts():
    model = make(Net(compute_dtype=torch.bfloat16))
    fused_equals_peft(model, torch.randn(6, 64, dtype=torch.bfloat16), rtol=4 * torch.finfo(torch.bfloat16).eps)


def test_dropout_is_pefts_with_our_mask(monkeypatch: pytest.MonkeyPatch):
    model, x = make(Net(), 0.3), torch.randn(6, 64)
    plain, seeds = copy.deepcopy(model), [torch.tensor(100), torch.tensor(101)]
    for seed, layer in zip(seeds, layers_of(plain), strict=True):
        layer.lora_dropout["default"] = MaskOfSeed(0.3, seed)
    drawn = iter(seeds)
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: next(drawn))
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), run(plain, x), rtol=1e-5)


def test_unfusing_gives_pefts_classes_back():
    model, x = make(Net()), torch.randn(6, 64)
    classes = [type(layer) for layer in layers_of(model)]
    want = model(x)
    report = lora_kernels.fuse(model, strict=True)
    assert all("nf4" in text for text in report.fused.values())
    lora_kernels.unfuse(model)
    assert [type(layer) for layer in layers_of(model)] == classes and torch.equal(model(x), want)
