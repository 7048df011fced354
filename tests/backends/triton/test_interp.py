"""The repaired interpreter is right where Triton's own is wrong."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
import triton
import triton.language as tl
from support.interp import interpret


@triton.jit
def _square(x):
    return x * x


@triton.jit
def _operations(a, b, product, total, third, square, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a_tile, b_tile = tl.load(a + at), tl.load(b + at)
    tl.store(product + at, tl.dot(a_tile, b_tile))
    tl.store(total + at, a_tile + b_tile)
    tl.store(third + at, (a_tile.to(tl.float32) / 3).to(third.dtype.element_ty))
    tl.store(square + at, _square(a_tile))


def test_bfloat16_is_computed_in_fp32_and_rounded() -> None:
    """Triton's own interpreter multiplies and adds the payloads as integers, and truncates where it should round."""
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    product = torch.empty(16, 16)
    total, third, square = (torch.empty_like(a) for _ in range(3))
    with interpret():
        _operations[(1,)](a, b, product, total, third, square, 16)
    torch.testing.assert_close(product, a.float() @ b.float())
    assert torch.equal(total, a + b)
    assert torch.equal(third, (a.float() / 3).bfloat16())
    assert torch.equal(square, a * a)


def test_triton_is_not_patched_afterwards() -> None:
    before = {name: getattr(tl, name) for name in ("load", "dot", "arange", "zeros")}
    test_bfloat16_is_computed_in_fp32_and_rounded()
    assert all(getattr(tl, name) is value for name, value in before.items())
