"""The CPU back-end: the low-rank half and its dropout in csrc/cpu; the base GEMM from torch or csrc/cpu too.

    h = c·(keep ⊙ x) aᵀ          y = x wᵀ, then y += s · h bᵀ + bias in place
    g = s · dy b                 dx = dy w, then dx += c · keep ⊙ (g a) in place
    da = c · gᵀ(keep ⊙ x)        db = s · dyᵀ h

The native kernels sum in fp32 whatever the dtype, in an order that depends on the shape alone: results change neither
from run to run nor with the number of threads. They keep h and g in fp32 between their two halves, except where
everything is bf16 and the processor multiplies it natively (AVX512_BF16): there h and g are rounded to bf16 as plain
torch rounds them, and subnormals count as zero as in its own GEMM. The keep
bits come from Philox inside the pass over x; no mask and no x̂ exist. Nothing of size M×N or M×K is allocated beyond
the results.

Operands are addressed by row stride. One whose last stride is not 1 (a transposed view of x, dy, a, b or h) is copied
first; w may have any strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import random
from lora_kernels.backends import Call

try:
    from lora_kernels import _C
    from lora_kernels.backends.cpu_gemm import CODES, base_gemm, base_gemm_choices
except ImportError as error:
    raise ImportError(
        f"the native CPU kernels are not there ({error}): they are built when lora_kernels is installed, which takes a "
        "C++17 compiler and Python's headers (Debian: apt install g++ python3-dev), then: "
        "pip install --force-reinstall --no-deps lora_kernels"
    ) from error

__all__ = ["backward", "base_gemm_choices", "forward", "name", "why_not"]

name = "cpu"


def why_not(call: Call) -> list[str]:
    reasons = []
    if call.device.type != "cpu":
        reasons.append(f"the tensors are on {call.device}, the kernels run on a CPU")
    if call.dtype not in CODES:
        reasons.append(f"x has {call.dtype}, the kernels take float32, bfloat16 and float16")
    elif call.adapter_dtype not in (call.dtype, torch.float32):
        reasons.append(
            f"lora_a and lora_b have {call.adapter_dtype}, the kernels take {call.dtype} or float32 beside such an x"
        )
    return reasons


def forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    x, a, b = _rows(x), _rows(a), _rows(b)
    (M, K), (N, R) = x.shape, b.shape
    h = x.new_empty(M, R) if save_h else None
    # all that can be done before the base GEMM: it leaves the caches cold, and Python takes ten times as long after it
    sizes = (torch.get_num_threads(), CODES[x.dtype], CODES[a.dtype], M, N, K, R)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    operands = (*_address(x), *_address(a), *_address(b), 0 if bias is None else bias.data_ptr())
    threshold, key = random.threshold(p), 0 if seed is None else seed.data_ptr()
    saved = _address(h)
    y = base_gemm(x, w)
    _C.forward(*sizes, *operands, y.data_ptr(), N, *saved, scale, threshold, key)
    return y, h


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dy, a, b = _rows(dy), _rows(a), _rows(b)
    x = _rows(x) if x is not None and need_da else None
    h = _rows(h) if h is not None and need_db else None
    (M, N), (R, K) = dy.shape, a.shape
    da = a.new_empty(R, K) if need_da else None
    db = b.new_empty(N, R) if need_db else None
    sizes = (torch.get_num_threads(), CODES[dy.dtype], CODES[a.dtype], M, N, K, R)
    operands = (*_address(dy), *_address(x), *_address(a), *_address(b), *_address(h))
    gradients = (*_address(da), *_address(db))
    threshold, key = random.threshold(p), 0 if seed is None else seed.data_ptr()
    dx = base_gemm(dy, w.t()) if need_dx else None
    _C.backward(*sizes, *operands, *_address(dx), *gradients, scale, threshold, key)
    return dx, da, db


def _rows(t: Tensor) -> Tensor:
    """t with unit last stride: itself, or a copy."""
    return t if t.stride(1) == 1 else t.contiguous()


def _address(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))
