"""Shared-input groups of a fused PEFT model: q, k and v, or gate and up, as one call of `lora_linear_group`.

The layers stay where they are and are called one by one, as the model's code does. Inside a forward of their parent the
first that is called computes all of them; the others, called with the very same x, hand out what is there already. A
layer that is called with another x (as in cross-attention) computes for itself, and ends its group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.ops.group import Layer, lora_linear_group

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, ViT
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),  # BERT, ViT
)
"""Children of one module that read the same x, by name. GPT-NeoX has one linear for q, k and v: nothing to group."""


class SharedInput:
    """Two or more fused layers of one parent.

    Attributes:
        names: the layers, as children of their parent.
        calls: how many calls computed all of them.
        passed_over: why others did not: reason → how many.
        dissolved: why the group has ended, or None while it stands.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.layers: tuple[Any, ...] = tuple(parent.get_submodule(name) for name in names)
        self.calls = 0
        self.passed_over: Counter[str] = Counter()
        self.dissolved: str | None = None
        self._open = False
        self._x: tuple[Tensor, int | None] | None = None
        self._ys: dict[int, Tensor] = {}
        self._hooks = (
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        )
        for layer in self.layers:
            layer._group = self

    def __str__(self) -> str:
        state = self.dissolved and f"dissolved: {self.dissolved}"
        return f"{', '.join(self.names)}: {state or f'one call for all, {self.calls} so far'}"

    def dissolve(self, reason: str) -> None:
        """Let the layers go their own ways from now on."""
        self.dissolved = reason
        for hook in self._hooks:
            hook.remove()
        self._clear()
        for layer in self.layers:
            if layer.__dict__.get("_group") is self:
                layer._group = None

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The y of `layer` for x, where the group serves the call."""
        place = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if not self._open or place is None:  # called past its parent; a replica of a member
            return None
        if place in self._ys:
            if self._x is not None and self._x[0] is x and self._x[1] == _version(x):
                return self._ys.pop(place)
            self.dissolve(f"{self.names[place]} reads another input than the rest")
            return None
        if reason := self._why_not(x):
            self.passed_over[reason] += 1
            return None
        names = [member.active()[0] for member in self.layers]
        ys = lora_linear_group(
            x,
            [Layer(*member.operands(name)) for member, name in zip(self.layers, names, strict=True)],
            backend=self.layers[0]._backend,
        )
        if not torch.compiler.is_compiling():
            self.calls += 1
        self._x, self._ys = (x, _version(x)), dict(enumerate(ys))
        return self._ys.pop(place)

    def _why_not(self, x: Tensor) -> str | None:
        """Why this call is not one for all; None where it is."""
        for name, member in zip(self.names, self.layers, strict=True):
            if (reason := member.why_not_now(x)) is not None:
                return f"{name}: {reason or 'no adapter is to be computed'}"
            active = member.active()
            if len(active) > 1 or active[0] in member.lora_variant:
                return f"{name}: several adapters, or DoRA"
        if len({member.lora_A[member.active()[0]].weight.dtype for member in self.layers}) > 1:
            return "adapters of several dtypes"
        return None

    def _begin(self, *_: Any) -> None:
        self._clear()
        self._open = True

    def _end(self, *_: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        self._open, self._x, self._ys = False, None, {}


def check_families(model: nn.Module, families: Sequence[Sequence[str]]) -> None:
    """Raises ValueError for families that the caller has named and that cannot be meant so."""
    for family in families:
        if isinstance(families, str) or isinstance(family, str) or len(family) < 2:
            raise ValueError(
                f'group must be True, or families of two names or more, as in [("wq", "wk", "wv")]; got {families!r}'
            )
        if not any(sum(hasattr(parent, name) for name in family) > 1 for parent in model.modules()):
            raise ValueError(f"group: no module of the model has two of {', '.join(map(repr, family))} for children")


def group(model: nn.Module, kind: type[nn.Module], families: Sequence[Sequence[str]]) -> dict[str, SharedInput]:
    """Group those layers of `kind` that are named in one of `families`, children of one parent and equally wide in;
    parent → group (a second one of the same parent: "parent (2)")."""
    groups: dict[str, SharedInput] = {}
    for path, parent in list(model.named_modules()):
        count = 0
        for family in families:
            names = [name for name in family if isinstance(getattr(parent, name, None), kind)]
            layers: list[Any] = [getattr(parent, name) for name in names]
            if len(names) < 2 or len({layer.in_features for layer in layers}) > 1:
                continue
            if any(layer._group is not None for layer in layers) or len({id(layer) for layer in layers}) < len(layers):
                continue
            count += 1
            groups[path if count == 1 else f"{path} ({count})"] = SharedInput(parent, names)
    return groups


def _version(x: Tensor) -> int | None:
    """Tells writes into x between two calls. Tensors of inference mode count none, nor does a tracing compiler; none of
    the families writes there."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
