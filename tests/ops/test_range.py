"""In fp16 nothing overflows or vanishes on the way to a result that fits, where plain torch's result is finite."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, dora_linear, fuse, lora_linear, quantize_weight
from lora_kernels.group import Layer, lora_linear_group
from lora_kernels.nn.quantized import quantized_linear

HALF = torch.float16
FORMATS = ("nf4", "fp4", "int8", "fp8")
N, K = 160, 64


def large(M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, W and a bias, with which x Wᵀ is 70,272 and above the largest fp16, and x Wᵀ + bias is 10,272."""
    fill = lambda value, *size: torch.full(size, value, dtype=HALF)  # noqa: E731
    return fill(30.0, M, K), fill(36.6, N, K), fill(-60000.0, N)


def adapter(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B, whose product with x of `large` is 38.4."""
    return torch.full((4, K), 0.01, dtype=dtype), torch.full((N, 4), 0.5, dtype=dtype)


@pytest.mark.parametrize("M", [1, 3, 16, 20, 70])
@pytest.mark.parametrize("adapter_dtype", [HALF, torch.float32])
def test_the_bias_is_added_before_the_product_is_rounded(adapter_dtype, M, backend):
    x, w, bias = large(M)
    a, b = adapter(adapter_dtype)
    want = F.linear(x, w, bias).float() + 38.4
    assert want.isfinite().all()
    got = {
        "dense": lora_linear(x, w, a, b, scale=1.0, bias=bias, backend=backend),
        "strided": lora_linear(x, w.t().contiguous().t(), a, b, scale=1.0, bias=bias, backend=backend),
        "dora": dora_linear(x, w, a, b, m_of(w, a, b), scale=1.0, bias=bias, backend=backend),
    }
    layers = [Layer(w, a, b, 1.0, bias), Layer(w, a, b, 1.0, bias)]
    got |= {f"group {i}": y for i, y in enumerate(lora_linear_group(x, layers, backend=backend))}
    for name, y in got.items():
        torch.testing.assert_close(y.float(), want, rtol=2**-10, atol=8, msg=lambda text, name=name: f"{name}: {text}")


def m_of(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return DoRA's norm, with which d is 1."""
    return torch.linalg.vector_norm(w.double() + b.double() @ a.double(), dim=1).to(b.dtype)


@pytest.mark.parametrize("M", [1, 16, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_the_bias_is_added_before_the_product_over_codes_is_rounded(format, M, backend):
    x, w, bias = large(M)
    a, b = adapter(HALF)
    q = quantize_weight(w, format)
    want = F.linear(x, q.dequantize(HALF), bias).float()
    assert want.isfinite().all()
    y = lora_linear(x, q, a, b, scale=1.0, bias=bias, backend=backend)
    torch.testing.assert_close(y.float(), want + 38.4, rtol=2**-10, atol=8)
    torch.testing.assert_close(quantized_linear(x, q, bias, backend).float(), want, rtol=2**-10, atol=8)


def test_the_bias_is_added_once_with_every_instruction_set(isa):
    """bf16 has a GEMM of our own with some of them, in panels of all widths."""
    for dtype in (torch.float32, torch.bfloat16, HALF):
        for M, N in ((1, 3), (5, 130), (40, 7), (130, 200)):
            x, w, bias = torch.randn(M, 96).to(dtype), torch.randn(N, 96).to(dtype), torch.randn(N).to(dtype) * 100
            a, b = torch.zeros(2, 96, dtype=dtype), torch.zeros(N, 2, dtype=dtype)
            exact = x.double() @ w.double().t() + bias.double()
            for weight in (w, w.t().contiguous().t()):
                y = lora_linear(x, weight, a, b, scale=1.0, bias=bias, backend="cpu")
                torch.testing.assert_close(y, exact.to(dtype))
            for format in FORMATS:
                q = quantize_weight(w, format)
                exact_q = x.double() @ q.dequantize(torch.float32).double().t() + bias.double()
                y = lora_linear(x, q, a, b, scale=1.0, bias=bias, backend="cpu")
                error = (y.double() - exact_q).abs().max().item()
                assert error <= 4 * torch.finfo(dtype).eps * exact_q.abs().max().item(), (format, dtype, M, N)


def test_our_gemm_in_bf16_rounds_the_sum_with_the_bias_once():
    from lora_kernels import _C
    from lora_kernels.backends.cpu import gemm

    if not _C.has_gemm(torch.bfloat16):
        pytest.skip("this processor has no instructions for bf16")
    x, w = torch.ones(40, 96).bfloat16(), torch.full((70, 96), 10 + 2**-4).bfloat16()
    bias = torch.full((70,), -960.0).bfloat16()
    assert torch.equal(gemm.own(x, w, bias=bias), torch.full((40, 70), 6.0).bfloat16())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("adapter_dtype", [HALF, torch.float32])
def test_a_fresh_layer_gives_what_its_base_gives(adapter_dtype, use_dora):
    x, w, bias = large(20)
    linear = nn.Linear(K, N, dtype=HALF)
    with torch.no_grad():
        linear.weight.copy_(w)
        linear.bias.copy_(bias)
    want = linear(x)
    layer = FusedLoRALinear.from_linear(linear, r=4, adapter_dtype=adapter_dtype, use_dora=use_dora)
    torch.testing.assert_close(layer(x), want, rtol=2**-10, atol=0)
    layer.merge()
    torch.testing.assert_close(layer(x), want, rtol=2**-10, atol=0)


def test_a_fused_layer_of_peft_adds_the_bias_first():
    peft = pytest.importorskip("peft")
    x, w, bias = large(20)
    model = nn.Sequential(nn.Linear(K, N, dtype=HALF))
    with torch.no_grad():
        model[0].weight.copy_(w)
        model[0].bias.copy_(bias)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    fused = copy.deepcopy(model)
    fuse(fused)
    torch.testing.assert_close(fused(x), model(x), rtol=2**-9, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_small_scale_keeps_gradients_finite(p, backend):
    """dy B and dyᵀ h are above the largest fp16, and s times as much is not. Plain torch multiplies dy by s first."""
    x, w = torch.full((64, 32), 1.0, dtype=HALF), torch.zeros(48, 32, dtype=HALF)
    a, b = torch.full((4, 32), 2.0, dtype=HALF), torch.full((48, 4), 20.0, dtype=HALF)
    dy, seed = torch.full((64, 48), 100.0, dtype=HALF), torch.tensor(3)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = lora_linear(x, w, a, b, scale=1e-3, dropout_p=p, seed=seed if p else None, backend=backend)
    for got, bound in zip(torch.autograd.grad(y, leaves, dy), (4e3, 4e4, 4e3), strict=True):
        assert got.isfinite().all() and 0 < got.abs().max() < bound


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0, 1e5, 1e6])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_fp32_adapters_beside_16_bits_may_make_any_h_and_g(p, size, dtype, backend):
    """|h| and |g| are about `size`, and what is computed from them fits."""
    x, w = torch.randn(33, 48).to(dtype), torch.zeros(40, 48, dtype=dtype)
    a, b = torch.randn(4, 48) * size / 7, torch.randn(40, 4) / size
    dy, seed = torch.randn(33, 40).to(dtype), torch.tensor(3) if p else None
    grads = []
    for wide in (False, True):
        leaves = [t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in (x, a, b)]
        name = "eager" if wide else backend
        y = lora_linear(leaves[0], w.to(leaves[0].dtype), *leaves[1:], scale=1.0, dropout_p=p, seed=seed, backend=name)
        grads.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    for got, want in zip(*grads, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 8 * torch.finfo(got.dtype).eps
