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

from lora_kernels.core import dropout as random
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.quant.weight import QuantizedWeight

try:
    from lora_kernels import _C
    from lora_kernels.backends.cpu import gemm
    from lora_kernels.backends.cpu import quant as cpu_quant
    from lora_kernels.backends.cpu.gemm import CODES, base_gemm_choices
    from lora_kernels.backends.cpu.quant import quantized_gemm
except ImportError as error:
    raise ImportError(
        f"the native CPU kernels are not there ({error}): they are built when lora_kernels is installed, which takes a "
        "C++17 compiler and Python's headers (Debian: apt install g++ python3-dev), then: "
        "pip install --force-reinstall --no-deps lora_kernels"
    ) from error

__all__ = ["backward", "base_gemm", "base_gemm_choices", "forward", "keep_mask", "name", "why_not"]

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
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], save_h: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One pass over x for every h."""
    x, at = _rows(x)
    hs = [x.new_empty(x.shape[0], q.a.shape[0]) if save else None for q, save in zip(adapters, save_h, strict=True)]
    # all that can be done before the base GEMM: it leaves the caches cold, and Python takes ten times as long after it
    common = _common(x, adapters[0].a)
    parts = [_forward_branch(base.bias, q, h) for base, q, h in zip(bases, adapters, hs, strict=True)]
    ys, products = zip(*[_base(x, base.w) for base in bases], strict=True)
    calls = [(*before, *_fresh(y), *after) for (before, after, _), y in zip(parts, ys, strict=True)]
    _C.forward(*common, *at, calls, products)
    return list(ys), hs


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter],
    hs: Sequence[Tensor | None],
    needs: Needs,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """One dx for all, each base GEMM added to it, and one pass over x and dx for the rest."""
    placed = [_rows(dy) for dy in dys]
    x, at_x = _rows(x) if x is not None and any(needs.da) else _NOTHING
    das = [q.a.new_empty(q.a.shape) if need else None for q, need in zip(adapters, needs.da, strict=True)]
    dbs = [q.b.new_empty(q.b.shape) if need else None for q, need in zip(adapters, needs.db, strict=True)]
    common = _common(placed[0][0], adapters[0].a)
    parts = [
        _backward_branch(at_dy, q, h, da, db)
        for (_, at_dy), q, h, da, db in zip(placed, adapters, hs, das, dbs, strict=True)
    ]
    dx: Tensor | None = None
    if needs.dx:
        for (dy, _), base in zip(placed, bases, strict=True):
            if isinstance(base.w, QuantizedWeight):
                part = quantized_gemm(dy, base.w, transposed=True)
                dx = part if dx is None else dx.add_(part)
            else:
                dx = gemm.base_gemm(dy, base.w.t(), dx)
    _C.backward(*common, *at_x, *_fresh(dx), [branch for branch, _ in parts])
    return dx, das, dbs


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """By the backward kernel: with dx = 0, a = 1 and g = 1 it writes c·keep."""
    (M, K), N = x.shape, 8
    dy, w, a, b = x.new_ones(M, N), x.new_zeros(N, K), x.new_ones(1, K), x.new_ones(N, 1)
    dx, _, _ = backward([dy], None, [Base(w)], [Adapter(a, b, 1 / N, p, seed)], [None], Needs(True, (False,), (False,)))
    assert dx is not None
    return dx.sign_()


def base_gemm(x: Tensor, w: Tensor) -> Tensor:
    return gemm.base_gemm(_rows(x)[0], w)


def _base(x: Tensor, w: Tensor | QuantizedWeight) -> tuple[Tensor, tuple[int, ...] | None]:
    """(y, what _C.forward needs to write x wᵀ to it), or (x wᵀ, None)."""
    few = cpu_quant.few_rows(x, w) if isinstance(w, QuantizedWeight) else gemm.few_rows(x, w)
    if few is not None:
        return x.new_empty(x.shape[0], w.shape[0]), few
    return (quantized_gemm(x, w) if isinstance(w, QuantizedWeight) else gemm.base_gemm(x, w)), None


def _common(rows: Tensor, a: Tensor) -> tuple[int, int, int, int, int]:
    return torch.get_num_threads(), CODES[rows.dtype], CODES[a.dtype], rows.shape[0], a.shape[1]


def _forward_branch(
    bias: Tensor | None, adapter: Adapter, h: Tensor | None
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[Tensor | None, ...]]:
    """(what _C.forward takes of a branch before y, and after it, and the tensors that must live until then)."""
    a, b, scale, p, seed = adapter
    a, at_a = _rows(a)
    b, at_b = _rows(b)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    before = (*b.shape, *at_a, *at_b, 0 if bias is None else bias.data_ptr())
    return before, (*_fresh(h), *_dropped(scale, p, seed)), (a, b, bias)


def _backward_branch(
    at_dy: Sequence[int], adapter: Adapter, h: Tensor | None, da: Tensor | None, db: Tensor | None
) -> tuple[tuple[float, ...], tuple[Tensor | None, ...]]:
    """(what _C.backward takes of a branch, and the tensors that must live until then)."""
    a, b, scale, p, seed = adapter
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
