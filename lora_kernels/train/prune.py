"""Pruning the moments of an optimiser: most of what it remembers of the gradients of a matrix becomes zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.models.targets import some
from lora_kernels.train import sharded

_MOMENTS = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg")
)
"""The moments of torch's Adam, AdamW, NAdam, RAdam, Adamax, SGD and RMSprop. Many other optimisers use these names."""
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


def moments_of(optimizers: Iterable[Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, list[Moment]]:
    """Return the moments that the optimisers have for each of the named parameters. A parameter that has no state yet,
    or whose state is in another process, has none.

    Raises ValueError for a trained parameter that no optimiser has, and for a state that is not known here.
    """
    states: dict[int, Mapping[str, Any]] = {}
    for optimizer in optimizers:
        optimizer = getattr(optimizer, "optim", optimizer)  # torch's ZeroRedundancyOptimizer has it inside
        for group in optimizer.param_groups:
            for p in group["params"]:
                states[id(p)] = optimizer.state.get(p, {})
    absent = [name for name, p in parameters.items() if p.requires_grad and id(p) not in states]
    if absent:
        raise ValueError(
            f"the optimiser does not have {some(absent)}, so their moments cannot be pruned: nothing was changed. It "
            "may hold copies of the parameters, as DeepSpeed's does, or have been made for other parameters"
        )
    found: dict[str, list[Moment]] = {}
    unknown = []
    for name, p in parameters.items():
        found[name] = []
        for key, value in states.get(id(p), {}).items():
            if key == "step" or (not isinstance(value, Tensor)) or key in sum(_OF_8_BITS.values(), ()):
                continue
            moment = _moment(key, value, p, states[id(p)])
            if moment is not None:
                found[name].append(moment)
            elif value.numel() > 1:
                unknown.append(f"{key} (a {type(value).__name__} in {value.dtype}, {tuple(value.shape)}) of {name}")
    if unknown:
        raise ValueError(
            f"these states of the optimiser are not known here: {some(unknown)}. Nothing was changed. Prune them "
            f"yourself after restart(model), or take an optimiser whose moments are {', '.join(sorted(_MOMENTS))}"
        )
    return found


def check(fraction: float, how: str) -> None:
    """Raise ValueError where these are no way to prune."""
    if how not in ("magnitude", "random"):
        raise ValueError(
            f'how must be "magnitude" or "random", got {how!r}. What the authors\' code calls "reset" is '
            'how="random", prune=0.999; prune=1 makes all moments zero'
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"prune is a fraction from 0 to 1, got {fraction}")


def prune(moments: Sequence[Moment], fraction: float, how: str, generator: torch.Generator) -> Pruned:
    """Make the `fraction` of each of the moments of one matrix zero, in place, and return how many zeros they have.

    With "magnitude" these are its smallest elements, in each moment on its own: those not above the quantile `fraction`
    of their absolute values, of which there are ⌊fraction · (n - 1)⌋ + 1 of n. Among equal ones the first go. With
    "random" each element of the matrix is hit with probability `fraction`, in all moments together.
    """
    zeros = total = 0
    drawn: Tensor | None = None
    for moment in moments:
        shape = moment.values.shape
        if how == "magnitude":
            mask = smallest(_magnitudes(moment), fraction)
        else:
            if drawn is None:
                drawn = torch.rand(shape, generator=generator) < fraction
            mask = drawn
        mask = mask.to(moment.values.device)
        sharded.local(moment.values).masked_fill_(sharded.like(mask, moment.values), _zero_of(moment))
        zeros += int((sharded.whole(moment.values) == _zero_of(moment)).sum().item())
        total += math.prod(shape)
    return Pruned(zeros, total)


def smallest(magnitudes: Tensor, fraction: float) -> Tensor:
    """Return a mask of the elements that are not above the quantile `fraction`, of exactly ⌊fraction · (n - 1)⌋ + 1
    elements; of none for a fraction of 0, and of all for 1. Of equal elements the first are taken."""
    flat = magnitudes.flatten()
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
