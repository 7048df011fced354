"""Pruning the moments of an optimiser: most of what it remembers of the gradients of a matrix becomes zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.models.targets import some
from lora_kernels.train import sharded

_MOMENTS = ("exp_avg", "momentum_buffer", "square_avg", "grad_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf")
"""The moments of torch's Adam, AdamW, NAdam, RAdam, Adamax, SGD and RMSprop, of which the first that there is decides
which elements go. Many other optimisers use these names."""
_OF_8_BITS = {"state1": ("qmap1", "absmax1"), "state2": ("qmap2", "absmax2")}
"""The moments of bitsandbytes, and beside codes of 8 bits the values of the codes and the largest value of a block."""
_BLOCKSIZE = 256
"""The elements that share a value of absmax."""


class Pruned(NamedTuple):
    """What pruning has done."""

    zeros: int
    """The elements of moments that are zero now."""
    moments: int
    """The elements of moments that were looked at; 0 where the optimiser has no state for these matrices yet."""


class Moment(NamedTuple):
    """One tensor of the optimiser's state."""

    values: Tensor
    """The moment, or its codes in 8 bits, in the shape of the matrix."""
    codes: Tensor | None = None
    """[256], the values of the codes."""
    absmax: Tensor | None = None
    """The factor of each block of 256 elements."""


def moments_of(optimizers: Sequence[Any], parameters: Mapping[nn.Parameter, str]) -> dict[nn.Parameter, list[Moment]]:
    """Return the moments that the optimisers have for each of the parameters, whose names are given, with the first
    moment first. A parameter that has no state yet, or whose state is in another process, has none.

    Raises ValueError for a trained parameter that no optimiser has, and for a state that is not known here, and
    TypeError for what is no optimiser.
    """
    if no_optimizers := [each for each in optimizers if not hasattr(each, "param_groups")]:
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or a list of them, got a {type(no_optimizers[0]).__name__}: "
            "nothing was changed"
        )
    states: dict[int, Mapping[str, Any]] = {}
    for optimizer in optimizers:
        # torch's ZeroRedundancyOptimizer has another optimiser inside, with the states of this process.
        state = getattr(optimizer, "optim", optimizer).state
        for group in optimizer.param_groups:
            for p in group["params"]:
                states[id(p)] = state.get(p, {})
    absent = [name for p, name in parameters.items() if p.requires_grad and id(p) not in states]
    if absent:
        raise ValueError(
            f"the optimiser does not have {some(absent)}, so their moments cannot be pruned: nothing was changed. It "
            "may hold copies of the parameters, as DeepSpeed's does, or have been made for other parameters"
        )
    found: dict[nn.Parameter, list[Moment]] = {}
    unknown = []
    order = [*_OF_8_BITS, *_MOMENTS]
    for p, name in parameters.items():
        moments = {}
        for key, value in states.get(id(p), {}).items():
            if key == "step" or not isinstance(value, Tensor) or key in sum(_OF_8_BITS.values(), ()):
                continue
            moment = _moment(key, value, p, states[id(p)])
            if moment is not None:
                moments[key] = moment
            elif value.numel() > 1:
                unknown.append(f"{key} (a {type(value).__name__} in {value.dtype}, {tuple(value.shape)}) of {name}")
        found[p] = [moments[key] for key in sorted(moments, key=order.index)]
    if unknown:
        raise ValueError(
            f"these states of the optimiser are not known here: {some(unknown)}. Nothing was changed. Prune them "
            f"yourself after restart(model), or take an optimiser whose moments are {', '.join(_MOMENTS)}"
        )
    return found


def check(fraction: float, how: str) -> None:
    """Raise ValueError where these are no way to prune."""
    if how not in ("magnitude", "random"):
        raise ValueError(
            f'how must be "magnitude" or "random", got {how!r}. What the authors\' code calls "reset" is '
            'how="random", prune=0.999; prune=1 makes all moments zero'
        )
    if not isinstance(fraction, Real) or not 0 <= fraction <= 1:
        raise ValueError(f"prune is a fraction from 0 to 1, got {fraction!r}")


def prune(moments: Sequence[Moment], fraction: float, how: str, generator: torch.Generator) -> Pruned:
    """Make the `fraction` of the elements of one matrix zero in all of its moments, in place, and return how many zeros
    these have.

    With "magnitude" they are the elements whose first moment is smallest: not above the quantile `fraction` of its
    absolute values. There are ⌊fraction · (n - 1)⌋ + 1 of n, and among equal ones the first go. With "random" each
    element is hit with probability `fraction`.

    All moments lose the same elements. If Adam kept m of an element and lost v, its next step would be lr·m/eps.
    """
    if not moments:
        return Pruned(0, 0)
    first = moments[0]
    if how == "magnitude":
        mask = smallest(_magnitudes(first), fraction)
    else:
        mask = torch.rand(first.values.shape, generator=generator) < fraction
    zeros = 0
    for moment in moments:
        values, zero = sharded.local(moment.values), _zero_of(moment)
        values.masked_fill_(sharded.like(mask.to(values.device), moment.values), zero)
        zeros += int((sharded.whole(moment.values) == zero).sum().item())
    return Pruned(zeros, mask.numel() * len(moments))


def smallest(magnitudes: Tensor, fraction: float) -> Tensor:
    """Return a mask of the elements that are not above the quantile `fraction`, of exactly ⌊fraction · (n - 1)⌋ + 1
    elements; of none for a fraction of 0, and of all for 1. Of equal elements the first are taken."""
    flat = magnitudes.flatten().nan_to_num(nan=math.inf, posinf=math.inf)  # NaN is equal to nothing
    n = flat.numel()
    # As a decimal number, because 0.29 * 100 is less than 29 in floating point.
    count = math.floor(Fraction(repr(float(fraction))) * (n - 1)) + 1 if 0 < fraction < 1 else round(fraction) * n
    if count in (0, n):
        return torch.full(magnitudes.shape, count > 0, device=flat.device)
    bound = flat.kthvalue(count).values
    mask = flat < bound
    equal = (flat == bound).nonzero().flatten()
    mask[equal[: count - int(mask.sum().item())]] = True
    return mask.view(magnitudes.shape)


def _moment(key: str, value: Tensor, p: nn.Parameter, state: Mapping[str, Any]) -> Moment | None:
    """Return the moment that the tensor `key` of the state of p is; None if it is none that is known."""
    if value.shape != p.shape or not sharded.is_plain(value):
        return None
    if value.dtype != torch.uint8:
        return Moment(value) if value.is_floating_point() and (key in _MOMENTS or key in _OF_8_BITS) else None
    codes, absmax = (state.get(name) for name in _OF_8_BITS.get(key, ("", "")))
    if codes is None or absmax is None or absmax.numel() != -(-value.numel() // _BLOCKSIZE):
        return None
    return Moment(value, codes, absmax) if bool((codes == 0).any()) else None


def _magnitudes(moment: Moment) -> Tensor:
    """Return the absolute values of the whole moment."""
    values = sharded.whole(moment.values)
    if moment.codes is None or moment.absmax is None:
        return values.abs()
    of_blocks = moment.absmax.repeat_interleave(_BLOCKSIZE)[: values.numel()].view(values.shape)
    return moment.codes[values.int()].abs() * of_blocks


def _zero_of(moment: Moment) -> int:
    """Return the number that stands for zero. Among bitsandbytes' codes it is not 0: that of a signed moment is 127,
    and code 0 is about -absmax."""
    return 0 if moment.codes is None else int((moment.codes == 0).nonzero()[0].item())
