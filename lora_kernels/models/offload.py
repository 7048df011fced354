"""Values of parameters that accelerate keeps elsewhere, on the CPU or on disk, while the model has empty ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
