"""The judge of one expert of a layer: a layer of its own over its own rows, whose dropout mask is a part of the mask of
all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core import dropout
from lora_kernels.testing.judge import Problem, Verdict, evaluate, judge


def reference_from(first: int) -> Callable[..., Tensor]:
    """Return the equation as `reference.lora_linear` has it, but row 0 of x has the mask of row `first`."""

    def reference(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float,
        bias: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        x_hat = x.to(lora_a.dtype)
        if seed is not None:
            keep = dropout.keep_mask(seed, first + x.shape[0], x.shape[1], dropout_p)[first:]
            x_hat = torch.where(keep, x_hat, 0.0) * dropout.rescale(dropout_p)
        return (F.linear(x, weight, bias) + scale * (x_hat @ lora_a.mT @ lora_b.mT)).to(x.dtype)

    return reference


def truth_from(q: Problem, first: int) -> dict[str, Tensor]:
    """Return y and every gradient in fp64 of an expert whose first row is row `first` of x."""
    return evaluate(q.to(torch.float64), reference_from(first))


def without_mask(q: Problem) -> Problem:
    """Return a problem without dropout whose terms are at least as large: the bounds of rounding are taken from it."""
    return replace(q, p=0.0, seed=None, scale=q.scale * (dropout.rescale(q.p) if q.p else 1.0))


def judge_expert(got: dict[str, Tensor], q: Problem, first: int) -> list[Verdict]:
    """Return a verdict on every result of an expert whose first row is row `first` of x."""
    return judge(got, without_mask(q), truth_from(q, first), evaluate(q, reference_from(first)))
