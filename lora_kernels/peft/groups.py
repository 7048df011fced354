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
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, Phi, CLIP, Whisper, OPT
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5
    ("wi_0", "wi_1"),  # T5's gated feed-forward
    ("wq", "wk", "wv"),  # Llama as Meta wrote it, InternLM
    ("w1", "w3"),  # the same, and Mixtral's experts: w2 reads their product
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q_a_proj", "q_proj", "kv_a_proj_with_mqa"),  # latent attention of DeepSeek, with q in low rank or not
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # linear attention of Qwen3.5
    ("in_proj_qkvz", "in_proj_ba"),  # the same of Qwen3-Next
    ("to_q", "to_k", "to_v"),  # diffusers
    ("add_q_proj", "add_k_proj", "add_v_proj"),  # the text's half of joint attention in diffusers
)
"""Names of children of one module that read the same x. GPT-NeoX has one linear for q, k and v, and needs no group.

Where keys and values read another x than the queries, as in cross-attention, they are one call and the queries another.
"""

_JOINT = "add_q_proj"
"""The child by which a module is known to attend jointly: it has projections for the tokens of the text too, so all of
to_q, to_k and to_v read the first of its two inputs."""


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
            joint = _JOINT in parent._modules  # then no layer of a group reads another input than the first of them
            group.here.forward = Forward(parent, () if joint else (*args, *kwargs.values()))


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


def not_grouped(families: Sequence[Sequence[str]], groups: dict[str, SharedInput]) -> str:
    """Return the `families` of which no two layers are in one of `groups`, as text; "" where there is none."""
    grouped = {frozenset(group.names) for group in groups.values()}
    alone = [", ".join(names) for names in families if not any(each <= set(names) for each in grouped)]
    if not alone:
        return ""
    return f"{' and '.join(alone)}: two of them must be fused, in one module, of one class and with inputs of one width"


def _can_be_grouped(layer: nn.Module | None) -> bool:
    return isinstance(layer, FusedLayer) and layer.shares_input


def group(model: nn.Module, families: Sequence[Sequence[str]]) -> dict[str, SharedInput]:
    """Group the fused layers that one of `families` names, where they are children of one parent, have the same
    in_features, and are of one class that can be grouped (`FusedLayer.shares_input`). Layers of one family that differ
    in these, as the keys and values of a cross-attention from the queries, make groups of their own.

    Returns:
        Name of the parent → the group's report. A second group of the same parent has the key "parent (2)".
    """
    reports: dict[str, SharedInput] = {}
    for path, parent in list(model.named_modules()):
        count = 0
        for family in families:
            for names in _alike(parent, family):
                layers: list[Any] = [parent._modules[name] for name in names]
                if any(layer._group is not None for layer in layers) or len({*map(id, layers)}) < len(layers):
                    continue
                count += 1
                report = reports[path if count == 1 else f"{path} ({count})"] = SharedInput(names)
                made = Group(report)
                made.hook(parent)
                for layer in layers:
                    layer._group = made
    return reports


def _alike(parent: nn.Module, family: Sequence[str]) -> list[list[str]]:
    """Return the names of `family` whose layers can be one group, for each group of two layers or more."""
    alike: dict[tuple[type, int], list[str]] = {}
    for name in family:
        layer: Any = parent._modules.get(name)
        if _can_be_grouped(layer):
            alike.setdefault((type(layer), layer.in_features), []).append(name)
    return [names for names in alike.values() if len(names) > 1]
