"""The CPU back-end. The low-rank half and its dropout are in csrc/cpu; the base GEMM is torch's or that of csrc/cpu.

    h = c·(keep ⊙ x) aᵀ          y = x wᵀ + bias, then y += s · h bᵀ in place
    g = s · dy b                 dx = dy w, then dx += c · keep ⊙ (g a) in place
    da = c · gᵀ(keep ⊙ x)        db = s · dyᵀ h

The native kernels sum in fp32 whatever the dtype, in an order that depends on the shape alone. So results change
neither from run to run nor with the number of threads. h and g stay in fp32 between their two products, with one
exception: where x, a and b are bf16 and the processor multiplies bf16 (AVX512_BF16), h and g are rounded to bf16 as
plain torch rounds them, and subnormals count as zero as in torch's own GEMM. The keep bits come from Philox inside the
pass over x; no mask and no x̂ exist. Where x has few rows, x wᵀ is part of the same launch, and so is dy w where it
is small. For many rows the base products are part of it where that is faster (`launch`), and then y and dx need no
second pass. Nothing of size M×N or M×K is allocated beyond the results.

In 16 bits the bias is added before x wᵀ is rounded, since the sum may fit where x wᵀ alone overflows. In fp32 it is
added with s · h bᵀ, which saves torch's GEMM a pass over y.

Many adapters over the rows of one x are in `multi`, and the experts of a layer in `experts`, with the same kernels.

The kernels read operands with a stride between rows. An x, dy, a, b or h whose last stride is not 1 (a transposed view)
is copied first; w may have any strides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.backends.cpu import openmp
from lora_kernels.core import built
from lora_kernels.core.operands import (
    Adapter,
    Base,
    Call,
    Gradients,
    MaybeTensors,
    Needs,
    Results,
    Tensors,
)
from lora_kernels.quant.weight import QuantizedWeight

try:
    openmp.provide()
    from lora_kernels import _C
    from lora_kernels.backends.cpu import gemm, launch, quant
    from lora_kernels.backends.cpu.around import add_low_rank, low_rank_backward
    from lora_kernels.backends.cpu.experts import backward_experts, forward_experts
    from lora_kernels.backends.cpu.gemm import base_gemm_choices
    from lora_kernels.backends.cpu.multi import add_multi, backward_multi, forward_multi
    from lora_kernels.backends.cpu.paths import told
except (ImportError, OSError) as error:
    raise ImportError(
        f"the native CPU kernels are missing ({error}; {built.why_missing('_C')}). Their build needs {built.COMPILER}, "
        f"then: {built.reinstall()}"
    ) from error
except (AttributeError, TypeError, ValueError) as error:
    raise ImportError(
        f"the native CPU kernels were built from another version of this package ({error}): {built.reinstall()}"
    ) from error

__all__ = [
    "add_low_rank",
    "add_multi",
    "backward",
    "backward_experts",
    "backward_multi",
    "base_gemm",
    "base_gemm_choices",
    "forward",
    "forward_experts",
    "forward_multi",
    "keep_mask",
    "low_rank_backward",
    "name",
    "told",
    "why_not",
]

name = "cpu"


def why_not(call: Call) -> list[str]:
    """Return every reason why the kernels cannot serve the call."""
    reasons = []
    if call.device.type != "cpu":
        reasons.append(f"the tensors are on {call.device}, the kernels run on a CPU")
    if call.dtype not in gemm.DTYPES:
        reasons.append(f"x has {call.dtype}, the kernels take float32, bfloat16 and float16")
    elif call.adapter_dtype not in (call.dtype, torch.float32):
        reasons.append(
            f"lora_a and lora_b have {call.adapter_dtype}, the kernels take {call.dtype} or float32 beside such an x"
        )
    return reasons


def forward(
    x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], save_h: Sequence[bool], whole: bool | None = None
) -> Results:
    """Return (ys, hs). One pass over x computes every h. `whole` says whether the launch computes base products of
    many rows; None leaves that to `launch`."""
    if x.stride()[1] != 1:  # the base GEMM and the kernel share one copy
        x = x.contiguous()
    if whole is None and x.shape[0] > _C.FEW_ROWS:
        again = functools.partial(_forward, x, bases, adapters, save_h)
        whole = launch.has_bases("forward", x, bases, adapters, again)
    hs: list[Tensor | None] = []
    for (a, *_), save in zip(adapters, save_h, strict=True):
        hs.append(a.new_empty(x.shape[0], a.shape[0]) if save else None)
    ys, rest, in_launch = [], [], []
    bias_first = x.dtype != torch.float32
    for base in bases:
        w, bias = base
        if not bias_first:
            bias = None
        if whole:
            y, launched = x.new_empty(x.shape[0], w.shape[0]), True
        elif isinstance(w, QuantizedWeight):
            y, launched = quant.start(x, w, bias, many=True)
        else:
            y, launched = gemm.start(x, w, bias)
        ys.append(y)
        rest.append(base if launched or bias is None else Base(w))
        in_launch.append(launched)
    _C.forward(torch.get_num_threads(), x, rest, adapters, ys, hs, in_launch)
    return ys, hs


def backward(
    dys: Tensors,
    x: Tensor | None,
    bases: Sequence[Base],
    adapters: Sequence[Adapter],
    hs: MaybeTensors,
    needs: Needs,
    whole: bool | None = None,
) -> Gradients:
    """Return (dx, das, dbs). Every base GEMM adds to the same dx, those of the launch after the others, and one pass
    over x and dx does the rest. `whole` is that of `forward`: dx then needs no pass."""
    das: list[Tensor | None] = []
    dbs: list[Tensor | None] = []
    for (a, b, *_), need_da, need_db in zip(adapters, needs.da, needs.db, strict=True):
        (R, K), N = a.shape, b.shape[0]  # new_empty(R, K) takes a third less time than new_empty(a.shape)
        das.append(a.new_empty(R, K) if need_da else None)
        dbs.append(b.new_empty(N, R) if need_db else None)
    rows = []
    for dy in dys:
        rows.append(dy if dy.stride()[1] == 1 else dy.contiguous())  # the base GEMM and the kernel share one copy
    if whole is None and needs.dx and rows[0].shape[0] > _C.FEW_ROWS:
        again = functools.partial(_backward, rows, x, bases, adapters, hs, needs)
        whole = launch.has_bases("backward", rows[0], bases, adapters, again)
    in_launch = []
    dx: Tensor | None = None
    for dy, (w, _) in zip(rows, bases, strict=True):
        launched = whole or (needs.dx and not isinstance(w, QuantizedWeight) and gemm.is_small_backward(dy, w))
        in_launch.append(bool(launched))
        if not needs.dx or launched:
            continue
        if isinstance(w, QuantizedWeight):
            part = quant.quantized_gemm(dy, w, transposed=True)
            dx = part if dx is None else dx.add_(part)
        else:
            dx = gemm.base_gemm(dy, w.t(), dx)
    if needs.dx and dx is None:
        dx = rows[0].new_empty(rows[0].shape[0], bases[0].w.shape[1])
    _C.backward(torch.get_num_threads(), rows, x, bases, adapters, hs, dx, das, dbs, in_launch)
    return dx, das, dbs


_forward, _backward = forward, backward  # what a race repeats is no call of this module's forward to an observer of it


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return the dropout mask of x [M, K] as numbers 0 and 1, in x's dtype."""
    mask = x.new_empty(x.shape)
    _C.keep_mask(torch.get_num_threads(), p, seed, mask)
    return mask


def base_gemm(x: Tensor, w: Tensor | QuantizedWeight, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """Return x wᵀ + bias [M, N], or x w [M, K] where `transposed`, for a dense w of any strides or a quantised one. A
    bias may be given for an x in 16 bits only."""
    if x.stride()[1] != 1:
        x = x.contiguous()
    if isinstance(w, QuantizedWeight):
        return quant.quantized_gemm(x, w, transposed, bias)
    return gemm.base_gemm(x, w.t() if transposed else w, bias=bias)
