"""`current_for`: the context of `lora_kernels.mixed` that a layer computes in.

Every forward of a layer asks, and so this module imports little.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from lora_kernels.nn import recompute

if TYPE_CHECKING:
    from lora_kernels.nn.mixed import Mixed

CURRENT: ContextVar[Mixed | None] = ContextVar("lora_kernels.mixed", default=None)
"""The innermost context in force. It belongs to a thread, or to a task of asyncio."""


class _Here(threading.local):
    """The same for compilers, which can read no ContextVar: a compiled forward sees the context that its thread has
    entered last."""

    def __init__(self) -> None:
        # In the instance of each thread, because compilers do not notice that it takes the place of a class attribute.
        self.current: Mixed | None = None
        self.interleaved = False
        """Whether tasks of this thread are in contexts of their own at the same time. `current` is then that of one of
        them, and nothing tells a compiled forward which task it belongs to."""
        self.entered: list[Mixed] = []

    def enter(self, context: Mixed) -> None:
        if self.current is not context.outer:
            self.interleaved = True
        self.entered.append(context)
        self.current = context

    def leave(self, context: Mixed) -> None:
        if context in self.entered:  # a generator may be closed in another thread
            self.entered.remove(context)
        self.current = self.entered[-1] if self.entered else None
        if not self.entered:
            self.interleaved = False


HERE = _Here()


def current_for(layer: Any) -> Mixed | None:
    """Return the innermost context in force that `layer` belongs to, or None.

    Raises RuntimeError in a backward that computes the layer again outside of the context of its first forward.
    """
    if torch.compiler.is_compiling():
        if HERE.interleaved:  # without fullgraph=True the layer then runs as it does without a compiler
            raise RuntimeError(
                "several tasks of this thread are inside a context `mixed`, and a compiled layer cannot tell which one "
                "calls it: leave the context before `await`, or compile without fullgraph=True"
            )
        return _of(layer, HERE.current)
    context = CURRENT.get()
    if context is None and not recompute.REMEMBERED:
        return None
    if context is None and recompute.in_backward():
        context = _of_the_caller()
    context = _of(layer, context)
    recompute.check(layer, context)
    return context


def _of(layer: Any, context: Mixed | None) -> Mixed | None:
    while context is not None and id(layer) not in context.layers:
        context = context.outer
    return context


def _of_the_caller() -> Mixed | None:
    """Return the context of the thread that called backward(). On a GPU autograd computes in a thread of its own, to
    which newer versions of torch hand the variables of the calling thread."""
    if not torch._C._is_key_in_tls("context"):  # type: ignore[attr-defined]
        return None
    found: Mixed | None = torch._C._get_obj_in_tls("context").get(CURRENT)  # type: ignore[attr-defined]
    return found
