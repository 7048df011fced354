"""The merged stacks W + s·B·A of a module of experts, and the plain module that holds them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn import experts_form, merging, offload

BRING_BACK = "Call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"


def merged_stacks(layer: Any, safe: bool) -> dict[str, Tensor]:
    """Return W_e + s·B_e·A_e for each stack of `layer`, a `FusedLoRAExperts`, that has an adapter, in the layout in
    which the stack is stored. Only one expert at a time is computed in fp64.

    Raises ValueError for a module that is offloaded or on the meta device, for stacks that are parametrised or sharded,
    and with `safe` for a result that is not finite.
    """
    kind = type(layer).__name__
    if offload.hook_of(layer) is not None:
        raise ValueError(f"this {kind} is offloaded by accelerate: nothing was changed. {BRING_BACK}")
    merging.refuse_absent(layer)
    made = {}
    for name in layer.target_parameters:
        stored, (a, b) = layer._parameters.get(name), layer.pair(name)
        if stored is None or any(hasattr(t, "placements") for t in (stored, a, b)):
            raise ValueError(
                f"{name} of this {kind} is parametrised or sharded: nothing was changed. Merge a module whose "
                "parameters are whole and its own"
            )
        w = experts_form.projection(layer, name).weight
        stack = torch.empty_like(stored)
        rows = stack.transpose(1, 2) if layer.is_transposed else stack
        for e in range(layer.num_experts):
            rows[e] = merging.updated_weight(w[e].__getitem__, a[e], b[e], float(layer.scaling), w.dtype)
        if safe:
            merging.refuse_nonfinite(stack, layer.scaling)
        made[name] = stack
    return made


def plain(layer: Any, stacks: dict[str, Tensor]) -> nn.Module:
    """Return a module of the class that `layer`, a `FusedLoRAExperts`, stands for, with the weights `stacks` and copies
    of its other parameters and modules."""
    kind = layer.experts_class
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__.update({name: layer.__dict__[name] for name in layer.plain_attributes if name in layer.__dict__})
    for name, p in layer._parameters.items():
        if name.startswith("lora_"):
            continue
        value = stacks[name] if name in stacks else p.detach().clone()
        module.register_parameter(name, nn.Parameter(value, p.requires_grad))
    module._buffers.update(copy.deepcopy(layer._buffers))
    module._modules.update(copy.deepcopy(layer._modules))
    module.training = layer.training
    return module  # type: ignore[no-any-return]
