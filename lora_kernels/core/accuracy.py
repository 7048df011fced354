"""How far from the truth the results of kernels may be, measured by plain torch in the same dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATIO = 1.25
"""The largest ratio of the RMS errors of a result and of plain torch, where both are known from many roundings."""


class Errors(NamedTuple):
    """The errors of a result, and what is allowed."""

    rms: float
    rms_allowed: float
    worst: float
    worst_allowed: float

    @property
    def fault(self) -> str | None:
        """A phrase that says what is wrong, or None."""
        if not self.rms <= self.rms_allowed:
            return f"RMS error {self.rms:.3g}, allowed {self.rms_allowed:.3g}"
        if not self.worst <= self.worst_allowed:
            return f"largest error {self.worst:.3g}, allowed {self.worst_allowed:.3g}"
        return None


def errors_beside(value: Tensor, exact: Tensor, plain: Tensor) -> Errors:
    """Return the errors of `value` beside those of `plain`, the result of plain torch in the same dtypes. `exact` is
    the truth in fp64.

    The RMS error may be at most `RATIO` times that of plain torch. The largest error may be at most twice its largest
    plus eps times the largest value. A result needs about a thousand independent roundings for this to say something.
    """
    error, allowed = (value.double() - exact).abs(), (plain.double() - exact).abs()
    eps = torch.finfo(plain.dtype).eps
    worst_allowed = 2 * allowed.max().item() + eps * exact.abs().max().item()
    return Errors(rms(error), RATIO * rms(allowed), error.max().item(), worst_allowed)


def rms(t: Tensor) -> float:
    """Return the root of the mean square."""
    return t.square().mean().sqrt().item()
