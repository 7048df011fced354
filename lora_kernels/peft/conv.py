"""`FusedConv1d`, `FusedConv2d` and `FusedConv3d`: PEFT's LoRA convolutions on the fused path, for plain LoRA and DoRA.

    result = base(x) + Σ over active adapters of scaling · lora_B(lora_A(dropout(x)))

PEFT (0.19 to 0.21) leaves the base's dilation and padding mode out of lora_A. Its forward then raises, or with
padding="same" returns something else than its own merged layer does. Here lora_A has both, so that unmerged and merged
layers agree. The report of `fuse` names such layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant
from torch import Tensor, nn

from lora_kernels.nn.conv_state import dropped_by_peft
from lora_kernels.nn.dry_run import Watched
from lora_kernels.nn.fit import has_hooks
from lora_kernels.ops.autograd import autocast_of
from lora_kernels.ops.conv import lora_conv, low_rank_conv
from lora_kernels.ops.conv_window import window
from lora_kernels.peft import hooked, known, merged_terms
from lora_kernels.peft.fused import LORA_USES
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.linear import OverDense
from lora_kernels.peft.merging import Sum
from lora_kernels.peft.reading import (
    PeftAdapter,
    base_weights,
    only_eager,
    probability,
    weight_and_bias,
    why_not_biased,
)

_DORA_USES = """
F Identity adapter_name base_layer base_result bias conv_fn detach dilation dim dropout get_base_layer
get_lora_weight get_weight_norm groups isinstance lora_A lora_B lora_dropout lora_magnitude_vector lora_weight nn
padding reshape scaling shape stride training view weight
"""
"""The names that the forwards of PEFT's DoRA over a convolution use."""


class _Operands(NamedTuple):
    """The operands of one forward."""

    weight: Tensor
    bias: Tensor | None
    adapters: dict[str, PeftAdapter]


