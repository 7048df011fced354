"""Rows of a `FusedLoRALinear` with or without its adapter, in the context `lora_kernels.mixed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from lora_kernels.nn.adapter import AdapterLayer

Forward = TypeVar("Forward", bound=Callable[..., Tensor])

NAME = "default"
"""The name of the one adapter of a layer, as PEFT would call it. Its number is 0."""


_FORWARDS: set[Callable[..., Tensor]] = set()
"""The forwards that ask for the context in force. A subclass with a forward of its own may compute something else."""


def asks(forward: Forward) -> Forward:
    """Note that `forward`, the method of a layer, computes by row in a context. Returns it as it is."""
    _FORWARDS.add(forward)
    return forward


def adapter_table(model: nn.Module) -> dict[str, int]:
    """Return the number of the adapter of this package's layers by its name. Raises RuntimeError where one of them
    cannot leave its adapter out of single rows."""
    for name, module in model.named_modules():
        if not (isinstance(module, AdapterLayer) and hasattr(type(module), "adapter_table")):
            continue
        if module.use_dora:
            raise RuntimeError(f"{name or 'the model'} has DoRA, which no row can be without: leave use_dora out")
        if type(module).forward not in _FORWARDS:
            raise RuntimeError(
                f"{name or 'the model'} is a {type(module).__name__}, whose forward computes its adapter for every "
                "row: mixed takes plain FusedLoRALinear and QuantizedLoRALinear layers"
            )
    return {NAME: 0}


def forward_in(context: Any, layer: Any, x: Tensor) -> Tensor:
    """Return the y of a `FusedLoRALinear`, whose adapter has the rows of x that it has in `context`, a `Mixed`.
    Raises RuntimeError for a merged layer."""
    from lora_kernels.core.many import Adapter  # few programs need them, and every one imports the layer
    from lora_kernels.ops.multi import lora_linear_multi

    if layer.merged:
        raise RuntimeError(
            f"a merged {type(layer).__name__} has its adapter in every row: call unmerge() before lora_kernels.mixed"
        )
    p = layer.lora_dropout if layer.training else 0.0
    adapter = Adapter(layer.lora_A, layer.lora_B, layer.scaling, p)
    y = lora_linear_multi(x, layer.frozen_weight(), [adapter], context.of(x), bias=layer.bias, backend=layer.backend)
    return context.computed(layer, y)  # type: ignore[no-any-return]
