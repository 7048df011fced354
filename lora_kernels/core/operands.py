"""The operands of a call, in the form in which they travel from the public functions to the kernels.

    y = x Wᵀ + bias + s · h Bᵀ,  h = x̂ Aᵀ,  x̂ = dropout(x, p)

A call computes one y, or several that read the same x: y i comes from `Base` i and `Adapter` i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant.weight import QuantizedWeight


class Layer(NamedTuple):
    """The operands of one layer as the caller gives them, not checked yet: all that `lora_linear` takes besides x."""

    weight: Tensor | QuantizedWeight
    """W [N, K]."""
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
    """The frozen half of a layer. Of a layer of E experts it is stacks: W [E, N, K], dense, and bias [E, N]."""

    w: Tensor | QuantizedWeight
    """W [N, K], dense or quantised."""
    bias: Tensor | None = None
    """[N]."""


class Adapter(NamedTuple):
    """The trained half of a layer. Of a layer of E experts it is stacks: A [E, R, K] and B [E, N, R]."""

    a: Tensor
    """A [R, K]."""
    b: Tensor
    """B [N, R], in A's dtype."""
    scale: float
    """s."""
    p: float = 0.0
    """The probability with which dropout zeroes an element of x."""
    seed: Tensor | None = None
    """The seed of the dropout mask: int64, one element, on x's device. None where p is 0."""


class Needs(NamedTuple):
    """The gradients that a backward is asked for."""

    dx: bool
    """Whether dx is wanted."""
    da: tuple[bool, ...]
    """Whether da is wanted, for each adapter."""
    db: tuple[bool, ...]
    """Whether db is wanted, for each adapter."""


class Call(NamedTuple):
    """The facts about a call from which a back-end tells whether it can serve it. A `Call` is hashable, so that the
    back-end is chosen once for each kind of call."""

    op: str
    """"forward" or "backward", and with "_multi" for many adapters over the rows of one x, with "_experts" for the
    experts of one layer."""
    device: torch.device
    dtype: torch.dtype
    """The dtype of x, w, bias, y, dy and dx."""
    adapter_dtype: torch.dtype
    """The dtype of a, b, da and db."""
    M: int
    """The rows of x [M, K], rounded up to a power of two by `call_of`: no choice depends on their exact number, and a
    new length in each step must not be a new kind of call."""
    N: int
    K: int
    R: int
    """The sizes of W [N, K] and A [R, K]."""
    dropout: bool
    """Whether p is above 0."""
    w_format: str = "dense"
    """"dense" for a tensor, or the format of a `QuantizedWeight`."""
    layers: int = 1
    """The number of layers over the same x that are computed together. The other fields describe one of them."""


def call_of(op: str, rows: Tensor, base: Base, adapter: Adapter, layers: int = 1) -> Call:
    """Return the `Call` of one base and one adapter, of `layers` that are computed together; `rows` is x [M, K] in a
    forward and dy [M, N] in a backward."""
    w, a = base.w, adapter.a
    N, K = w.shape
    w_format = w.format if isinstance(w, QuantizedWeight) else "dense"
    M = rows.shape[0]
    M = 1 << (M - 1).bit_length() if M else 0  # `power_of_two`, without the time of a call
    # Every call makes this tuple. ``Call(...)`` would enter one more Python function.
    return tuple.__new__(
        Call, (op, rows.device, rows.dtype, a.dtype, M, N, K, a.shape[0], adapter.p > 0, w_format, layers)
    )


def call_of_multi(op: str, rows: Tensor, base: Base, adapters: Sequence[Adapter | None]) -> Call:
    """Return the `Call` of one base and many adapters, at least one of which is not None. `rows` is x [M, K] in a
    forward and dy [M, N] in a backward."""
    largest = getattr(adapters, "largest", None)  # an `AdapterStack` knows it, and has no dropout
    if largest is None:
        R, dropout = 0, 0.0
        for each in adapters:
            if each is not None:
                own, p = each[0].shape[0], each[3]
                if own > R:
                    R, a, b = own, each[0], each[1]
                if p > dropout:
                    dropout = p
        largest = Adapter(a, b, 1.0, dropout)
    return call_of(op, rows, base, largest)


def call_of_experts(op: str, rows: Tensor, base: Base, adapter: Adapter) -> Call:
    """Return the `Call` of a layer of experts. `rows` is x [M, K] in a forward and dy [M, N] in a backward."""
    (_, N, R), K = adapter.b.shape, adapter.a.shape[2]
    M = power_of_two(rows.shape[0])
    return Call(op, rows.device, rows.dtype, adapter.a.dtype, M, N, K, R, adapter.p > 0)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


# The types in the signatures of functions over lists of layers, such as a back-end's forward and backward.
Tensors = Sequence[Tensor]
"""One tensor for each layer."""
MaybeTensors = Sequence[Tensor | None]
"""One tensor or None for each layer."""
Results = tuple[list[Tensor], list[Tensor | None]]
"""The (ys, hs) that a forward returns."""
MultiResult = tuple[Tensor, Tensor | None]
"""The (y, h) that a forward of many adapters returns."""
Gradients = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]
"""The (dx, das, dbs) that a backward returns."""
ExpertGradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The (dx, da, db) that a backward of experts returns."""
