"""Rows of a `FusedLoRALinear` with or without its adapter, in the context `lora_kernels.mixed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_kernels.nn.adapter import AdapterLayer

if TYPE_CHECKING:
    from lora_kernels.nn.mixed import Mixed

NAME = "default"
"""The name of the one adapter of a layer, as PEFT would call it. Its number is 0."""


def adapter_table(model: nn.Module) -> dict[str, int]:
    """Return the number of the adapter of this package's layers by its name. Raises RuntimeError where one of them
    cannot leave its adapter out of single rows."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and hasattr(type(module), "adapter_table") and module.use_dora:
            raise RuntimeError(f"{name or 'the model'} has DoRA, which no row can be without: leave use_dora out")
    return {NAME: 0}


def forward_in(context: Mixed, layer: Any, x: Tensor) -> Tensor:
    """Return the y of a `FusedLoRALinear`, whose adapter has the rows of x that it has in `context`. Raises
    RuntimeError for a merged layer."""
    from lora_kernels.core.many import Adapter  # few programs need them, and every one imports the layer
    from lora_kernels.ops.multi import lora_linear_multi

    if layer.merged:
        raise RuntimeError(
            f"a merged {type(layer).__name__} has its adapter in every row: call unmerge() before lora_kernels.mixed"
        )
    p = layer.lora_dropout if layer.training else 0.0
    adapter = Adapter(layer.lora_A, layer.lora_B, layer.scaling, p)
    y = lora_linear_multi(x, layer.frozen_weight(), [adapter], context.of(x), bias=layer.bias, backend=layer.backend)
    return context.computed(layer, y)
