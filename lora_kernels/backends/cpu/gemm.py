"""The base GEMM on a CPU: torch's (MKL in fp32, oneDNN in bf16) or our own, whichever is faster for such a call.

Our own serves fp32, bf16 where the processor multiplies it (AVX512_BF16), and few rows of x in any dtype. A product of
few rows that is small as well is computed in the launch of the low-rank half. It takes a third of the time of torch's
GEMM there, because it has no call of its own.

For other products, which of the two is faster depends on the processor and the shape, so the first call of each class
times both on its own operands. Calls of one class have the same dtype and number of threads, a w that is a transposed
view in all (dx = dy w) or none, and an M and a size of w that lie between the same two of the bounds 2, 8, 32, 128, …
(2·4ⁱ). The choice holds for the life of the process, so results do not change from call to call. Under
``torch.use_deterministic_algorithms`` nothing is timed, and our own is taken where it serves the call. Then results
change neither from process to process nor with the number of threads.

oneDNN's fp32 GEMM is faster than MKL on AMD, but is not used here. It adds up in one chain what MKL and ours add up in
parts, and its error is up to 2.2 times as large (K = 4096), more than this project lets any back-end add to plain
torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import _C

DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""The dtypes of the kernels, and how `base_gemm_choices` names them."""

_ROUNDS = 3


class Race(NamedTuple):
    """Two GEMMs that take the same arguments, and what decides between them."""

    torch: Callable[..., Any]
    own: Callable[..., Any]
    margin: float
    """Our own is taken where its time is below this multiple of torch's in every round, so that noise does not
    decide."""


_choices: dict[tuple[str, int, bool, int, int], str] = {}
"""The choices of this process, "torch" or "own", by class of calls."""


def base_gemm(x: Tensor, w: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return x wᵀ [M, N], new and contiguous; or with `out` add it to `out`, and return that. Without `out` and for an
    x in 16 bits a bias may be given; x wᵀ + bias is then rounded once.

    The last stride of x [M, K] is 1; w [N, K] has any strides.
    """
    M, size, transposed = x.shape[0], w.numel(), w.stride()[1] != 1
    few = out is None and M <= _C.FEW_ROWS and not transposed
    if M and size and (few or _C.has_gemm(x.dtype)):
        return getattr(_RACE, chosen(_RACE, DTYPES[x.dtype], M, size, transposed, x, w))(x, w, out, bias)
    return _torch(x, w, out, bias)


def start(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """Return (y, in_launch). A bias may be given for an x in 16 bits only.

    Where `in_launch` is False, y [M, N] is x wᵀ + bias, rounded once. Where it is True, y is not yet written, and
    `_C.forward` computes that in its launch: for a small product, and for few rows of x where our own GEMM is chosen.
    """
    M, size, transposed = x.shape[0], w.numel(), w.stride()[1] != 1
    few = M <= _C.FEW_ROWS and not transposed
    if few and _C.is_small(M, *w.shape):
        return x.new_empty(M, w.shape[0]), True
    served = M and size and (few or _C.has_gemm(x.dtype))
    if not served or chosen(_RACE, DTYPES[x.dtype], M, size, transposed, x, w) == "torch":
        return F.linear(x, w, bias), False
    return (x.new_empty(M, w.shape[0]), True) if few else (own(x, w, bias=bias), False)


def is_small_backward(dy: Tensor, w: Tensor) -> bool:
    """Return whether `_C.backward` is to compute dy w together with the rest: it has few rows, and is small."""
    return w.stride()[1] == 1 and _C.is_small(dy.shape[0], *w.shape)


def own(x: Tensor, w: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return what `base_gemm` returns, from csrc/cpu/gemm.cpp; or x wᵀ + bias, for an x in 16 bits without `out`.

    x has a dtype of `_C.has_gemm`; or, without `out`, at most `_C.FEW_ROWS` rows beside a w whose last stride is 1.
    """
    y = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    _C.gemm(torch.get_num_threads(), x, w, y, out is not None, bias)
    return y


def _torch(x: Tensor, w: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w, bias) if out is None else out.addmm_(x, w.t())


_RACE = Race(_torch, own, 0.95)


def chosen(race: Race, kind: str, M: int, weights: int, transposed: bool, *operands: Any) -> str:
    """Return the name of the GEMM, "torch" or "own", for the class of calls that these operands belong to.

    The first call of a class times both on its operands, and "own" wins where its time is within the margin. Under
    ``torch.use_deterministic_algorithms`` it wins without timing.
    """
    if torch.are_deterministic_algorithms_enabled():
        return "own"
    key = (kind, torch.get_num_threads(), transposed, M.bit_length() // 2, weights.bit_length() // 2)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices.setdefault(key, _faster(race, *operands))  # where several threads time, the first one decides
    return choice


def base_gemm_choices() -> dict[str, str]:
    """Return the choices of this process so far: "torch" or "own", by a description of the class of calls."""
    return {
        f"{kind}, {threads} threads, {'w transposed' if transposed else 'w as stored'}, "
        f"M {4**m // 2 or 1}..{2 * 4**m - 1}, {4**n // 2 or 1}..{2 * 4**n - 1} weights": choice
        for (kind, threads, transposed, m, n), choice in sorted(_choices.items())
    }


def _faster(race: Race, *operands: Any) -> str:
    """Return "own" if its time is within the margin in every round, else "torch".

    Two GEMMs that are about equally fast differ by less than their times vary. The answer is then "torch", which a
    frozen layer uses too.
    """
    ratios = []
    for _ in range(_ROUNDS + 1):
        seconds = []
        for gemm in (race.torch, race.own):
            start = time.perf_counter()
            gemm(*operands)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return "own" if max(ratios[1:]) < race.margin else "torch"  # the first round warms up
