"""The results do not depend on torch's default device and default dtype, which the caller may have set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, quantize_weight
from lora_kernels.backends.cpu import quant as cpu_quant
from lora_kernels.quant import tables

QUANTS = [None, "nf4", "fp4", "int8", "fp8"]


@pytest.fixture
def fresh(monkeypatch):
    """The state of a new process: the tables and the working memory, which are made at their first use, do not
    exist."""
    monkeypatch.setattr(tables, "_made", {})
    cpu_quant._kept.__dict__.pop("room", None)
    yield
    cpu_quant._kept.__dict__.pop("room", None)


def results(quant: str | None, dtype: torch.dtype) -> list[torch.Tensor]:
    made = torch.Generator("cpu").manual_seed(0)
    like = {"dtype": torch.float32, "device": "cpu", "generator": made}
    x, w, dy = torch.randn(70, 64, **like), torch.randn(48, 64, **like), torch.randn(70, 48, **like)
    base = nn.Linear(64, 48, bias=False, dtype=dtype, device="cpu")
    base.weight.data.copy_(w)
    layer = FusedLoRALinear.from_linear(base, r=3, quant=quant, double_quant=quant in ("nf4", "fp4"), lora_dropout=0.5)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(3, 64, **like))
        layer.lora_B.copy_(torch.randn(48, 3, **like))
    torch.manual_seed(0)
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    torch.autograd.grad(y.sum(), x, create_graph=True)
    y.backward(dy.to(dtype))
    return [
        y.detach(),
        x.grad,
        layer.lora_A.grad,
        layer.lora_B.grad,
        layer.to_linear().weight,
        *layer.state_dict().values(),
    ]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_default_device_changes_no_bit_and_no_device(fresh, quant, dtype):
    want = results(quant, dtype)
    tables._made.clear()
    cpu_quant._kept.__dict__.pop("room", None)
    with torch.device("meta"):
        got = results(quant, dtype)
    assert all(t.device.type == "cpu" for t in got)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("quant", QUANTS)
def test_a_default_dtype_changes_no_bit_and_no_dtype(fresh, quant):
    want = results(quant, torch.float32)
    tables._made.clear()
    torch.set_default_dtype(torch.float64)
    try:
        got = results(quant, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))


def test_a_default_device_does_not_disturb_adapters_by_sample():
    peft = pytest.importorskip("peft")
    from lora_kernels import fuse

    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).eval()
    model.add_adapter("other", config)
    names, x = ["other", "default", "__base__", "other", "default"], torch.randn(5, 6)
    want = model(x, adapter_names=names)
    fuse(model, strict=True)
    with torch.device("meta"):
        torch.testing.assert_close(model(x, adapter_names=names), want)


def test_the_tables_are_fp32_whatever_the_default_dtype_is(fresh):
    torch.set_default_dtype(torch.float64)
    try:
        quantize_weight(torch.randn(8, 64, dtype=torch.float32), "nf4", double_quant=True).check()
    finally:
        torch.set_default_dtype(torch.float32)
