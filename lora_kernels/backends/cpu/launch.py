"""Whether one launch computes the base products of many rows together with the low-rank half.

In such a launch a thread adds s · h bᵀ to a part of y, or c · keep ⊙ (g a) to a part of dx, as soon as its own GEMM has
that part complete and in a cache. Otherwise the base product comes first, from torch or from our own GEMM, and the
low-rank half reads and writes the whole result once more. The bits are those of our own GEMM followed by that.

The first call of each class times both, with the whole of the low-rank half, as `gemm` does for the products alone. So
the launch is also taken where torch's GEMM is the faster of the two, but by less than a pass over the result takes.
Where both ways take the same time it is the launch, because it leaves more of the caches to the rest of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lora_kernels import _C
from lora_kernels.backends.cpu import quant
from lora_kernels.backends.cpu.gemm import DTYPES, Race, chosen
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.quant.weight import QuantizedWeight


def has_bases(
    name: str, x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter], run: Callable[..., Any]
) -> bool:
    """Return whether the launch of the call `name`, "forward" or "backward", computes all its base products.

    `x` has the many rows that the products read: x, or the first dy. `run` computes the call, and is told which of the
    two ways to go. Quantised weights keep the choice of their GEMM, which counts memory too; a forward makes it for
    each of them in `quant.start`.
    """
    if not _C.has_gemm(x.dtype):
        return False
    M, backward, size, strided = x.shape[0], name == "backward", 0, False
    for w, _ in bases:
        if isinstance(w, QuantizedWeight):
            return backward and _from_codes(x, bases)
        if w.dtype != x.dtype or not w.numel():
            return False
        size += w.numel()
        strided |= w.stride()[1] != 1
    kind = f"{DTYPES[x.dtype]} {name}" + (" with dropout" if any(adapter.p for adapter in adapters) else "")
    return chosen(_RACE, kind, M, size, strided != backward, run) == "own"


def _from_codes(dy: Tensor, bases: Sequence[Base]) -> bool:
    """Return whether our own GEMM is chosen for dy W of a quantised W. Several add up to one dx in passes of torch."""
    w = bases[0].w
    if len(bases) != 1 or not isinstance(w, QuantizedWeight):
        return False
    return quant.own_is_chosen(dy, w, True, dy.new_empty(dy.shape[0], w.shape[1]))


_RACE = Race(lambda run: run(whole=False), lambda run: run(whole=True), 1.03)
