"""The hooks that accelerate, diffusers and ms-swift put on the modules of a LoRA layer, and what they come to.

A fused forward reads the weights of the base, of lora_A and of lora_B, and calls none of them. So it has to do itself
what the hooks of these modules would do:

    accelerate   AlignDevicesHook, offload=False    x goes to the device of the weight, y back with io_same_device
                 LayerwiseCastingHook               the weight is converted to compute_dtype
                 CpuOffload, ModelHook              nothing, where the weight is on the execution device already
                 SequentialHook                     its hooks, one after the other
    diffusers    LayerwiseCastingHook               the weight is converted to compute_dtype
    ms-swift     keep_device_forward                x goes to the device of the weight

Hooks are recognised by the module and the name of their class or function, so nothing of these packages is imported.
Every other hook leaves the call to PEFT, with a reason that names it. They are read anew in every call, because they
may be added and removed between two calls.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.nn.fit import has_hooks
from lora_kernels.peft import known

_ACCELERATE = "accelerate.hooks", "add_hook_to_module.<locals>.new_forward"
_DIFFUSERS = "diffusers.hooks.hooks", "HookRegistry.register_hook.<locals>.create_new_forward.<locals>.new_forward"
_SWIFT = "swift.tuners.peft", "keep_device_forward"
_SWIFT_USES = "device forward_origin hasattr to weight weight0"
_ALIGN = "accelerate.hooks", "AlignDevicesHook"
_OFFLOAD = "accelerate.hooks", "CpuOffload"
_PLAIN = "accelerate.hooks", "ModelHook"
_SEQUENCE = "accelerate.hooks", "SequentialHook"
_CASTS = (
    ("accelerate.hooks", "LayerwiseCastingHook"),
    ("diffusers.hooks.layerwise_casting", "LayerwiseCastingHook"),
)
_KEEPS_INPUT = "diffusers.hooks.layerwise_casting", "PeftInputAutocastDisableHook"
_LISTS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
"""torch's dictionaries of hooks, which every module has."""


class Hooks(NamedTuple):
    """What the hooks of a module come to that a fused forward can serve."""

    dtype: torch.dtype | None
    """The dtype to which they convert the weights for the time of a call; None where they convert nothing."""
    moves: tuple[tuple[bool, bool], ...]
    """For each hook that moves x to the weight's device: whether it does, and whether it moves the result back."""


class Slot(NamedTuple):
    """The place in which the innermost forward of a chain of hooks is kept."""

    holder: dict[str, Any]
    name: str
    hooks: tuple[Any, ...]
    """The hooks around it, the outermost first: objects with accelerate's or diffusers' methods, or ms-swift's
    function."""

    @property
    def forward(self) -> Any:
        """The innermost forward: a method that is bound to the module."""
        return self.holder[self.name]


