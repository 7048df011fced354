"""What decides whether the results of the random calls of embeddings and convolutions are right: the truth in fp64, and
beside it the same equation over absolute values, whose results are the sums of the terms' magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.fuzz_calls import Results, compare
from benchmarks.fuzz_draw import Draw

Equation = Callable[[Mapping[str, Tensor], float], Tensor]
"""A function of the operands by name, and of -1. With absolute operands it gets 1, and every term is added."""


def evaluate(equation: Equation, operands: Mapping[str, Tensor], dy: Tensor, sign: float) -> Results:
    """Return y of an equation in fp64, and the gradient of every operand."""
    own = {name: t.detach().double().requires_grad_() for name, t in operands.items()}
    y = equation(own, sign)
    grads = torch.autograd.grad(y, list(own.values()), dy.double(), allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(own, grads, strict=True)}


def truth(equation: Equation, operands: Mapping[str, Tensor], dy: Tensor) -> tuple[Results, Results]:
    """Return the results of an equation in fp64, and the sums of their terms' magnitudes."""
    absolute = {name: t.detach().double().abs() for name, t in operands.items()}
    return evaluate(equation, operands, dy, -1.0), evaluate(equation, absolute, dy.double().abs(), 1.0)


def faults(
    draw: Draw, got: Results, want: Results, magnitude: Results, dtypes: Mapping[str, torch.dtype], terms: int
) -> list[str]:
    """Return the faults of results whose sums have at most `terms` terms. A result of 16 bits may be rounded eight
    times on its way, one whose dtype in `dtypes` is wider only in that one."""
    found = []
    for name, value in got.items():
        unit, own = (
            torch.finfo(each).eps / 2 for each in (torch.promote_types(dtypes[name], torch.float32), dtypes[name])
        )
        relative = terms * unit + (8 * own if own > unit else 0.0)
        bound = relative * magnitude[name] + own * want[name].abs() + torch.finfo(dtypes[name]).smallest_normal
        if name == "dm":  # its norm is never exact
            bound += 8 * unit * magnitude[name]
            fault = (value.double() - want[name]).abs() > bound
            found += [f"dm is off in {int(fault.sum())} elements"] if fault.any() else []
        else:
            found += compare(draw, name, value, want[name], bound)
    return found
