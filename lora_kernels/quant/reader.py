"""`Reader`: how the weight of a quantised layer of another package becomes a `QuantizedWeight` over the same codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant.weight import QuantizedWeight


class Unreadable(ValueError):
    """The kernels have no format for a weight; the message says why."""


class Facts(NamedTuple):
    """What a reader finds out about a weight once. It holds none of the layer's codes."""

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    """The dtype that the package dequantises to."""
    blocksize: int = 0
    copies: tuple[Tensor, ...] = ()
    """The tensors that are not the layer's own."""
    note: str = ""
    """The name of the format in a report, and what of the weight is a copy."""


class Reader:
    """Reads layers of one kind. A subclass has the methods below."""

    def sources(self, base: Any) -> tuple[Tensor, ...]:
        """Return the tensors of `base` that `weight` takes. Raises Unreadable for another kind of layer."""
        raise NotImplementedError

    def values(self, base: Any) -> tuple[Tensor, ...]:
        """Return those small tensors of `base` on whose values the facts depend."""
        return ()

    def facts(self, base: Any) -> Facts:
        """Return what there is to know about the weight of `base`. Raises Unreadable where the kernels have no format
        for it."""
        raise NotImplementedError

    def weight(self, base: Any, facts: Facts) -> QuantizedWeight:
        """Return the weight of `base`, for which `facts` were read: its own tensors, with their copies."""
        raise NotImplementedError

    def read(self, base: Any) -> QuantizedWeight:
        """Return the weight of `base`, checked. Raises Unreadable, or ValueError where its parts do not fit."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            self.sources(base)
            return self.weight(base, self.facts(base)).check()


def normal(t: Tensor) -> Tensor:
    """Return t, or a tensor over the same memory where t was made in inference mode, which autograd would not save."""
    if torch.compiler.is_compiling() or not t.is_inference():
        return t
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=t.dtype, device=t.device)
        return alias.set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def nothing(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without elements beside `like`, for a part that a weight does not have."""
    return like.new_empty(0, dtype=dtype)


def require(holds: bool, why: str) -> None:
    """Raise Unreadable with this reason unless the condition holds."""
    if not holds:
        raise Unreadable(why)