class Elsewhere(str):
    """The reason why a call is not computed where x is, which holds where it is computed."""

    there: torch.device
    back: torch.device


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def of(module: Any) -> Hooks | str:
    """Return what the hooks on `module` come to, or the name of one that a fused forward cannot stand in for."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        name, hook = next((name, hook) for name in _LISTS for hook in (own[name] or {}).values())
        return f"a {_LISTS[name]}, {_name_of(hook)}"
    if "forward" not in own:
        return Hooks(None, ())
    slot = innermost(module)
    if isinstance(slot, str):
        return slot
    if slot.forward.__func__ is not type(module).forward:
        return f"a forward of its own, {_name_of(slot.forward)}"
    return _served(module, slot)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def only_placed(device: torch.device, *modules: Any) -> bool:
    """Return whether the hooks of modules do nothing in a call whose x is on `device`: they would move x to where it
    is, and all weights are there."""
    for module in modules:
        if has_hooks(module):
            hooks = of(module)
            if isinstance(hooks, str) or hooks.dtype is not None:
                return False
        there = _device_of(module)
        if there is not None and there != device:
            return False
    return True


def refusal(whose: str, module: Any) -> str:
    """Return why the hooks of `module` leave a call to PEFT, "" where they do not. A fused forward that asks here
    reads the weights as they are stored, so it is not one for weights that hooks convert."""
    if not has_hooks(module):  # torch 2.6 cannot trace `of` for some modules of PEFT
        return ""
    found = of(module)
    if isinstance(found, str):
        return refused(whose, found)
    return "" if found.dtype is None else refused(whose, f"layerwise casting to {found.dtype}")


def refused(whose: str, what: str) -> str:
    """Return the reason for hooks that cannot be served: `what` names them, `whose` the module."""
    way_out = "remove them, or put them on the LoRA layer"
    return f"{whose} has hooks, which the fused path would pass over ({what}): {way_out}"


def converted(module: Any) -> bool:
    """Return whether hooks convert the weights of `module` in every call."""
    found = of(module) if has_hooks(module) else None
    return isinstance(found, Hooks) and found.dtype is not None


def of_adapter(layer: Any, name: str) -> tuple[torch.dtype | None, torch.dtype | None] | str:
    """Return the dtypes to which hooks convert lora_A and lora_B of adapter `name`, None where they do not, or why the
    hooks leave the call to PEFT."""
    found: list[torch.dtype | None] = []
    base = _device_of(layer._modules["base_layer"])
    for modules in (layer._modules["lora_A"], layer._modules["lora_B"]):
        module = modules._modules[name]
        hooks = of(module)
        if isinstance(hooks, str):
            return refused(f"adapter {name!r}", hooks)
        weight = module.weight
        if base is not None and weight.device != base:
            return f"adapter {name!r} is on {weight.device}, and the base weight on {base}: put both on one device"
        dtype = hooks.dtype
        if dtype is not None and weight.dtype != dtype:
            what = f"adapter {name!r} has layerwise casting from {weight.dtype} to {dtype}"
            if layer.cast_input_dtype_enabled and not _keeps_input_dtype(layer):
                return f"{what}, and PEFT converts x to the first: use peft.helpers.disable_input_dtype_casting"
            if weight.requires_grad and torch.is_grad_enabled():
                return f"{what}, in which it would have its gradients: leave what is trained out of it"
        found.append(dtype)
    return found[0], found[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _keeps_input_dtype(layer: Any) -> bool:
    """Return whether a hook of diffusers on `layer` keeps PEFT from converting x in a call."""
    slot = innermost(layer) if "forward" in layer.__dict__ else ""
    return not isinstance(slot, str) and any(
        (type(hook).__module__, type(hook).__qualname__) == _KEEPS_INPUT for hook in slot.hooks
    )


def converted_to(
    dtypes: tuple[torch.dtype | None, torch.dtype | None], a: Tensor, b: Tensor, b_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return A, B and the bias of B in the `dtypes` of `of_adapter`."""
    of_a, of_b = dtypes
    if of_b is not None:
        b, b_bias = b.to(of_b), None if b_bias is None else b_bias.to(of_b)
    return a if of_a is None else a.to(of_a), b, b_bias


def not_there(name: str, x: Tensor, weight: Tensor) -> str:
    """Return the reason for an input that is not on the device of the weight."""
    return f"{name} is on {x.device}, and the weight on {weight.device}: move it there"


def elsewhere(layer: Any, x: Tensor, w: Any, names: list[str] | None) -> Elsewhere | str:
    """Return why a call with an x that is not on the device of W is not computed where x is: hooks move it there and
    the result back, or PEFT's forward has to say what is wrong. `names` are PEFT's adapter_names."""
    reason = not_there("x", x, w)
    modules = layer._modules
    back = result_of(modules["base_layer"], x.device, w.device)
    first, second = (getattr(modules.get(name), "_modules", None) for name in ("lora_A", "lora_B"))
    if back is None or first is None or second is None:
        return reason
    for name in layer.active_adapters if names is None else dict.fromkeys(names):
        if name in first:
            between = result_of(first[name], x.device, w.device)
            if between is None or result_of(second[name], between, w.device) != back:
                return reason
    found = Elsewhere(reason)
    found.there, found.back = w.device, back
    return found


