"""Values that accelerate keeps elsewhere, on the CPU or on disk, while an offloaded model has empty ones: how they are
read, and how others take their place."""

from __future__ import annotations

import contextlib
import copy
from collections import ChainMap
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Replaced(ChainMap[str, Tensor]):
    """What accelerate has kept of a module, below the values that have taken the place of some of it, which are on the
    CPU. The first map holds these."""


def hook_of(module: nn.Module) -> Any:
    """Return the hook of accelerate that offloads `module`; None where none does. A hook on a module around it, which
    holds the values of every module inside, is not found."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
        if getattr(each, "offload", False) is True and getattr(each, "weights_map", None) is not None:
            return each
    return None


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Give an offloaded module its values while the body runs, on the device on which accelerate computes it. Does
    nothing for any other module.

    The tensors that the body replaces are kept on the CPU from then on, and the next forward takes them. If the body
    raises, nothing is kept.
    """
    hook = hook_of(module)
    if hook is None:
        yield
        return
    try:
        hook.pre_forward(module)
        before = _tensors(module)
        yield
        new = {name: t.detach().cpu() for name, t in _tensors(module).items() if t is not before.get(name)}
        if new:
            if not isinstance(hook.weights_map, Replaced):
                hook.weights_map = Replaced({}, hook.weights_map)
            hook.weights_map.update(new)
    finally:
        hook.post_forward(module, None)


def has_replaced(module: nn.Module, key: str) -> bool:
    """Return whether `onloaded` keeps a tensor in the place of the parameter `key` of `module`."""
    kept = getattr(hook_of(module), "weights_map", None)
    return isinstance(kept, Replaced) and key in kept.maps[0]


def as_kept(module: nn.Module, parameter: nn.Parameter, key: str) -> nn.Parameter:
    """Return the parameter `key` of an onloaded module over the memory in which accelerate keeps it, so that it takes
    no further memory on the device of the computation; `parameter` itself for a module that is not offloaded."""
    hook = hook_of(module)
    if hook is None:
        return parameter
    kept = hook.weights_map[key].detach()
    return nn.Parameter(kept if kept.dtype == parameter.dtype else parameter.detach().cpu(), parameter.requires_grad)


def offload_like(module: nn.Module, linear: nn.Module) -> None:
    """Give `linear`, which takes the place of `module`, the hooks that accelerate has put on `module`. Where they
    offload, the values of `linear` are kept on the CPU."""
    before: Any = module.__dict__.get("_hf_hook")
    if before is None:
        return
    from accelerate.hooks import SequentialHook, add_hook_to_module  # it is there if its hook is

    hooks = [copy.copy(each) for each in getattr(before, "hooks", (before,))]
    devices: list[dict[str, Any]] = [getattr(each, "original_devices", {}) for each in hooks]
    for each in hooks:
        if hasattr(each, "weights_map"):
            each.weights_map = None  # so that they are taken from `linear`
            each.tied_params_names = set()
    add_hook_to_module(linear, hooks[0] if len(hooks) == 1 else SequentialHook(*hooks))
    for each, old in zip(hooks, devices, strict=True):  # where values go when the hook is removed
        for name in getattr(each, "original_devices", ()):
            if name in old and old[name].type != "meta":
                each.original_devices[name] = old[name]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of `module`. A hook may leave buffers where they are, but it has kept them too,
    and puts its own ones back when it is removed."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def value_of(model: nn.Module, module: str, key: str) -> Tensor | None:
    """Return the value of the parameter `key` of the module of a model that has the dotted name `module`.

    Where the parameter is on the meta device, the hooks of accelerate (``cpu_offload``, ``disk_offload``, a
    ``device_map``) are asked for it: those of the module itself, and of the modules around it. The result is None if
    none of them has it.
    """
    tensor: Tensor = getattr(model.get_submodule(module), key)
    if not tensor.is_meta:
        return tensor.detach()
    hook: Any
    parts = module.split(".") if module else []
    for count in range(len(parts), -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:count])), "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
            try:
                return each.weights_map[".".join([*parts[count:], key])].detach()
            except (AttributeError, KeyError, TypeError):  # no hook, one of another kind, or one that offloads nothing
                continue
    return None
