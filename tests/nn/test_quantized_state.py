"""The tensors of a quantised layer from outside: files of any strides, files of earlier versions, tensors replaced by
hand. A kernel reads them by address, so each is made contiguous or refused."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRALinear
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.quant.weight import CODES, QuantizedWeight, quantize_weight

FORMATS = {
    "nf4": {"quant": "nf4"},
    "double": {"quant": "nf4", "double_quant": True},
    "fp4": {"quant": "fp4"},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8"},
}
PARTS = ("weight", "weight_scales", "weight_table", "weight_absmax")


@pytest.fixture(params=FORMATS)
def layer(request) -> QuantizedLoRALinear:
    made = FusedLoRALinear.from_linear(nn.Linear(64, 384), r=2, **FORMATS[request.param])
    nn.init.normal_(made.lora_B)
    return made


def strided(t: Tensor) -> Tensor:
    """Return t with other strides: a column of a wider tensor, or of its transpose."""
    same = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
    other = same.t().contiguous().t() if t.dim() == 2 and t.shape[1] > 1 else torch.stack([same, same], dim=-1)[..., 0]
    assert not other.is_contiguous()
    return other.view(t.dtype)


def through_torch_save(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rows", [2, 300])
def test_a_file_of_any_strides_loads_into_contiguous_tensors(layer, rows):
    x = torch.randn(rows, 64)
    want = layer(x)
    state = layer.state_dict()
    state |= {name: strided(t) for name, t in state.items() if name in PARTS}
    assert not all(t.is_contiguous() for t in state.values())
    layer.load_state_dict(through_torch_save(state), assign=True)
    assert all(t.is_contiguous() for t in layer.quantized_weight().tensors)
    assert torch.equal(layer(x), want)


def test_expanded_scales_are_loaded_with_memory_of_their_own():
    layer, x = FusedLoRALinear.from_linear(nn.Linear(64, 512), r=2, quant="int8"), torch.randn(2, 64)
    state = layer.state_dict() | {"weight_scales": torch.ones(1).expand(512)}
    layer.load_state_dict(through_torch_save(state), assign=True)
    w = layer.quantized_weight().dequantize(torch.float32)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, w, layer.bias))


def test_a_file_whose_codes_have_the_dtype_of_their_format_loads(layer):
    """Earlier versions stored the codes of nf4 and fp4 as uint8, and those of fp8 as float8_e4m3fn."""
    x = torch.randn(3, 64)
    want, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    state["weight"] = state["weight"].view(CODES[layer.format])
    for assign in (False, True):
        with torch.no_grad():
            layer.weight.zero_()
        layer.load_state_dict(state, assign=assign)
        assert torch.equal(layer(x), want) and layer.weight.dtype == torch.int8


def replace_data(layer: QuantizedLoRALinear, name: str, t: Tensor) -> None:
    getattr(layer, name).data = t


def replace_tensor(layer: QuantizedLoRALinear, name: str, t: Tensor) -> None:
    setattr(layer, name, nn.Parameter(t, requires_grad=False) if name == "weight" else t)


@pytest.mark.parametrize("replace", [replace_data, replace_tensor])
@pytest.mark.parametrize("change", [strided, lambda t: t[:-1], lambda t: t[:1].expand_as(t)])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("rows", [2, 300])
def test_a_tensor_that_is_replaced_by_hand_is_refused(layer, name, change, replace, rows):
    pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
    if not hasattr(layer, name):
        pytest.skip("only double quantisation has this tensor")
    replace(layer, name, change(getattr(layer, name).detach()))
    x = torch.randn(rows, 64)
    with pytest.raises(ValueError, match=r"contiguous|of size|differ"):
        layer(x)


@pytest.mark.parametrize("part", ["codes", "scales"])
@pytest.mark.parametrize("checked", [False, True])
def test_a_weight_that_is_put_together_by_hand_is_refused(part, checked):
    pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
    q = quantize_weight(torch.randn(384, 64), "int8")
    parts = {"codes": q.codes, "scales": q.scales}
    parts[part] = strided(parts[part])
    w = QuantizedWeight("int8", (384, 64), torch.float32, **parts, checked=checked)
    with pytest.raises(ValueError, match="contiguous"):
        lora_kernels.lora_linear(torch.randn(3, 64), w, torch.randn(2, 64), torch.randn(384, 2), scale=1.0)


@pytest.mark.parametrize("shape", [(383,), (1,), (384, 2)])
def test_the_registered_operator_refuses_scales_of_another_size(shape):
    pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
    q = quantize_weight(torch.randn(384, 64), "int8")
    a, b, x = torch.randn(2, 64), torch.randn(384, 2), torch.randn(3, 64)
    op = torch.ops.lora_kernels.forward
    run = lambda scales: op(x, q.codes, a, b, None, 1.0, 0.0, None, None, False, [scales], "int8", 0)  # noqa: E731
    assert run(q.scales)[0].shape == (3, 384)
    with pytest.raises(ValueError, match="the scales of a quantised weight as a contiguous tensor of 384 elements"):
        run(torch.ones(shape))
