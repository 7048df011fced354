"""A dry forward: it runs a model once in training and once in evaluation mode, to see which adapters take part, and
puts the model back as it was (`lora_kernels.nn.unchanged` says what of it).

A layer with an adapter can be passed over. Other code may read its weight and never call it, a patch may replace its
forward, or the model may not use it. The operands of every operator tell these apart: an adapter is computed where an
operator reads A, and passed over where one reads W and none reads A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.nn.unchanged import storage, unchanged


class Inputs(NamedTuple):
    """The inputs of a forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dummy: bool = False
    """Whether they are the model's own dummy_inputs."""


_MODES = {True: "in training mode", False: "in evaluation mode"}


class Watched(NamedTuple):
    """A layer that is looked at."""

    layer: nn.Module
    weights: Sequence[Tensor]
    """The tensors that hold W."""
    adapter: Sequence[Tensor]
    """A of each adapter that the layer is to compute."""
    calls: Callable[[], tuple[int, Mapping[str, int]]] | None = None
    """The layer's own counters, if it has some: of its fused forwards, and of those left to others, by reason."""


class _Seen(NamedTuple):
    """What one forward has shown of a layer."""

    called: bool
    weight: bool
    """Whether an operator has read W."""
    adapter: bool
    """Whether an operator has read A."""
    fused: bool
    left: tuple[str, ...]
    """The reasons why fused forwards were left to others."""


def passed_over(
    model: nn.Module, watched: Mapping[str, Watched], inputs: Inputs, others: Sequence[object] = ()
) -> dict[str, str]:
    """Return the layers of `watched` that a forward of `model` passes over, and why.

    The forward runs under ``torch.no_grad()`` in the mode that the model is in, and then with every module in the other
    mode, because some paths serve only one of them. A layer is passed over if one of the two reads its weight without
    its adapter, or if neither computes its adapter by its fused forward.

    Nothing that `unchanged` knows is changed, the attributes of `others` included. What the forward itself raises is
    raised.

    Raises:
        ValueError: the model cannot run with its own dummy_inputs.
    """
    seen: dict[str, dict[str, _Seen]] = {name: {} for name in watched}
    for training in (model.training, not model.training):
        try:
            found = _forward(model, watched, training, inputs, others)
        except Exception as error:
            if not inputs.dummy:
                raise
            raise ValueError(
                f"the model cannot run with its own dummy_inputs ({type(error).__name__}: {error}): give inputs that "
                "it takes, such as verify=batch"
            ) from error
        for name, one in found.items():
            seen[name][_MODES[training]] = one
    tied = _tied(model)
    reasons = {name: _reason(watched[name], each, tied) for name, each in seen.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def inputs_for(model: nn.Module, given: Any) -> Inputs:
    """Return the inputs that a user has `given`. A mapping holds keywords, a tuple or list positional arguments, and
    anything else is the one argument. True stands for ``model.dummy_inputs``, which models of transformers have.

    Raises:
        ValueError: `given` is True, and the model has no dummy_inputs.
    """
    if given is True:
        made = getattr(model, "dummy_inputs", None)
        if not isinstance(made, Mapping):
            raise ValueError("this model has no dummy_inputs: give inputs that it takes, such as verify=batch")
        device = next((p.device for p in model.parameters() if not p.is_meta), None)
        moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in made.items()}
        return Inputs((), moved, dummy=True)
    if isinstance(given, Mapping):
        return Inputs((), given)
    return Inputs(tuple(given) if isinstance(given, (tuple, list)) else (given,), {})


def _forward(
    model: nn.Module,
    watched: Mapping[str, Watched],
    training: bool,
    inputs: Inputs,
    others: Sequence[object],
) -> dict[str, _Seen]:
    called: set[int] = set()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code shows no operands
        stack.enter_context(torch.no_grad())
        operands = stack.enter_context(unchanged(model, others))
        for each in watched.values():
            each.layer.register_forward_pre_hook(lambda layer, _: called.add(id(layer)))  # `unchanged` removes it
        if training != model.training:
            for module in model.modules():  # train() may be overridden, and do more
                module.training = training
        before = {name: each.calls() for name, each in watched.items() if each.calls is not None}
        model(*inputs.args, **inputs.kwargs)
        found = {}
        for name, each in watched.items():
            was_called, fused, left = id(each.layer) in called, id(each.layer) in called, list[str]()
            if each.calls is not None:
                (old, old_reasons), (new, reasons) = before[name], each.calls()
                fused, left = new > old, [why for why, n in reasons.items() if n > old_reasons.get(why, 0)]
            weight, adapter = (any(storage(t) in operands.read for t in ts) for ts in (each.weights, each.adapter))
            found[name] = _Seen(was_called, weight, adapter, fused, tuple(left))
    return found


def _reason(watched: Watched, seen: Mapping[str, _Seen], tied: set[int]) -> str:
    """Return why a layer was passed over; "" where it was not."""
    if any(t.is_meta for t in watched.adapter):  # offloaded: its memory is known only while the layer runs
        return "" if any(each.fused for each in seen.values()) else "it was not called in a forward with these inputs"
    own = not any(storage(w) in tied for w in watched.weights)
    for mode, each in seen.items():
        if each.weight and not each.adapter and (each.called or own):
            what = "its forward, which is patched," if each.called else "other code"
            return f"{mode} {what} read its weight, past its adapter"
    if any(each.fused and each.adapter for each in seen.values()):
        return ""
    left = dict.fromkeys(why for each in seen.values() for why in each.left)
    if left:
        return "; ".join(left)
    if not any(each.called for each in seen.values()):
        if any(each.adapter for each in seen.values()):
            return "it was not called: other code computed its adapter"
        return "it was not called in a forward with these inputs"
    return "its calls did not reach the fused forward: its forward is patched"


def _tied(model: nn.Module) -> set[int]:
    """Return the storages of parameters that several modules share, such as a head's with the embedding's."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[storage(p)] = owners.get(storage(p), 0) + 1
    return {key for key, count in owners.items() if count > 1}