def result_of(module: Any, given: torch.device, there: torch.device) -> torch.device | None:
    """Return the device of what `module`, whose weight is `there`, returns for an x on the device `given`; None where
    it does not move x to its weight."""
    found = of(module)
    if isinstance(found, str):
        return None
    at, back = given, None
    for moves, returns in found.moves:
        if returns:
            back = at
        if moves:
            at = there
    return None if at != there else back or there


def innermost(module: Any) -> Slot | str:
    """Return the place of the forward that the hooks on a module with an instance forward lead to, or the name of the
    function that is not known to lead anywhere."""
    own = module.__dict__
    holder, name, hooks = own, "forward", list[Any]()
    while True:
        call = holder.get(name)
        function = getattr(call, "__func__", None)
        if function is not None and getattr(call, "__self__", None) is module:
            if not _is_swift(function):
                return Slot(holder, name, tuple(hooks))
            hooks.append(function)
            holder, name = own, "forward_origin"
        elif isinstance(call, functools.partial) and len(call.args) == 1 and call.args[0] is module:
            made_by = call.func.__module__, call.func.__qualname__
            if made_by == _ACCELERATE:
                hooks.append(own.get("_hf_hook"))
                holder, name = own, "_old_forward"
            elif made_by == _DIFFUSERS:
                function = call.func
                reference: Any = function.__closure__[0].cell_contents  # type: ignore[index]
                hooks.append(reference.pre_forward.__self__)
                name = "forward" if reference.original_forward is None else "original_forward"
                holder = reference.__dict__
            else:
                return f"a forward of its own, {_name_of(call)}"
        else:
            return f"a forward of its own, {_name_of(call)}"


def _is_swift(function: Any) -> bool:
    """Return whether `function` is the forward that ms-swift puts on every lora_A and lora_B."""
    if function.__qualname__ != _SWIFT[1] or function.__module__ != _SWIFT[0]:
        return False
    return not known.unknown_names(function.__code__, _SWIFT_USES)


def _served(module: Any, slot: Slot) -> Hooks | str:
    """Return what the hooks of a chain come to, or the name of one that cannot be served."""
    dtype, hooks = None, list(slot.hooks)
    moves: tuple[tuple[bool, bool], ...] = ()
    there = _device_of(module)
    while hooks:
        hook = hooks.pop(0)
        kind = type(hook)
        made_by = kind.__module__, kind.__qualname__
        if getattr(hook, "no_grad", False):
            return f"{_name_of(kind)} with no_grad"
        if made_by == _ALIGN:
            device = hook.execution_device
            if hook.offload:
                return (
                    f"{_name_of(kind)} with offload=True, for which device_map must name a device that holds the layer"
                )
            if device is not None and there is not None and _device(device) != there:
                return f"{_name_of(kind)} with execution_device={device} beside a weight on {there}"
            moves = (*moves, (device is not None, hook.io_same_device))
        elif kind is FunctionType:  # ms-swift's
            moves = (*moves, (True, False))
        elif made_by in _CASTS:
            dtype = hook.compute_dtype
        elif made_by == _SEQUENCE:
            hooks[:0] = hook.hooks
        elif made_by == _OFFLOAD:
            if hook.prev_module_hook is not None or (there is not None and _device(hook.execution_device) != there):
                return f"{_name_of(kind)}, which moves the weights of modules: put it on the model"
        elif made_by != _PLAIN:
            return f"a hook of the class {_name_of(kind)}"
    return Hooks(dtype, moves)


def _device_of(module: Any) -> torch.device | None:
    """Return the device of the parameters of `module` itself; None for a dropout, which has none."""
    for parameter in module._parameters.values():
        if parameter is not None:
            device: torch.device = parameter.device
            return device
    return None


def _device(device: Any) -> torch.device:
    """Return the device that ``x.to(device)`` takes x to, with its number."""
    found = torch.device(device)
    if found.index is None and found.type not in ("cpu", "meta", "mps"):
        return torch.empty(0, device=found).device
    return found


def _name_of(what: Any) -> str:
    """Return the module and the qualified name of a function, a method, a class or an object with a class."""
    if not hasattr(what, "__qualname__"):
        what = getattr(what, "func", None) or type(what)
    return f"{what.__module__}.{what.__qualname__}"
