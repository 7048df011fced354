"""The base GEMM on a CPU: torch's (MKL in fp32, oneDNN in bf16) or our own, whichever is faster here for such a call.

Ours takes fp32 operands, bf16 where the processor multiplies it (AVX512_BF16), and of any dtype few rows of x. Which
one wins depends on the processor and the shape, so the first call of each class times both on its own operands. A class
is the dtype, the number of threads, whether w is a transposed view (dx = dy w), and the powers of four that M and the
size of w lie between. The choice holds for the life of the process: results do not change from call to call. Under
``torch.use_deterministic_algorithms`` nothing is timed and ours is taken: they do not change from process to process
either, nor with the number of threads.

oneDNN's fp32 GEMM, which beats MKL on AMD, is not among them: it sums in one chain what MKL and ours sum in parts, and
its error is up to 2.2 times as large (K = 4096), more than this project lets any back-end add to plain torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import _C

CODES = {torch.float32: _C.F32, torch.bfloat16: _C.BF16, torch.float16: _C.F16}

_ROUNDS = 3
_MARGIN = 0.95
"""Ours is taken where its time is below this part of torch's, in each of the rounds: noise should not decide."""

Gemms = dict[str, Callable[..., Any]]
Key = tuple[str, int, bool, int, int]
_choices: dict[Key, str] = {}


def base_gemm(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x wᵀ [M,N], fresh and contiguous, or added to `out`; x [M,K] with unit last stride, w [N,K] of any strides."""
    served = w.numel() and x.shape[0] and (has_own(x.dtype) or (out is None and _C.gemm_few(x.shape[0], w.stride(1))))
    return _GEMMS[_choice(x, w)](x, w, out) if served else _torch(x, w, out)


def few_rows(x: Tensor, w: Tensor) -> tuple[int, int] | None:
    """What `_C.forward` takes to compute x wᵀ itself, in the launch that does the rest: where x has few rows, w's own
    lie along K, and our GEMM is the faster."""
    M = x.shape[0]
    served = M and w.numel() and _C.gemm_few(M, w.stride(1)) and _choice(x, w) == "own"
    return (w.data_ptr(), w.stride(0)) if served else None


def _choice(x: Tensor, w: Tensor) -> str:
    return chosen(_GEMMS, _MARGIN, KINDS[x.dtype], x.shape[0], w.numel(), w.stride(1) != 1, x, w)


def has_own(dtype: torch.dtype) -> bool:
    """Whether our own GEMM takes any number of rows of this dtype: fp32, and bf16 where the processor multiplies it."""
    return _C.gemm_of(CODES[dtype])


def chosen(gemms: Gemms, margin: float, kind: str, M: int, weights: int, transposed: bool, *operands: Any) -> str:
    """Which of `gemms` serves the class of calls that these `operands` belong to: timed on them the first time, and
    "own" where it takes less than `margin` of the other's time, or where the clock must not decide."""
    if torch.are_deterministic_algorithms_enabled():
        return "own"
    key = (kind, torch.get_num_threads(), transposed, M.bit_length() // 2, weights.bit_length() // 2)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices.setdefault(key, _faster(gemms, margin, *operands))  # of several threads, the first one's
    return choice


def base_gemm_choices() -> dict[str, str]:
    """What this process has settled on so far: a description of the class of calls, and "torch" or "own"."""
    return {
        f"{kind}, {threads} threads, {'w transposed' if transposed else 'w as stored'}, "
        f"M {4**m // 2 or 1}..{2 * 4**m - 1}, {4**n // 2 or 1}..{2 * 4**n - 1} weights": choice
        for (kind, threads, transposed, m, n), choice in sorted(_choices.items())
    }


def own(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """csrc/cpu/gemm.cpp; x of a dtype that it has, or few rows of any and w's own along K (then without `out`)."""
    M, N, K = x.shape[0], *w.shape
    y = x.new_empty(M, N) if out is None else out
    operands = (x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), w.stride(1))
    _C.gemm(torch.get_num_threads(), CODES[x.dtype], M, N, K, *operands, y.data_ptr(), N, out is not None)
    return y


def _torch(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    return F.linear(x, w) if out is None else out.addmm_(x, w.t())


_GEMMS: Gemms = {"torch": _torch, "own": own}
KINDS = {dtype: str(dtype).removeprefix("torch.") for dtype in CODES}


def _faster(gemms: Gemms, margin: float, *operands: Any) -> str:
    """Ours, if it takes less than `margin` of the other's time in every round. Where the two are near each other, their
    times come and go by more than they differ; then torch's, which is what a frozen layer takes."""
    ratios = []
    for _ in range(_ROUNDS + 1):
        seconds = {}
        for name, gemm in gemms.items():
            start = time.perf_counter()
            gemm(*operands)
            seconds[name] = time.perf_counter() - start
        ratios.append(seconds["own"] / seconds["torch"])
    return "own" if max(ratios[1:]) < margin else "torch"  # the first round warms up
