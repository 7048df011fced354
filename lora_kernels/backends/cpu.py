"""The CPU back-end: the low-rank half and its dropout in csrc/cpu; the base GEMM from torch or csrc/cpu too.

    h = c·(keep ⊙ x) aᵀ          y = x wᵀ, then y += s · h bᵀ + bias in place
    g = s · dy b                 dx = dy w, then dx += c · keep ⊙ (g a) in place
    da = c · gᵀ(keep ⊙ x)        db = s · dyᵀ h

The native kernels sum in fp32 whatever the dtype, in an order that depends on the shape alone: results change neither
from run to run nor with the number of threads. They keep h and g in fp32 between their two halves, except where
everything is bf16 and the processor multiplies it natively (AVX512_BF16): there h and g are rounded to bf16 as plain
torch rounds them, and subnormals count as zero as in its own GEMM. The keep bits come from Philox inside the pass over
x; no mask and no x̂ exist. Where x has few rows, x wᵀ is part of the same launch. Nothing of size M×N or M×K is
allocated beyond the results.

Operands are addressed by row stride. One whose last stride is not 1 (a transposed view of x, dy, a, b or h) is copied
first; w may have any strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import random
from lora_kernels.backends import Branch, Call
from lora_kernels.quant import QuantizedWeight

try:
    from lora_kernels import _C
    from lora_kernels.backends import cpu_gemm, cpu_quant
    from lora_kernels.backends.cpu_gemm import CODES, base_gemm, base_gemm_choices
    from lora_kernels.backends.cpu_quant import quantized_gemm
except ImportError as error:
    raise ImportError(
        f"the native CPU kernels are not there ({error}): they are built when lora_kernels is installed, which takes a "
        "C++17 compiler and Python's headers (Debian: apt install g++ python3-dev), then: "
        "pip install --force-reinstall --no-deps lora_kernels"
    ) from error

__all__ = ["backward", "backward_group", "base_gemm_choices", "forward", "forward_group", "name", "why_not"]

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
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    x, at = _rows(x)
    h = x.new_empty(x.shape[0], a.shape[0]) if save_h else None
    # all that can be done before the base GEMM: it leaves the caches cold, and Python takes ten times as long after it
    common = _common(x, a)
    before, after, _kept = _forward_branch(a, b, bias, h, scale, p, seed)
    y, base = _base(x, w)
    _C.forward(*common, *at, [(*before, *_fresh(y), *after)], [base])
    return y, h


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | QuantizedWeight,
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
    dy, at_dy = _rows(dy)
    x, at_x = _rows(x) if x is not None and need_da else _NOTHING
    da, db = a.new_empty(a.shape) if need_da else None, b.new_empty(b.shape) if need_db else None
    common = _common(dy, a)
    branch, _kept = _backward_branch(at_dy, a, b, h, da, db, scale, p, seed)
    dx = None
    if need_dx:
        dx = quantized_gemm(dy, w, transposed=True) if isinstance(w, QuantizedWeight) else base_gemm(dy, w.t())
    _C.backward(*common, *at_x, *_fresh(dx), [branch])
    return dx, da, db


def forward_group(
    x: Tensor, branches: Sequence[Branch], save_h: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One pass over x for every h."""
    x, at = _rows(x)
    hs = [x.new_empty(x.shape[0], q.a.shape[0]) if save else None for q, save in zip(branches, save_h, strict=True)]
    parts = [_forward_branch(q.a, q.b, q.bias, h, q.scale, q.p, q.seed) for q, h in zip(branches, hs, strict=True)]
    ys, bases = zip(*[_base(x, q.w) for q in branches], strict=True)
    calls = [(*before, *_fresh(y), *after) for (before, after, _), y in zip(parts, ys, strict=True)]
    _C.forward(*_common(x, branches[0].a), *at, calls, bases)
    return list(ys), hs


def backward_group(
    dys: Sequence[Tensor],
    x: Tensor | None,
    branches: Sequence[Branch],
    hs: Sequence[Tensor | None],
    need_dx: bool,
    need_da: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """One dx for all, each base GEMM added to it, and one pass over x and dx for the rest."""
    placed = [_rows(dy) for dy in dys]
    dys = [dy for dy, _ in placed]
    x, at_x = _rows(x) if x is not None and any(need_da) else _NOTHING
    das = [q.a.new_empty(q.a.shape) if need else None for q, need in zip(branches, need_da, strict=True)]
    dbs = [q.b.new_empty(q.b.shape) if need else None for q, need in zip(branches, need_db, strict=True)]
    parts = [
        _backward_branch(at_dy, q.a, q.b, h, da, db, q.scale, q.p, q.seed)
        for (_, at_dy), q, h, da, db in zip(placed, branches, hs, das, dbs, strict=True)
    ]
    dx = None
    if need_dx:
        for dy, q in zip(dys, branches, strict=True):
            dx = base_gemm(dy, q.w.t(), dx)
    _C.backward(*_common(dys[0], branches[0].a), *at_x, *_fresh(dx), [branch for branch, _ in parts])
    return dx, das, dbs


def _base(x: Tensor, w: Tensor | QuantizedWeight) -> tuple[Tensor, tuple[int, ...] | None]:
    """(y, what _C.forward needs to write x wᵀ to it), or (x wᵀ, None)."""
    few = cpu_quant.few_rows(x, w) if isinstance(w, QuantizedWeight) else cpu_gemm.few_rows(x, w)
    if few is not None:
        return x.new_empty(x.shape[0], w.shape[0]), few
    return (quantized_gemm(x, w) if isinstance(w, QuantizedWeight) else base_gemm(x, w)), None


def _common(rows: Tensor, a: Tensor) -> tuple[int, int, int, int, int]:
    return torch.get_num_threads(), CODES[rows.dtype], CODES[a.dtype], rows.shape[0], a.shape[1]


def _forward_branch(
    a: Tensor, b: Tensor, bias: Tensor | None, h: Tensor | None, scale: float, p: float, seed: Tensor | None
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[Tensor | None, ...]]:
    """(what _C.forward takes of a branch before y, and after it, and the tensors that must live until then)."""
    a, at_a = _rows(a)
    b, at_b = _rows(b)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    before = (*b.shape, *at_a, *at_b, 0 if bias is None else bias.data_ptr())
    return before, (*_fresh(h), *_dropped(scale, p, seed)), (a, b, bias)


def _backward_branch(
    at_dy: Sequence[int],
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[tuple[float, ...], tuple[Tensor | None, ...]]:
    """(what _C.backward takes of a branch, and the tensors that must live until then)."""
    a, at_a = _rows(a)
    b, at_b = _rows(b)
    h, at_h = _rows(h) if h is not None and db is not None else _NOTHING
    places = (*at_dy, *at_a, *at_b, *at_h, *_fresh(da), *_fresh(db))
    return (*b.shape, *places, *_dropped(scale, p, seed)), (a, b, h)


def _dropped(scale: float, p: float, seed: Tensor | None) -> tuple[float, int, int]:
    return (scale, 0, 0) if seed is None else (scale, random.threshold(p), seed.data_ptr())


_NOTHING = None, (0, 0)


def _rows(t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(t with unit last stride, itself or a copy; its address and its row stride)."""
    row, column = t.stride()
    if column != 1:
        t = t.contiguous()
        row = t.stride(0)
    return t, (t.data_ptr(), row)


def _fresh(t: Tensor | None) -> tuple[int, int]:
    """The address and the row stride of what is allocated here, contiguous."""
    return (0, 0) if t is None else (t.data_ptr(), t.shape[1])