class FusedConv(FusedLayer):
    """The fused forward of PEFT's LoRA convolutions. A subclass inherits from this class and then from `peft_class`."""

    base_class: Any
    """The class of torch that the base and the parts of the adapters have."""
    variant: Any
    """PEFT's class of DoRA over such a base."""
    magnitude: Any
    """PEFT's class of the magnitude."""

    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    lora_magnitude_vector: Any
    scaling: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns for x [B, C, ...] or [C, ...]; with the base's dilation and padding mode
        in both halves."""
        compiling = torch.compiler.is_compiling()
        operands = self.read(x, args, kwargs)
        if isinstance(operands, str):
            if not compiling:
                self.count_left(operands)
            return cast(Tensor, self.peft_class.forward(self, x, *args, **kwargs))
        if not compiling:
            self.__dict__["fused_calls"] += 1
        return self._compute(x, operands)

    def _compute(self, x: Tensor, operands: _Operands) -> Tensor:
        base = self.base_layer
        weight, bias, adapters = operands
        first, *others = adapters.values()
        for each in adapters.values():
            if each.b_bias is not None:
                term = each.b_bias.to(x.dtype) * each.scale
                bias = term if bias is None else bias + term
        moves = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        y = lora_conv(
            x,
            weight,
            first.a,
            first.b,
            scale=first.scale,
            bias=bias,
            dropout_p=first.p,
            magnitude=first.magnitude,
            backend=self._backend,
            **moves,
        )
        if not others:
            return y
        dtype, where = y.dtype, window(weight.shape[2:], **moves)
        for each in others:
            y = y + low_rank_conv(x, each.a, each.b, where, scale=each.scale, dropout_p=each.p)
        return y.to(dtype)

    def read(self, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> _Operands | str:
        """Return the operands of a forward with these arguments, or why PEFT's own forward serves it: "" where no
        adapter is to be computed. They are read in every call, because PEFT's users may change all of them."""
        if self.disable_adapters or self.merged:
            return "" if not kwargs else "further arguments beside disabled or merged adapters"
        if args or kwargs:
            named = "adapter_names" in kwargs
            return "adapter_names over a convolution" if named else "further arguments for the base layer"
        base = self.read_base(self)
        if isinstance(base, str):
            return base
        weight, bias = base
        if x.device != weight.device:
            return hooked.not_there("x", x, weight)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return ""
        if len(set(active)) < len(active):
            return "an adapter that is active twice"
        adapters: dict[str, PeftAdapter] = {}
        for name in active:
            adapter = self.read_adapter(self, name)
            if isinstance(adapter, str):
                return adapter
            adapters[name] = adapter
        if len(active) > 1 and any(each.magnitude is not None for each in adapters.values()):
            return "a DoRA adapter beside others"
        reader: Any = OverDense
        dtypes = reader._dtypes(self, x, weight, adapters, autocast_of(x))
        if isinstance(dtypes, str):
            return dtypes
        inner = dtypes[0]
        if any(each.b_bias is not None for each in adapters.values()) and (reason := why_not_biased(inner)):
            return reason
        dropout = any(each.p > 0 for each in adapters.values())
        if dropout and self._backend is None and not dropped_by_peft(self.base_layer):
            a = next(iter(adapters.values())).a
            pair = inner, torch.float32 if a.dtype == torch.float32 else inner
            if only_eager(x.device, pair, (weight.shape[0], weight[0].numel(), a.shape[0]), True, "dense"):
                return "no kernel for dropout here, and PEFT's own forward is faster than plain torch operations"
        return _Operands(weight, bias, adapters)

    @classmethod
    def read_base(cls, layer: Any) -> tuple[Tensor, Tensor | None] | str:
        """Return the weight and bias of the frozen base of `layer`, or why they cannot be used."""
        base = layer._modules["base_layer"]
        if type(base) is not cls.base_class:
            return f"its base is a {type(base).__name__}, not torch's own {cls.base_class.__name__}"
        weight, bias = weight_and_bias(base)
        if type(weight) not in (nn.Parameter, Tensor):
            return f"its base weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "its base weight is trained"
        if has_hooks(base):
            hooks = hooked.of(base)
            if isinstance(hooks, str):
                return hooked.refused("its base layer", hooks)
            return base_weights(base, hooks)
        return weight, bias

    @classmethod
    def read_adapter(cls, layer: Any, name: str) -> PeftAdapter | str:
        """Return adapter `name` of `layer`, which may not be fused yet, or why it cannot be fused."""
        base, modules = layer.base_layer, layer._modules
        down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        if type(down) is not cls.base_class or type(up) is not cls.base_class or down.bias is not None:
            return f"adapter {name!r} consists of a {type(down).__name__} and a {type(up).__name__}"
        same = all(getattr(down, each) == getattr(base, each) for each in ("kernel_size", "stride", "padding"))
        if not same or down.groups != 1 or up.groups != base.groups or any(k != 1 for k in up.kernel_size):
            return f"adapter {name!r} has a stride, padding or groups of its own"
        a, (b, b_bias) = down.weight, weight_and_bias(up)
        for weight in (a, b):
            if type(weight) not in (nn.Parameter, Tensor):
                return f"adapter {name!r} has a {type(weight).__name__}"
        if has_hooks(down, up):
            hooks = hooked.of_adapter(layer, name)
            if isinstance(hooks, str):
                return hooks
            a, b, b_bias = hooked.converted_to(hooks, a, b, b_bias)
        if a.dtype != b.dtype:
            return f"adapter {name!r} has lora_A in {a.dtype} and lora_B in {b.dtype}"
        p = probability(dropout, name)
        if isinstance(p, str):
            return p
        magnitude = None
        if name in layer.lora_variant:
            if reason := cls._why_not_variant(layer, name):
                return reason
            magnitude = layer.lora_magnitude_vector[name].weight
        return PeftAdapter(a, b, b_bias, layer.scaling[name], p, magnitude)

    @classmethod
    def _why_not_variant(cls, layer: Any, name: str) -> str:
        """Return why adapter `name`, which is not plain LoRA, cannot be fused, or "" where it can."""
        kind = type(layer.lora_variant[name])
        if kind is not cls.variant:
            return f"adapter {name!r} is a {kind.__name__}"
        if reason := known.why_not(kind, _DORA_USES) or known.why_not(cls.magnitude, _DORA_USES):
            return reason
        if layer.base_layer.groups > 1:
            return f"adapter {name!r} is DoRA over groups, where PEFT takes the norm of no weight"
        if layer.lora_B[name].bias is not None:
            return f"adapter {name!r} is DoRA with a bias of its own"
        return hooked.refusal(f"the magnitude of adapter {name!r}", layer.lora_magnitude_vector[name])

    def sums(self, names: Sequence[str]) -> Sequence[Sum]:
        """Return what merging the adapters `names` adds to the weight [N, C, ...] and the bias."""
        base = self.base_layer
        if base.groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        terms = []
        for name in names:
            merged_terms.check_variant(self, name)
            a, b = self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1)
            scale, magnitude = merged_terms.scale_of(self, name), merged_terms.magnitude(self, name)
            terms.append(merged_terms.product(a, b, scale, False, magnitude))
        return [Sum(base, "weight", terms, _as_rows), *merged_terms.biases(self, base, names)]

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forwards of this class are not those that this package knows, or "" where they are."""
        return known.why_not(cls.peft_class, LORA_USES, "forward", "_mixed_batch_forward")

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the size of the base and the adapters of `layer`, or why its base cannot be read."""
        base = cls.read_base(layer)
        if isinstance(base, str):
            return base
        adapters = [cls.read_adapter(layer, name) for name in layer.lora_A]
        reasons = [why for why in adapters if isinstance(why, str)]
        if any(isinstance(each, PeftAdapter) and each.b_bias is not None for each in adapters):
            reasons += filter(None, [why_not_biased(base[0].dtype)])
        ranks = ", ".join(f"{name} r={layer.r[name]}" for name in layer.lora_A)
        conv = layer.base_layer
        text = f"{conv.in_channels}→{conv.out_channels}, kernel {'×'.join(map(str, conv.kernel_size))}, {ranks}"
        if dropped := dropped_by_peft(conv):
            text += f"; the adapter has {dropped} of its base, which PEFT's own forward leaves out"
        return Survey(text, tuple(reasons))

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or self.disable_adapters or not active:
            return None
        a = [self.lora_A[name].weight for name in active]
        return Watched(
            cast(nn.Module, self), [self.base_layer.weight], a, lambda: (self.fused_calls, dict(self.passed_over))
        )


def _as_rows(w: Tensor) -> Tensor:
    """Return the weight of a convolution as a stack of one matrix."""
    return w.flatten(1)[None]


class FusedConv1d(FusedConv, peft_layer.Conv1d):
    """PEFT's LoRA over an ``nn.Conv1d``."""

    peft_class, base_class = peft_layer.Conv1d, nn.Conv1d
    variant, magnitude = DoraConv1dVariant, DoraConv1dLayer


class FusedConv2d(FusedConv, peft_layer.Conv2d):
    """PEFT's LoRA over an ``nn.Conv2d``."""

    peft_class, base_class = peft_layer.Conv2d, nn.Conv2d
    variant, magnitude = DoraConv2dVariant, DoraConv2dLayer


class FusedConv3d(FusedConv, peft_layer.Conv3d):
    """PEFT's LoRA over an ``nn.Conv3d``."""

    peft_class, base_class = peft_layer.Conv3d, nn.Conv3d
    variant, magnitude = DoraConv3dVariant, DoraConv3dLayer
