"""Shared-input groups of a fused PEFT model: q, k and v, or gate and up, in one call of `lora_linear_group`.

The layers stay where they are, and the model's code calls them one by one. In a forward of their parent, the first
layer that is called computes the y of every layer. Each other layer then returns its y, if it is called with the very
same x (`lora_kernels.peft.shared`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.peft.layer import FusedLayer
from lora_kernels.peft.shared import Forward, SharedInput

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, ViT
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),  # BERT, ViT
)
"""Names of children of one module that read the same x. GPT-NeoX has one linear for q, k and v, and needs no group."""


class Group:
    """A group of layers. Only its layers refer to it, so it is freed with the last of them, and its hooks are removed
    then.

    It refers neither to the layers nor to their parent. What a forward keeps is in `here`, which has a separate value
    in each thread. A copy, or an unpickled group, belongs to the copies of the layers.
    """

    def __init__(self, report: SharedInput) -> None:
        self.report = report
        self.reason = "its layers are no longer in the model"
        self.here = _Here()

    def __reduce__(self) -> tuple[type[Group], tuple[SharedInput]]:
        return Group, (self.report,)

    def __del__(self) -> None:
        self.report.dissolved = self.reason

    def hook(self, parent: nn.Module) -> None:
        """Register the hooks that begin and end a forward of `parent`."""
        begin, end = _Begin(self), _End(self)
        begin.__setstate__(parent.register_forward_pre_hook(begin, with_kwargs=True))
        end.__setstate__(parent.register_forward_hook(end, always_call=True))

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the y of `layer` for x; None where the layer has to compute it alone."""
        forward = self.here.forward
        y = None if forward is None else forward.take(self, layer, x)
        if y is not None:
            layer.settle(x)
        return y

    def leave(self, layer: Any, reason: str) -> None:
        """Let `layer` compute alone from now on. The group ends when its last layer leaves."""
        self.reason = reason
        layer._group = None


class _Here(threading.local):
    """The part of a group that each thread has for itself."""

    forward: Forward | None = None
    """The forward of the parent that is running. After an exception that is no Exception, such as KeyboardInterrupt,
    for which torch calls no hook, it stays until the parent's next forward in this thread, or until the group dies."""


class _Hook:
    """A hook of the parent. It is removed when its group dies; a copy of the parent has a copy of both."""

    handle: Any

    def __init__(self, group: Group) -> None:
        self.group = weakref.ref(group)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.group(),), self.handle

    def __setstate__(self, handle: Any) -> None:
        self.handle = handle
        weakref.finalize(self.group(), handle.remove).atexit = False


class _Begin(_Hook):
    def __call__(self, parent: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # the layers are computed one by one, and nothing is kept
            return
        group = self.group()
        if group is not None:
            group.here.forward = Forward(parent, (*args, *kwargs.values()))


class _End(_Hook):
    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        group = self.group()
        if group is not None:
            group.here.forward = None


def check_families(model: nn.Module, families: Sequence[Sequence[str]]) -> None:
    """Raise ValueError where a family has fewer than two names, or where no module of the model has two children of
    these names."""
    for family in families:
        if isinstance(families, str) or isinstance(family, str) or len(family) < 2:
            raise ValueError(
                f'group must be True, or families of two names or more, as in [("wq", "wk", "wv")]; got {families!r}'
            )
        if not any(sum(hasattr(parent, name) for name in family) > 1 for parent in model.modules()):
            raise ValueError(f"group: no module of the model has two of {', '.join(map(repr, family))} for children")


def _can_be_grouped(layer: nn.Module | None) -> bool:
    return isinstance(layer, FusedLayer) and layer.shares_input


def group(model: nn.Module, families: Sequence[Sequence[str]]) -> dict[str, SharedInput]:
    """Group the fused layers that one of `families` names, where they are children of one parent, have the same
    in_features, and are of one class that can be grouped (`FusedLayer.shares_input`).

    Returns:
        Name of the parent → the group's report. A second group of the same parent has the key "parent (2)".
    """
    reports: dict[str, SharedInput] = {}
    for path, parent in list(model.named_modules()):
        count = 0
        for family in families:
            names = [name for name in family if _can_be_grouped(parent._modules.get(name))]
            layers: list[Any] = [parent._modules[name] for name in names]
            if len(names) < 2 or len({(type(layer), layer.in_features) for layer in layers}) > 1:
                continue
            if any(layer._group is not None for layer in layers) or len({id(layer) for layer in layers}) < len(layers):
                continue
            count += 1
            report = reports[path if count == 1 else f"{path} ({count})"] = SharedInput(names)
            made = Group(report)
            made.hook(parent)
            for layer in layers:
                layer._group = made
    return reports
