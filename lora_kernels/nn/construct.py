"""A fused layer made over the weight of another layer, or over a weight in 4 or 8 bits: what `from_linear`, `over` and
`from_bnb` do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn.init_values import FIRST_VALUES
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.quant.weight import QuantizedWeight, quantize_weight


def _split(init: str, quant: str | None) -> Callable[..., Any] | None:
    """Return what `split_named` returns. Its module is imported where W is split, because most programs split none, and
    importing the package is to stay quick."""
    if init in FIRST_VALUES:
        return None
    from lora_kernels.nn.init_schemes import split_named

    return split_named(init, quant)


def over_dense(kind: Any, linear: Any, settings: LoRASettings) -> Any:
    """Return a layer of class `kind`, a `FusedLoRALinear`, over `linear`'s own weight and bias, or over the base that
    the initialisation makes. `FusedLoRALinear.from_linear` documents the errors."""
    if settings.double_quant:
        raise ValueError('double_quant is for quant="nf4" and quant="fp4", and quant is None')
    if not linear.weight.is_floating_point():
        raise TypeError(
            f"the weight of this {type(linear).__name__} is {linear.weight.dtype}, quantised already: "
            "QuantizedLoRALinear.from_bnb takes the layers of bitsandbytes"
        )
    split, weight, start = _split(settings.init, None), cast(nn.Parameter, linear.weight), ()
    if split is not None:
        base, *start = split(kind.turned(weight), settings.r, settings.scaling)
        weight = nn.Parameter(kind.turned(base).contiguous(), requires_grad=False)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.in_features, module.out_features = kind.sizes_of(linear)
    module.register_parameter("weight", weight)
    module.register_parameter("bias", linear.bias)
    module.training = linear.training
    module._add_adapter(settings)
    module._start(settings.init, *start)
    return module


@torch.inference_mode(False)  # what is made in inference mode could not be trained later
@torch.no_grad()
def put_split(layer: Any, init: str, base: Tensor, a: Tensor, b: Tensor) -> None:
    """Give `layer`, a `FusedLoRALinear`, the `base` [N, K], A and B into which the scheme `init` has split its weight.
    The base becomes a Parameter of its own, and who shares the old one keeps it."""
    layer.weight = nn.Parameter(layer.turned(base).contiguous(), requires_grad=False)
    layer._start(init, a, b)


@torch.inference_mode(False)  # what is made in inference mode could not be trained later
@torch.no_grad()
def over_codes(kind: Any, weight: QuantizedWeight, bias: nn.Parameter | None, settings: LoRASettings) -> Any:
    """Return a layer of class `kind`, a `QuantizedLoRALinear`, over `weight`, whose tensors are shared, and `bias`.
    `QuantizedLoRALinear.over` documents the errors."""
    settings.check()
    weight.check()
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias {tuple(bias.shape)} does not fit a weight of {weight.shape}")
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.out_features, module.in_features = weight.shape
    module._unmerged = None
    module._put(weight)
    module.register_parameter("bias", bias)
    module._add_adapter(settings)
    return module


def over_quantised(kind: Any, linear: nn.Linear, settings: LoRASettings) -> Any:
    """Return a layer of class `kind`, a `QuantizedLoRALinear`, over `linear`'s weight, quantised as `settings` say, and
    its bias."""
    format = settings.quant
    assert format is not None
    how: dict[str, Any] = {"blocksize": settings.blocksize, "double_quant": settings.double_quant}
    split, start = _split(settings.init, format), ()
    if split is None:
        weight = quantize_weight(linear.weight, format, **how)
    else:
        weight, *start, _ = split(linear.weight, settings.r, settings.scaling, format=format, **how)
    module = over_codes(kind, weight, linear.bias, settings)
    module._start(settings.init, *start)
    return module.train(linear.training)
