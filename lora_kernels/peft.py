"""PEFT's LoRA linears on the fused path: `fuse` a model, or `enable` fusing for every model that PEFT builds.

A layer's class is changed to a subclass that overrides ``forward`` alone, so that merging, saving, loading, swapping,
switching and deleting adapters stay PEFT's. What the kernels cannot serve, layer by layer and call by call, goes to
PEFT's own forward; `FuseReport` tells where and why.

    result = base(x) + Σ over active adapters of scaling · lora_B(lora_A(dropout(x)))      as PEFT defines it, and DoRA
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import check, dispatch, peft_groups
from lora_kernels.dora import dora_linear
from lora_kernels.ops import lora_linear
from lora_kernels.peft_groups import FAMILIES, SharedInput

try:
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora import layer as peft_layer
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError(
        f"fuse() and enable() work on models of PEFT, which is not there ({error}): pip install peft. Plain PyTorch "
        "models take lora_kernels.apply_lora or FusedLoRALinear.from_linear"
    ) from error

__all__ = ["FuseReport", "FusedLinear", "disable", "enable", "fuse", "unfuse"]

_IGNORED = frozenset(getattr(peft_layer, "VARIANT_KWARG_KEYS", ()))
"""Keywords of PEFT's variants, which its plain LoRA takes and drops."""


class FusedLinear(peft_layer.Linear):
    """PEFT's LoRA linear, computed by `lora_kernels.lora_linear` where that serves the call.

    Attributes:
        fused_calls: how many forwards took the fused path (not counted inside ``torch.compile``).
        passed_over: why others went to PEFT's own forward: reason → how many.
    """

    fused_calls: int
    passed_over: Counter[str]
    _backend: str | None
    _group: SharedInput | None
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: `x` [..., in_features], and optionally ``adapter_names``, one for each of x's first dimension."""
        if self._group is not None and not args and not kwargs and (y := self._group.take(self, x)) is not None:
            if not torch.compiler.is_compiling():
                self.fused_calls += 1
            return y
        names = kwargs.get("adapter_names")
        reason = self.why_not_now(x, args, kwargs, names)
        if not torch.compiler.is_compiling():
            if reason is None:
                self.fused_calls += 1
            elif reason:
                self.passed_over[reason] += 1
        if reason is not None:
            return super().forward(x, *args, **kwargs)
        if names is None:
            return self._fused(x, [name for name in self.active_adapters if name in self.lora_A])
        self._check_forward_args(x, adapter_names=names)
        return self._fused_by_sample(x, names)

    def _get_name(self) -> str:
        return "Linear"  # PEFT's repr, which begins with lora.Linear

    def extra_repr(self) -> str:
        """Tells a fused layer from PEFT's own."""
        return "fused by lora_kernels"

    def why_not_now(
        self,
        x: Tensor,
        args: Any = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        names: list[str] | None = None,
    ) -> str | None:
        """None where the fused path serves the call; "" where no adapter is to be computed; else the reason."""
        if self.disable_adapters or self.merged:
            return "" if names is None else "adapter_names beside disabled or merged adapters"
        if args or any(key != "adapter_names" and key not in _IGNORED for key in kwargs):
            return "further arguments for the base layer"
        if reason := _base_reason(self):
            return reason
        active = [name for name in (self.active_adapters if names is None else set(names)) if name in self.lora_A]
        if not active:
            return ""
        if (len(active) > 1 or names is not None) and any(name in self.lora_variant for name in active):
            return "a DoRA adapter beside others"
        weight: Any = self.get_base_layer().weight
        # Autocast leaves fp64 as it is.
        autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
        if x.dtype not in check.DTYPES or (x.dtype != weight.dtype and not autocast):
            return f"x is {x.dtype}, the base weight {weight.dtype}"
        for name in active:
            if reason := _adapter_reason(self, name):
                return reason
            dtype = self.lora_A[name].weight.dtype
            if dtype not in (x.dtype, torch.float32) and not (autocast and dtype in check.HALVES):
                return f"adapter {name!r} is {dtype} beside {x.dtype}"
            if dtype != x.dtype and not (self.cast_input_dtype_enabled and x.dtype in check.HALVES) and not autocast:
                return f"adapter {name!r} is {dtype} beside {x.dtype}, and x may not be converted"
        return None

    def operands(self, *names: str) -> tuple[Tensor, Tensor, Tensor, float | Tensor, Tensor | None, float]:
        """(weight, lora_a, lora_b, scale, bias, dropout_p) of the base with one adapter, or with several that have no
        dropout: those are one of their ranks' sum."""
        base: Any = self.get_base_layer()
        weight = base.weight.t() if self.fan_in_fan_out else base.weight
        bias = base.bias
        for name in names:
            if (own := self.lora_B[name].bias) is not None:
                term = own * self.scaling[name]
                bias = (term if bias is None else bias + term).to(weight.dtype)
        if len(names) == 1:
            a, b, scale = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight, self.scaling[names[0]]
        else:
            a = torch.cat([self.lora_A[name].weight for name in names])
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], 1)
            scale = 1.0
        return weight, a, b, scale, bias, _rate(self.lora_dropout[names[0]])

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        if names[0] in self.lora_variant:
            return self._fused_dora(x, names[0])
        together = names if {_rate(self.lora_dropout[name]) for name in names} == {0.0} else names[:1]
        weight, a, b, scale, bias, p = self.operands(*together)
        y = lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p, backend=self._backend)
        dtype = y.dtype
        for name in names[len(together) :]:  # each with a mask of its own
            low = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            y = y + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](low))) * self.scaling[name]
        return y.to(dtype)

    def _fused_dora(self, x: Tensor, name: str) -> Tensor:
        base: Any = self.get_base_layer()
        return dora_linear(
            x,
            base.weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.lora_magnitude_vector[name].weight,
            scale=self.scaling[name],
            bias=base.bias,
            dropout_p=_rate(self.lora_dropout[name]),
            # ‖W‖² anew in every call: PEFT writes W through .data, which no cache can see
            weight_norm_sq=None,
            backend=self._backend,
        )

    def _fused_by_sample(self, x: Tensor, names: list[str]) -> Tensor:
        """One call per adapter, over the samples that ask for it."""
        base: Any = self.get_base_layer()
        order: list[int] = []
        parts = []
        for name in dict.fromkeys(names):
            indices = [i for i, other in enumerate(names) if other == name]
            order += indices
            part = x[indices]
            parts.append(self._fused(part, [name]) if name in self.lora_A else base(part))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back.to(x.device)]


