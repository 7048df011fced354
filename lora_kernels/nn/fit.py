"""The conditions under which a fused LoRA layer may compute from a module's weight in place of the module."""

from __future__ import annotations

from torch import nn


def why_not(module: nn.Module, in_place: bool) -> str:
    """Return why a fused layer cannot stand in for `module`, or "" where it can.

    With `in_place` the new layer takes the module's place in a model. The model's own code and its checkpoints then
    still expect an ``nn.Linear`` there, so only an ``nn.Linear`` itself fits, with a plain Parameter as its weight.
    Without `in_place` the caller decides what to do with the new layer. Then any ``nn.Linear`` fits whose forward
    computes x Wᵀ + bias. The layers of bitsandbytes fit too: whoever reads their weight finds out whether it serves.
    """
    kind = type(module)
    if not in_place and kind.__module__.startswith("bitsandbytes."):
        return ""
    reason = _why_not_in_place(module) if in_place else _why_not_on_its_own(module)
    if not reason and has_hooks(module):
        which = "it" if in_place else f"this {kind.__name__}"
        reason = f"{which} has hooks, which would be lost: remove them, and put them on the new module"
    return reason


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of the module runs more than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _why_not_in_place(module: nn.Module) -> str:
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        # Its weight is [in, out]. A FusedLoRALinear could compute with the transposed view, but not stand in its place:
        # the model's state_dict would have another shape there. Where in = out, a checkpoint would load transposed
        # without an error. The view would also be a Parameter of its own, no longer tied to other users of W.
        return "a Conv1D, its weight [in, out]: it takes LoRA by PEFT's get_peft_model, then lora_kernels.fuse"
    if not isinstance(module, nn.Linear):
        return f"a {kind.__name__}, not an nn.Linear"
    if kind.__module__.startswith("bitsandbytes."):
        return (
            f"a {kind.__name__} of bitsandbytes: it takes LoRA by PEFT's get_peft_model, then lora_kernels.fuse, or by "
            "QuantizedLoRALinear.from_bnb"
        )
    if kind is not nn.Linear:
        return (
            f"a {kind.__name__}: a subclass of nn.Linear, which may compute something else or be read past its forward"
        )
    if type(module.weight) is not nn.Parameter:
        return f"its weight is a {type(module.weight).__name__}, not a plain Parameter"
    return ""


def _why_not_on_its_own(module: nn.Module) -> str:
    kind = type(module)
    if hasattr(module, "lora_A"):
        return f"this {kind.__name__} has an adapter, which would be lost: merge it first, as with to_linear()"
    if getattr(kind, "forward", None) is not nn.Linear.forward:
        return f"it must be an nn.Linear, and is a {kind.__name__} with a forward of its own"
    if not isinstance(module.weight, nn.Parameter):
        return (
            "the weight of this nn.Linear is parametrised or pruned: make it plain first, with "
            'torch.nn.utils.parametrize.remove_parametrizations(linear, "weight") or prune.remove(linear, "weight")'
        )
    if nn.parameter.is_lazy(module.weight):
        return f"this {kind.__name__} does not know its size yet: call the model once before"
    return ""
