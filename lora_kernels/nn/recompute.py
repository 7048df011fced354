"""A guard for activation checkpointing under `mixed`: a forward that is computed again in a backward must have the rows
that it had at first.

Checkpointing calls a layer again in the backward. If the backward runs outside of the context of the first forward, or
inside another one, the layer would compute other adapters without an error. So a layer remembers the contexts whose
forwards may still be computed again, and `check` raises where another context, or none, is in force then.

A forward that recorded a graph is remembered for as long as its graph is alive: the graph's node holds the context.
Checkpointing with ``use_reentrant=True`` records no graph in its first forward. Such a forward is remembered until the
layer's next one outside of a backward.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_KEY = "lora_kernels.mixed"


class _Forwards:
    """The forwards of one layer that a backward may compute again."""

    def __init__(self) -> None:
        self.recorded: MutableMapping[Any, int] = WeakKeyDictionary()
        """The number of forwards that recorded a graph, by context."""
        self.unrecorded: Any = None
        """The context of the last forward in training mode that recorded no graph."""


_forwards: WeakKeyDictionary[nn.Module, _Forwards] = WeakKeyDictionary()
REMEMBERED: dict[Any, _Forwards] = _forwards.data  # type: ignore[attr-defined]
"""What is remembered, by layer. It is empty in programs that do not train in a context."""


def in_backward() -> bool:
    """Return whether the call is made by a backward of autograd, as a recomputation is."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined,no-any-return]


def remember(layer: nn.Module, context: Any, y: Tensor) -> None:
    """Note that `layer` has computed y in `context`."""
    if in_backward():
        return
    context.forwards.add(id(layer))
    node: Any = y.grad_fn
    if node is None and not layer.training:  # nothing computes it again
        return
    found = _forwards.get(layer)
    if found is None:
        found = _forwards[layer] = _Forwards()
    found.unrecorded = context if node is None else None
    if node is not None:
        found.recorded[context] = found.recorded.get(context, 0) + 1
        node.metadata[_KEY] = context


def check(layer: nn.Module, context: Any) -> None:
    """Raise RuntimeError where a backward computes `layer` again in another context than that of its first forward.
    `context` is the one that is in force, or None. Otherwise such a forward is remembered no longer.

    A context that the backward has entered is right: the function that is computed again has made it anew."""
    if not in_backward():
        if context is None and (found := _forwards.get(layer)) is not None:
            found.unrecorded = None
            if not found.recorded:
                del _forwards[layer]
        return
    if context is not None:
        if context.in_backward:
            return
        if id(layer) not in context.forwards:
            raise RuntimeError(
                "activation checkpointing computes a layer again inside a context `mixed` in which its first forward "
                "was not, where its rows would get other adapters: call the model and backward() inside the same "
                "`with lora_kernels.mixed(...)`, or both outside"
            )
    found = _forwards.get(layer)
    if found is None:
        return
    others = [each for each in found.recorded if each is not context]
    if others or found.unrecorded not in (None, context):
        raise RuntimeError(
            "activation checkpointing computes a layer again outside of the context `mixed` of its first forward, "
            "where its rows would get other adapters: call backward() inside the same `with lora_kernels.mixed(...)`"
        )
    found.unrecorded = None
    if context in found.recorded:
        found.recorded[context] -= 1
        if not found.recorded[context]:
            del found.recorded[context]