def _rate(dropout: nn.Module) -> float:
    """p of the dropout as it stands: 0 while not training."""
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _base_reason(layer: Any) -> str | None:
    """Why no adapter of `layer` can be fused with its base; None where one can."""
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer):
        return "its base is another tuner's layer"
    if type(base).forward is nn.Linear.forward:
        if layer.fan_in_fan_out:
            return "fan_in_fan_out over an nn.Linear"
    elif not layer.is_target_conv_1d_layer:
        return f"its base is a {type(base).__name__} with a forward of its own"
    weight = base.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its base weight is a {type(weight).__name__}"
    if weight.requires_grad:
        return "its base weight is trained"
    return "its base layer has hooks, which the fused path would pass over" if _has_hooks(base) else None


def _adapter_reason(layer: Any, name: str) -> str | None:
    """Why adapter `name` of `layer` cannot be fused; None where it can."""
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant:
        kind = type(layer.lora_variant[name])
        if kind is not DoraLinearVariant:
            return f"adapter {name!r} is a {kind.__name__}"
        if layer.fan_in_fan_out or b.bias is not None or _has_hooks(layer.lora_magnitude_vector[name]):
            return f"adapter {name!r} is DoRA over a Conv1D, with a bias of its own or with hooks"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None:
        return f"adapter {name!r} consists of a {type(a).__name__} and a {type(b).__name__}"
    for weight in (a.weight, b.weight):
        if type(weight) not in (nn.Parameter, Tensor):
            return f"adapter {name!r} has a {type(weight).__name__}"
    if _has_hooks(a) or _has_hooks(b):
        return f"adapter {name!r} has hooks, which the fused path would pass over"
    if type(dropout) not in (nn.Dropout, nn.Identity) or _has_hooks(dropout):
        return f"adapter {name!r} has a dropout of its own: {type(dropout).__name__}"
    return f"adapter {name!r} drops everything: p = {dropout.p}" if _rate(dropout) >= 1 else None


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: prints as a table."""

    fused: dict[str, str]
    """Module → its size and adapters."""
    not_fused: dict[str, str]
    """Module → why PEFT's own forward serves it, all adapters or some."""
    groups: dict[str, SharedInput] = field(default_factory=dict)
    """Module → its children that are computed by one call, with ``group``."""

    def __str__(self) -> str:
        rows = [(name, "fused", what) for name, what in self.fused.items()]
        rows += [(name, "not fused", why) for name, why in self.not_fused.items()]
        head = f"{len(self.fused)} of {len(rows)} LoRA layers fused"
        if not rows:
            return f"{head}: the model has none"
        rows += [(name, "grouped", str(group)) for name, group in self.groups.items()]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join([head, *(f"  {name:{width}}  {state:9}  {what}" for name, state, what in rows)])


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
    backend: str | None = None,
    group: bool | Sequence[Sequence[str]] = False,
) -> FuseReport:
    """Put every LoRA linear of a PEFT model on the fused path. Call it after ``get_peft_model`` or ``from_pretrained``,
    before wrapping or compiling. Calling it again takes in layers that have come since.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside.
        strict: raise, and change nothing, where a layer or an adapter cannot be fused.
        backend: by name, for all layers; it then never falls back. None: chosen per call.
        group: compute layers that read the same x by one call, each with its own dropout mask: True for the names of
            `lora_kernels.peft_groups.FAMILIES` (q/k/v and gate/up of Llama, Qwen, Mistral, Gemma; query/key/value of
            BERT and ViT), or such names of another model, as in ``[("wq", "wk", "wv")]``. A group whose layers turn out
            to be called with different inputs ends (see its ``dissolved``).

    Returns:
        Which layers are fused, which are not, and why. A fused layer still leaves single calls to PEFT: those that ask
        for something else (see `FusedLinear.passed_over`).

    Raises:
        RuntimeError: with `strict`, with the report.
        ValueError: for a back-end there is none of.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"there is no back-end {backend!r}: one of {', '.join(dispatch.BACKENDS)}, or None")
    fused, not_fused, layers = {}, {}, []
    layer: Any
    for path, layer in model.named_modules():
        if not isinstance(layer, peft_layer.LoraLayer):
            continue
        if reason := _layer_reason(layer):
            not_fused[path] = reason
            continue
        layers.append(layer)
        reasons = {name: why for name in layer.lora_A if (why := _adapter_reason(layer, name))}
        if reasons:
            not_fused[path] = "; ".join(reasons.values())
        else:
            ranks = ", ".join(f"{name} r={layer.r[name]}" for name in layer.lora_A)
            fused[path] = f"{layer.in_features}→{layer.out_features}, {ranks}"
    if strict and not_fused:
        raise RuntimeError(
            "fuse(strict=True) found LoRA layers that cannot be fused; nothing was changed.\n"
            f"{FuseReport(fused, not_fused)}"
        )
    for layer in layers:
        _swap(layer, backend)
    families = FAMILIES if group is True else group or ()
    return FuseReport(fused, not_fused, peft_groups.group(model, FusedLinear, families))


def unfuse(model: nn.Module) -> None:
    """Give every layer PEFT's own class back, as `fuse` found it."""
    for layer in model.modules():
        if isinstance(layer, FusedLinear):
            _leave_group(layer)
            layer.__class__ = peft_layer.Linear  # type: ignore[assignment]
            del layer.fused_calls, layer.passed_over, layer._backend, layer._group


