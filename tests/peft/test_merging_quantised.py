"""Merging over weights of 4 and 8 bits: a dense weight stands beside the codes, and the very codes come back."""

from __future__ import annotations

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")
from support.merge_models import K, N, is_rounded_once, over  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.quant.bnb import from_bnb  # noqa: E402

FORMATS = ("nf4", "fp4", "int8")
every_format = pytest.mark.parametrize("format", FORMATS)
pytestmark = pytest.mark.filterwarnings("ignore:.*[Aa]lready:UserWarning", "ignore:.*rounding errors", "ignore:MatMul8")


def codes_of(layer) -> tuple:
    """Return the objects of a quantised base, and copies of their bits."""
    base = layer.base_layer
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    scales = state.absmax if state is not None else (weight.SCB if weight.SCB is not None else base.state.SCB)
    return (base, weight, state, scales), [weight.data.clone(), scales.clone()]


def has_codes(layer, before) -> bool:
    objects, bits = codes_of(layer)
    same = all(a is b for a, b in zip(objects, before[0], strict=True))
    return same and all(torch.equal(a, b) for a, b in zip(bits, before[1], strict=True))


def exact(model) -> torch.Tensor:
    """Return W + s·B A in fp64, W as the codes stand for it."""
    layer = model.base_model.model.layer
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return from_bnb(layer.base_layer).dequantize(torch.float32).double() + layer.scaling["default"] * (b @ a)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_a_dense_weight_stands_beside_the_codes_and_they_come_back(format, dtype, nested):
    if nested and format == "int8":
        pytest.skip("int8 has one level of scales")
    model, x = over(format, dtype, nested), torch.randn(3, K, dtype=dtype)
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.layer
    want, before, sums = model(x), codes_of(layer), exact(model).detach()
    model.merge_adapter()
    dense = model.get_submodule("base_model.model.layer.base_layer")
    assert dense.weight.dtype == dtype and dense.weight.shape == (N, K) and is_rounded_once(dense.weight.detach(), sums)
    assert set(model.state_dict()) >= {"base_model.model.layer.base_layer." + name for name in ("weight", "bias")}
    assert not any("absmax" in key or "SCB" in key for key in model.state_dict())
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    got = model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert lora_kernels.merged_bytes(model) == dense.weight.nbytes
    model.unmerge_adapter()
    assert has_codes(layer, before) and torch.equal(model(x), want)
