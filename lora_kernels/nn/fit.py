"""The conditions under which a fused LoRA layer may take over the weight of another linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class _OfTransformers(type):
    def __instancecheck__(cls, module: object) -> bool:
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


class Conv1DLike(nn.Module, metaclass=_OfTransformers):
    """The class of transformers' Conv1D for ``isinstance``, which does not import transformers. Subclasses of Conv1D,
    which may compute something else, are no instances of it."""


def why_not(module: nn.Module, in_place: bool) -> str:
    """Return why a fused layer cannot stand in for `module`, or "" where it can.

    With `in_place` the new layer takes the module's place in a model. The model's own code and its checkpoints still
    expect an ``nn.Linear`` there, so the module must be exactly an ``nn.Linear``, with a plain Parameter as its weight.

    Without `in_place` the caller decides where the new layer goes. Then every subclass of ``nn.Linear`` that inherits
    its forward is accepted. So is every layer of bitsandbytes; the code that reads its weight raises if it cannot.
    """
    kind = type(module)
    if not in_place and kind.__module__.startswith("bitsandbytes."):
        return ""
    reason = _why_not_in_place(module) if in_place else _why_not_on_its_own(module)
    if not reason and has_hooks(module):
        which = "it" if in_place else f"this {kind.__name__}"
        reason = f"{which} has hooks, which would be lost: remove them, and put them on the new module"
    return reason


def why_not_conv1d(module: nn.Module, in_place: bool) -> str:
    """Return why a `FusedLoRAConv1D` cannot stand in for `module`, or "" where it can. `in_place` has the meaning that
    it has in `why_not`, but no subclass is accepted in either case."""
    if not isinstance(module, Conv1DLike):
        kind = type(module)
        return f"it must be a Conv1D of transformers, and is a {kind.__module__}.{kind.__name__}"
    weight: Any = module.weight
    if type(weight) is not nn.Parameter:
        return _why_not_tensor(weight) or f"its weight is a {type(weight).__name__}, not a plain Parameter"
    if has_hooks(module):
        which = "it" if in_place else "this Conv1D"
        return f"{which} has hooks, which would be lost: remove them, and put them on the new module"
    return ""


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether a call of one of the modules runs more than its class's forward: hooks, or a forward of its
    own."""
    for module in modules:
        own = module.__dict__  # every fused forward asks, and a look-up here takes half the time of an attribute
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


def _why_not_in_place(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, Conv1DLike):
        # A FusedLoRALinear cannot take its place: the model's state_dict would have another shape there, and where
        # in = out a checkpoint would load transposed without an error.
        return "a Conv1D, whose weight is [in, out]: FusedLoRAConv1D takes its place, FusedLoRALinear cannot"
    if not isinstance(module, nn.Linear):
        return f"a {kind.__name__}, not an nn.Linear"
    if kind.__module__.startswith("bitsandbytes."):
        return (
            f"a {kind.__name__} of bitsandbytes: use PEFT's get_peft_model, then lora_kernels.fuse, or "
            "QuantizedLoRALinear.from_bnb"
        )
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return (
            "the out_proj of an nn.MultiheadAttention, which reads its weight without calling it: name the attention "
            "instead"
        )
    if kind is not nn.Linear:
        return (
            f"a {kind.__name__}: a subclass of nn.Linear may compute something else, or have its weight read by other "
            "code than its forward"
        )
    if type(module.weight) is not nn.Parameter:
        return (
            _why_not_tensor(module.weight) or f"its weight is a {type(module.weight).__name__}, not a plain Parameter"
        )
    return ""


def _why_not_on_its_own(module: nn.Module) -> str:
    kind = type(module)
    if hasattr(module, "lora_A"):
        return f"this {kind.__name__} has an adapter, which would be lost: merge it first, with to_linear() for example"
    if getattr(kind, "forward", None) is not nn.Linear.forward:
        name = f"{kind.__module__}.{kind.__name__}" if kind.__name__ == "Linear" else kind.__name__
        return f"it must be an nn.Linear, and is a {name} with a forward of its own"
    if not isinstance(module.weight, nn.Parameter):
        return (
            "the weight of this nn.Linear is parametrised or pruned: make it plain first, with "
            'torch.nn.utils.parametrize.remove_parametrizations(linear, "weight") or prune.remove(linear, "weight")'
        )
    if nn.parameter.is_lazy(module.weight):
        return f"this {kind.__name__} does not know its size yet: call the model once first"
    return _why_not_tensor(module.weight)


def _why_not_tensor(weight: Tensor) -> str:
    """Return why the kernels cannot read the memory of a weight: it is made of other tensors, as torchao's quantised
    and DTensor's sharded weights are."""
    if not is_traceable_wrapper_subclass(weight):
        return ""
    return (
        f"its weight is a {type(weight).__name__}, which holds other tensors and not W itself: start from the dense "
        'and whole nn.Linear, with quant="nf4", "fp4", "int8" or "fp8" for a weight in 4 or 8 bits, or take PEFT\'s '
        "get_peft_model, which serves torchao's weights"
    )