def _layer_reason(layer: Any) -> str | None:
    if type(layer) not in (peft_layer.Linear, FusedLinear):
        return f"a {type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}, not a plain linear"
    return _base_reason(layer)


def _swap(layer: Any, backend: str | None) -> None:
    if not isinstance(layer, FusedLinear):
        layer.__class__ = FusedLinear
        layer.fused_calls, layer.passed_over, layer._group = 0, Counter(), None
    _leave_group(layer)
    layer._backend = backend


def _leave_group(layer: FusedLinear) -> None:
    if layer._group is not None:
        layer._group.dissolve("fuse was called anew, or unfuse")


_create = LoraModel.__dict__["_create_new_module"]


def _create_fused(*args: Any, **kwargs: Any) -> Any:
    module = _create.__func__(*args, **kwargs)
    if (
        type(module) is peft_layer.Linear
    ):  # whatever else speaks against it may still change, and is asked at every call
        _swap(module, None)
    return module


def enable() -> None:
    """Fuse every LoRA linear that PEFT makes from now on: for code that builds the PEFT model itself, such as TRL's
    trainers. Until `disable`; calling it twice does no more than once."""
    LoraModel._create_new_module = staticmethod(_create_fused)  # type: ignore[method-assign]


def disable() -> None:
    """End what `enable` began. Layers that are fused stay so (see `unfuse`)."""
    LoraModel._create_new_module = _create  # type: ignore[method-assign]
