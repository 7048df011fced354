"""Shared-input groups of a fused PEFT model: q, k and v, or gate and up, in one call of `lora_linear_group`.

The layers stay where they are, and the model's code calls them one by one. In a forward of their parent, the first
layer that is called computes the y of every layer. Each other layer then returns its y, if it is called with the very
same x. A layer that is called with another x, as in cross-attention, computes its own y and ends the group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.peft.reading import Operands, as_one_adapter

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, ViT
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),  # BERT, ViT
)
"""Names of children of one module that read the same x. GPT-NeoX has one linear for q, k and v, and needs no group."""


class SharedInput:
    """Two or more fused layers of one parent that read the same x.

    Attributes:
        names: the names of the layers in their parent.
        calls: the number of calls that computed all layers.
        passed_over: the number of calls that did not, by reason.
        dissolved: the reason why the group has ended, or None while it exists.
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
        """End the group: each layer computes its own y from now on."""
        self.dissolved = reason
        for hook in self._hooks:
            hook.remove()
        self._clear()
        for layer in self.layers:
            if layer.__dict__.get("_group") is self:
                layer._group = None

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return the y of `layer` for x; None where the group does not serve the call."""
        place = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if not self._open or place is None:  # not called by its parent; or a replica of a member
            return None
        if place in self._ys:
            if self._x is not None and self._x[0] is x and self._x[1] == _version(x):
                return self._ys.pop(place)
            self.dissolve(f"{self.names[place]} reads another input than the rest")
            return None
        members = self._read(x)
        if isinstance(members, str):
            self.passed_over[members] += 1
            return None
        layers = []
        for operands in members:
            w, a, b, scale, bias, p = as_one_adapter(operands, operands.w.dtype)
            layers.append(Layer(w, a, b, scale, bias, p))  # type: ignore[arg-type]  # a FusedLinear's w is dense
        ys = lora_linear_group(x, layers, backend=self.layers[0]._backend)
        if not torch.compiler.is_compiling():
            self.calls += 1
        self._x, self._ys = (x, _version(x)), dict(enumerate(ys))
        return self._ys.pop(place)

    def _read(self, x: Tensor) -> list[Operands] | str:
        """Return the operands of each layer, or why one call cannot compute all layers."""
        members = []
        for name, member in zip(self.names, self.layers, strict=True):
            operands = member.read(x)
            if isinstance(operands, str):
                return f"{name}: {operands or 'no adapter is to be computed'}"
            adapters = list(operands.adapters.values())
            if len(adapters) > 1 or adapters[0].magnitude is not None:
                return f"{name}: several adapters, or DoRA"
            members.append(operands)
        if len({adapter.a.dtype for operands in members for adapter in operands.adapters.values()}) > 1:
            return "adapters of several dtypes"
        return members

    def _begin(self, *_: Any) -> None:
        self._clear()
        self._open = True

    def _end(self, *_: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        self._open, self._x, self._ys = False, None, {}


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


def group(model: nn.Module, kind: type[nn.Module], families: Sequence[Sequence[str]]) -> dict[str, SharedInput]:
    """Group the layers of class `kind` that one of `families` names, where they are children of one parent and have the
    same in_features.

    Returns:
        Name of the parent → group. A second group of the same parent has the key "parent (2)".
    """
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
    """Return x's version counter, which tells whether x was written to between two calls.

    It is None for tensors of inference mode, which have no counter, and while a compiler traces. A write is not noticed
    then; no model of `FAMILIES` writes into x.
    """
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
