"""`FusedLinear`: PEFT's LoRA linear over a dense base, on the fused path; `OverDense`, its part for other kinds."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_kernels.nn.fit import has_hooks
from lora_kernels.ops import check
from lora_kernels.peft import folds, hooked, known
from lora_kernels.peft.fused import Fused
from lora_kernels.peft.reading import DROPOUTS, OneAdapter, PeftAdapter, base_weights, only_eager, weight_and_bias

_any_autocast = torch._C._is_any_autocast_enabled  # without the time of asking for one device by its name

DORA_USES = """
F Identity adapter_name base_layer base_result bias dequantize_module_weight detach dtype fan_in_fan_out get_base_layer
get_lora_weight get_weight_norm isinstance linear lora_A lora_B lora_dropout lora_magnitude_vector lora_weight nn
scaling to training transpose view weight
"""
"""The names that the forwards of PEFT's DoRA over a linear layer use."""
_ALORA_USES = """
alora_offsets arange bool device dtype get int len long lora_A lora_B lora_dropout min scaling shape tensor to torch
unsqueeze view weight zeros
"""
"""The names that the forward of PEFT's activated LoRA uses."""
_DORA_UNKNOWN = known.why_not(DoraLinearVariant, DORA_USES) or known.why_not(DoraLinearLayer, DORA_USES)
"""Why DoRA of the installed PEFT cannot be fused; "" for the versions that this package knows."""
_ALORA_UNKNOWN = known.why_not(ALoraLinearVariant, _ALORA_USES)
"""Why activated LoRA of the installed PEFT cannot be fused; "" for the versions that this package knows."""


def dense_base(layer: Any, transposed: bool, of_conv1d: bool) -> tuple[Tensor, Tensor | None] | str:
    """Return W [N, K] and bias of the frozen nn.Linear or Conv1D that `layer` wraps, or why they cannot be used. With
    `transposed` it stores Wᵀ; `of_conv1d` says that it is a Conv1D."""
    base = layer._modules["base_layer"]
    kind = type(base)
    # BaseTunerLayer is an abstract class, for which isinstance takes microseconds.
    if kind is not nn.Linear and isinstance(base, BaseTunerLayer):
        return "its base is another tuner's layer"
    if kind.forward is nn.Linear.forward:
        if transposed:
            return "fan_in_fan_out over an nn.Linear"
    elif not of_conv1d:
        return f"its base is a {kind.__name__} with a forward of its own"
    weight, bias = weight_and_bias(base)
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its base weight is a {type(weight).__name__}"
    if weight.requires_grad:
        return "its base weight is trained"
    if has_hooks(base):
        hooks = hooked.of(base)
        if isinstance(hooks, str):
            return hooked.refused("its base layer", hooks)
        if transposed and hooks.dtype is not None:
            return hooked.refused("its base layer", f"layerwise casting to {hooks.dtype} of a Conv1D")
        weight, bias = base_weights(base, hooks)
    return weight.t() if transposed else weight, bias


class OverDense(Fused):
    """The part of a fused forward that depends on a base in its own floating dtype."""

    @staticmethod
    def known_dtype(layer: Any) -> torch.dtype:
        """Return the dtype of W."""
        base = layer._modules["base_layer"]
        hooks = hooked.of(base)
        dtype: torch.dtype = weight_and_bias(base)[0].dtype
        return hooks.dtype if isinstance(hooks, hooked.Hooks) and hooks.dtype is not None else dtype

    def _dtypes(
        self, x: Tensor, w: Any, adapters: dict[str, PeftAdapter], autocast: torch.dtype | None
    ) -> tuple[torch.dtype, torch.dtype] | str:
        given = x.dtype
        if given not in check.DTYPES or w.dtype not in check.DTYPES or (given != w.dtype and not autocast):
            return f"x is {given}, the base weight {w.dtype}"
        for name, adapter in adapters.items():
            dtype = adapter.a.dtype
            if dtype == given:
                continue
            if dtype != torch.float32 and not (autocast and dtype in check.HALVES):
                return f"adapter {name!r} is {dtype} beside {given}"
            if not (self.cast_input_dtype_enabled and given in check.HALVES) and not autocast:
                return f"adapter {name!r} is {dtype} beside {given}, and x may not be converted"
        inner = autocast or given
        return inner, inner


class FusedLinear(OverDense, peft_layer.Linear):
    """PEFT's LoRA linear over an ``nn.Linear`` or a Conv1D. `lora_kernels.lora_linear` or `dora_linear` computes every
    call that it can serve."""

    peft_class = peft_layer.Linear
    shares_input = True
    lora_magnitude_vector: Any

    def plain_operands(self, x: Tensor) -> OneAdapter | None:
        """Return the operands of a forward with one adapter of plain LoRA over an nn.Linear that has x's dtype, outside
        of autocast for any device. None in every other case, and where anything is unusual."""
        names, modules = self.active_adapters, self._modules
        if len(names) != 1 or self.disable_adapters or self.merged or self.lora_variant or self.fan_in_fan_out:
            return None
        name = names[0]
        try:
            base = modules["base_layer"]
            down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
            dropout = modules["lora_dropout"]._modules[name]
            of_base, of_down, of_up = base._parameters, down._parameters, up._parameters
            w, bias, a, b = of_base["weight"], of_base["bias"], of_down["weight"], of_up["weight"]
            if of_down["bias"] is not None or of_up["bias"] is not None:
                return None
        except KeyError:
            return None
        p = float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0
        dtype, adapter_dtype = x.dtype, a.dtype
        served = (
            type(base) is type(down) is type(up) is nn.Linear
            and type(dropout) in DROPOUTS
            and type(w) is type(a) is type(b) is nn.Parameter
            and not w.requires_grad
            and dtype == w.dtype
            and dtype in check.DTYPES
            and (
                adapter_dtype == dtype
                or (adapter_dtype == torch.float32 and dtype in check.HALVES and self.cast_input_dtype_enabled)
            )
            and b.dtype == adapter_dtype
            and (bias is None or bias.dtype == dtype)
            and p < 1
            and (not has_hooks(base, down, up, dropout) or hooked.only_placed(x.device, base, down, up, dropout))
            and not _any_autocast()
        )
        if not served:
            return None
        if p and self._backend is None:
            (N, K), R = w.shape, a.shape[0]
            if only_eager(x.device, (dtype, adapter_dtype), (N, K, R), True, "dense"):
                return None
        return w, a, b, self.scaling[name], bias, p

    @staticmethod
    def read_base(layer: Any) -> tuple[Tensor, Tensor | None] | str:
        """Return W [N, K] and bias of a frozen nn.Linear or Conv1D, or why they cannot be used. A Conv1D stores Wᵀ."""
        return dense_base(layer, layer.fan_in_fan_out, layer.is_target_conv_1d_layer)

    @staticmethod
    def variant_reason(layer: Any, name: str) -> str | None:
        """Return why the adapter's variant is none that can be fused: DoRA, activated LoRA, or one of
        `lora_kernels.peft.folds`; None where it is one."""
        kind = type(layer.lora_variant[name])
        if kind in folds.UNKNOWN:
            return folds.why_not(layer, name)
        if kind is ALoraLinearVariant:
            return _ALORA_UNKNOWN or None
        if kind is not DoraLinearVariant:
            return f"adapter {name!r} is a {kind.__name__}"
        if _DORA_UNKNOWN:
            return _DORA_UNKNOWN
        if layer.lora_B[name].bias is not None:
            return f"adapter {name!r} is DoRA with a bias of its own"
        return hooked.refusal(f"the magnitude of adapter {name!r}", layer.lora_magnitude_vector[name]) or None
