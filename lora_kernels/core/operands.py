"""The operands of a call, as everything between the public functions and the kernels passes them on.

    y = x Wᵀ + bias + s · h Bᵀ,  h = x̂ Aᵀ,  x̂ = dropout(x, p)

A call computes one or several such products that read one x: `Base` i and `Adapter` i give y i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant.weight import QuantizedWeight


class Layer(NamedTuple):
    """One layer as the caller gives it: what `lora_linear` takes besides x. Nothing in it is checked yet."""

    weight: Tensor | QuantizedWeight
    """W [N, K]. `lora_linear_group` takes a dense one only."""
    lora_a: Tensor
    """A [R, K]."""
    lora_b: Tensor
    """B [N, R]."""
    scale: float | Tensor
    """s, a number or a tensor of one element."""
    bias: Tensor | None = None
    """[N]."""
    dropout_p: float = 0.0
    """The probability with which dropout zeroes an element of x."""
    seed: Tensor | int | None = None
    """The seed of the dropout mask. Where it is None, one is drawn from torch's generator."""


class Base(NamedTuple):
    """The frozen half of a layer: W [N, K], dense or quantised, and its bias [N]."""

    w: Tensor | QuantizedWeight
    bias: Tensor | None = None


class Adapter(NamedTuple):
    """The trained half of a layer: A [R, K], B [N, R] and what applies them."""

    a: Tensor
    b: Tensor
    scale: float
    """s."""
    p: float = 0.0
    """The probability with which dropout zeroes an element of x."""
    seed: Tensor | None = None
    """The seed of the dropout mask: int64, one element, on x's device. None where p is 0."""


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    dx: bool
    da: tuple[bool, ...]
    """One for each adapter."""
    db: tuple[bool, ...]
    """One for each adapter."""


class Call(NamedTuple):
    """What a back-end must know of a call to say whether it can serve it. It is hashable, so that the choice is made
    once for each kind of call."""

    op: str
    """"forward" or "backward"."""
    device: torch.device
    dtype: torch.dtype
    """The dtype of x, w, bias, y, dy and dx."""
    adapter_dtype: torch.dtype
    """The dtype of a, b, da and db."""
    M: int
    N: int
    K: int
    R: int
    dropout: bool
    w_format: str = "dense"
    """"dense" for a tensor, or the format of a `QuantizedWeight`."""


def call_of(op: str, rows: Tensor, base: Base, adapter: Adapter) -> Call:
    """Return the `Call` of one base and one adapter; `rows` is x [M, K] in a forward and dy [M, N] in a backward."""
    w, a = base.w, adapter.a
    N, K = w.shape
    w_format = w.format if isinstance(w, QuantizedWeight) else "dense"
    return Call(op, rows.device, rows.dtype, a.dtype, rows.shape[0], N, K, a.shape[0], adapter.p > 0, w_format)


# The types that the back-ends' forward and backward share; backends/__init__.py describes the two functions.
Tensors = Sequence[Tensor]
MaybeTensors = Sequence[Tensor | None]
Results = tuple[list[Tensor], list[Tensor | None]]
"""(ys, hs)"""
Gradients = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]
"""(dx, das, dbs)"""
