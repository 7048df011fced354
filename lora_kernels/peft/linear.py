"""The fused path of PEFT's LoRA linears: `Fused`, which every kind shares, and `FusedLinear` over a dense base.

A layer's class is changed to a subclass that overrides ``forward`` alone, so that merging, saving, loading, swapping,
switching and deleting adapters stay PEFT's. What the kernels cannot serve goes to PEFT's own forward, with a reason.

    result = base(x) + Σ over active adapters of scaling · lora_B(lora_A(dropout(x)))      as PEFT defines it, and DoRA
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.ops import check
from lora_kernels.ops.autograd import as_dtype, device_type
from lora_kernels.ops.dora import dora_linear
from lora_kernels.ops.linear import lora_linear
from lora_kernels.peft.groups import SharedInput
from lora_kernels.quant.weight import QuantizedWeight

_IGNORED = frozenset(getattr(peft_layer, "VARIANT_KWARG_KEYS", ()))
"""Keywords of PEFT's variants, which its plain LoRA takes and drops."""


class Fused:
    """What a LoRA linear of PEFT becomes: stands before PEFT's class `plain` among a subclass's bases.

    Subclasses say what their base weight is (`_weight`), when it can be served (`base_reason`, `adapter_reason`,
    `_dtype_reason`), and may compute in another dtype than x's (`_fused`).

    Attributes:
        fused_calls: how many forwards took the fused path (not counted inside ``torch.compile``).
        passed_over: why others went to PEFT's own forward: reason → how many.
    """

    plain: ClassVar[type[Any]]
    stored: ClassVar[bool] = False
    """Whether the base weight is one of 4 or 8 bits."""
    own: ClassVar[dict[str, Callable[[], Any]]] = {
        "fused_calls": int,
        "passed_over": Counter,
        "_backend": lambda: None,
        "_group": lambda: None,
    }
    """The attributes that a fused layer has beside PEFT's, and what makes their first values."""

    fused_calls: int
    passed_over: Counter[str]
    _backend: str | None
    _group: SharedInput | None
    _modules: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    base_layer: Any
    """Never another tuner's, which `base_reason` refuses: get_base_layer() would search for one, at microseconds a
    call."""
    cast_input_dtype_enabled: Any
    _cast_input_dtype: Any
    _check_forward_args: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: `x` [..., in_features], and optionally ``adapter_names``, one for each of x's first dimension."""
        if self._group is not None and not args and not kwargs and (y := self._group.take(self, x)) is not None:
            self._count(None)
            return y
        names = kwargs.get("adapter_names") if kwargs else None
        served = self._served(x, args, kwargs, names)
        if isinstance(served, str):
            self._count(served)
            return self.plain.forward(self, x, *args, **kwargs)
        self._count(None)
        if names is None:
            return self._fused(x, served)
        self._check_forward_args(x, adapter_names=names)
        return self._fused_by_sample(x, names)

    def _count(self, reason: str | None) -> None:
        if torch.compiler.is_compiling():
            return
        if reason is None:
            self.__dict__["fused_calls"] += 1  # nn.Module's setting of an attribute costs microseconds
        elif reason:
            self.passed_over[reason] += 1

    def active(self) -> list[str]:
        """The active adapters that this layer has."""
        adapters = self._modules["lora_A"]._modules
        return [name for name in self.active_adapters if name in adapters]

    def _get_name(self) -> str:
        return self.plain.__name__  # PEFT's repr, which begins with lora.Linear

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
        served = self._served(x, args, kwargs, names)
        return served if isinstance(served, str) else None

    def _served(self, x: Tensor, args: Any, kwargs: Mapping[str, Any], names: list[str] | None) -> list[str] | str:
        """The adapters of a call that the fused path serves, else why it does not."""
        if self.disable_adapters or self.merged:
            return "" if names is None else "adapter_names beside disabled or merged adapters"
        if args or (kwargs and any(key != "adapter_names" and key not in _IGNORED for key in kwargs)):
            return "further arguments for the base layer"
        if reason := self.base_reason(self):
            return reason
        active = self.active() if names is None else [name for name in set(names) if name in self.lora_A]
        if not active:
            return ""
        if (len(active) > 1 or names is not None) and any(name in self.lora_variant for name in active):
            return "a DoRA adapter beside others"
        for name in active:
            if reason := self.adapter_reason(self, name):
                return reason
        return self._dtype_reason(x, active) or self._speed_reason(x, active) or active

    @staticmethod
    def base_reason(layer: Any) -> str | None:
        """Why no adapter of `layer`, fused or not yet, can be fused with its base; None where one can."""
        raise NotImplementedError

    @staticmethod
    def base_note(layer: Any) -> str:
        """What a report says of the base beside its size."""
        return ""

    @staticmethod
    def adapter_reason(layer: Any, name: str) -> str | None:
        """Why adapter `name` of `layer`, fused or not yet, cannot be fused; None where it can."""
        a, b, dropout = part(layer, "lora_A", name), part(layer, "lora_B", name), part(layer, "lora_dropout", name)
        if type(a) is not nn.Linear or type(b) is not nn.Linear or tensor(a, "bias") is not None:
            return f"adapter {name!r} consists of a {type(a).__name__} and a {type(b).__name__}"
        for weight in (tensor(a, "weight"), tensor(b, "weight")):
            if type(weight) not in (nn.Parameter, Tensor):
                return f"adapter {name!r} has a {type(weight).__name__}"
        if has_hooks(a) or has_hooks(b):
            return f"adapter {name!r} has hooks, which the fused path would pass over"
        if type(dropout) not in (nn.Dropout, nn.Identity) or has_hooks(dropout):
            return f"adapter {name!r} has a dropout of its own: {type(dropout).__name__}"
        return f"adapter {name!r} drops everything: p = {dropout.p}" if _rate(dropout) >= 1 else None

    def _dtype_reason(self, x: Tensor, names: list[str]) -> str | None:
        """Why these adapters cannot be served with this x; None where they can."""
        raise NotImplementedError

    def _speed_reason(self, x: Tensor, names: list[str]) -> str | None:
        """Why PEFT's own forward is the faster one: without a kernel, masks and what is stored in 4 or 8 bits become
        tensors by dozens of torch operations. No reason where a back-end was asked for by name."""
        if self._backend is not None:
            return None
        dropped = False
        for name in names:
            if _rate(part(self, "lora_dropout", name)) > 0:  # a compiler may have p as a symbol: no value of its own
                dropped = True
        if not dropped and not self.stored:
            return None
        weight = self._weight()
        w_format = weight.format if isinstance(weight, QuantizedWeight) else "dense"
        a, inner = tensor(part(self, "lora_A", names[0]), "weight"), self._inner_dtype(x)
        adapter = a.dtype if a.dtype == torch.float32 else inner
        if not _only_eager(x.device, inner, adapter, *weight.shape, a.shape[0], dropped, w_format):
            return None
        what = "dropout" if w_format == "dense" else f"a weight in {w_format}"
        return f"no kernel for {what} here, and PEFT's own forward is faster than plain torch operations"

    def _inner_dtype(self, x: Tensor) -> torch.dtype:
        """What base and adapter are computed in, for an x that `_dtype_reason` has found in order."""
        return autocast_of(x) or x.dtype

    def _weight(self) -> Tensor | QuantizedWeight:
        """W [N,K] of the base, which `base_reason` has found in order."""
        raise NotImplementedError

    def operands(
        self, *names: str, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | QuantizedWeight, Tensor, Tensor, float | Tensor, Tensor | None, float]:
        """(weight, lora_a, lora_b, scale, bias, dropout_p) of the base with one adapter, or with several that have no
        dropout: those are one of their ranks' sum. The bias in `dtype`, or the weight's."""
        weight, bias, scaling = self._weight(), tensor(self._modules["base_layer"], "bias"), self.scaling
        for name in names:
            b = part(self, "lora_B", name)
            if (own := tensor(b, "bias")) is not None:
                term = own * scaling[name]
                bias = term if bias is None else bias + term
        if bias is not None:
            bias = as_dtype(bias, dtype or weight.dtype)
        p = _rate(part(self, "lora_dropout", name))
        if len(names) == 1:
            return weight, tensor(part(self, "lora_A", name), "weight"), tensor(b, "weight"), scaling[name], bias, p
        a = torch.cat([self.lora_A[name].weight for name in names])
        scaled = torch.cat([self.lora_B[name].weight * scaling[name] for name in names], 1)
        return weight, a, scaled, 1.0, bias, p

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        together = names
        if len(names) > 1 and any(_rate(part(self, "lora_dropout", name)) for name in names):
            together = names[:1]
        weight, a, b, scale, bias, p = self.operands(*together, dtype=x.dtype)
        y = lora_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p, backend=self._backend)
        if together is names:
            return y
        dtype = y.dtype
        for name in names[1:]:  # each with a mask of its own
            low = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            y = y + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](low))) * self.scaling[name]
        return y.to(dtype)

    def _base(self, x: Tensor) -> Tensor:
        """The base alone."""
        return self.base_layer(x)

    def _fused_by_sample(self, x: Tensor, names: list[str]) -> Tensor:
        """One call per adapter, over the samples that ask for it."""
        order: list[int] = []
        parts = []
        for name in dict.fromkeys(names):
            indices = [i for i, other in enumerate(names) if other == name]
            order += indices
            part = x[indices]
            parts.append(self._fused(part, [name]) if name in self.lora_A else self._base(part))
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts)[torch.tensor(back, device=x.device)]


class FusedLinear(Fused, peft_layer.Linear):
    """PEFT's LoRA linear over an ``nn.Linear`` or a Conv1D, computed by `lora_kernels.lora_linear` where that serves
    the call."""

    plain = peft_layer.Linear
    lora_magnitude_vector: Any

    @staticmethod
    def base_reason(layer: Any) -> str | None:
        """As said there."""
        base = layer._modules["base_layer"]
        if isinstance(base, BaseTunerLayer):
            return "its base is another tuner's layer"
        if type(base).forward is nn.Linear.forward:
            if layer.fan_in_fan_out:
                return "fan_in_fan_out over an nn.Linear"
        elif not layer.is_target_conv_1d_layer:
            return f"its base is a {type(base).__name__} with a forward of its own"
        weight = tensor(base, "weight")
        if type(weight) not in (nn.Parameter, Tensor):
            return f"its base weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "its base weight is trained"
        return "its base layer has hooks, which the fused path would pass over" if has_hooks(base) else None

    @staticmethod
    def adapter_reason(layer: Any, name: str) -> str | None:
        """As said there, for DoRA too."""
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name])
            if kind is not DoraLinearVariant:
                return f"adapter {name!r} is a {kind.__name__}"
            own_bias = layer.lora_B[name].bias is not None
            if layer.fan_in_fan_out or own_bias or has_hooks(layer.lora_magnitude_vector[name]):
                return f"adapter {name!r} is DoRA over a Conv1D, with a bias of its own or with hooks"
        return Fused.adapter_reason(layer, name)

    def _dtype_reason(self, x: Tensor, names: list[str]) -> str | None:
        given, autocast = x.dtype, autocast_of(x)
        weight = tensor(self._modules["base_layer"], "weight").dtype
        if given not in check.DTYPES or (given != weight and not autocast):
            return f"x is {given}, the base weight {weight}"
        for name in names:
            dtype = tensor(part(self, "lora_A", name), "weight").dtype
            if dtype == given:
                continue
            if dtype != torch.float32 and not (autocast and dtype in check.HALVES):
                return f"adapter {name!r} is {dtype} beside {given}"
            if not (self.cast_input_dtype_enabled and given in check.HALVES) and not autocast:
                return f"adapter {name!r} is {dtype} beside {given}, and x may not be converted"
        return None

    def _weight(self) -> Tensor:
        weight: Tensor = tensor(self._modules["base_layer"], "weight")
        return weight.t() if self.fan_in_fan_out else weight

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        return self._fused_dora(x, names[0]) if names[0] in self.lora_variant else super()._fused(x, names)

    def _fused_dora(self, x: Tensor, name: str) -> Tensor:
        base: Any = self.base_layer
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _only_eager(
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    N: int,
    K: int,
    R: int,
    dropped: bool,
    w_format: str,
) -> bool:
    """Whether the automatic choice has no kernel for such calls, of any number of rows."""
    call = Call("forward", device, dtype, adapter_dtype, 1, N, K, R, dropped, w_format)
    return any(dispatch.automatic(call._replace(op=op)) == "eager" for op in ("forward", "backward"))


def autocast_of(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of x, where it is enabled and asks any: it leaves fp64 as it is."""
    device = device_type(x)
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


# The way of every call goes past nn.Module's attribute look-up, a microsecond for each submodule and parameter.


def part(layer: Any, half: str, name: str) -> Any:
    """``layer.lora_A[name]``, or another of its dictionaries of modules."""
    return layer._modules[half]._modules[name]


def tensor(module: Any, name: str) -> Any:
    """``module.weight``, or another parameter or None in its place. It is an attribute of another kind where the module
    is a replica of DataParallel or parametrised."""
    try:
        return module._parameters[name]
    except KeyError:
        return getattr(module, name)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call that passes over the module's own would lose something."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _rate(dropout: nn.Module) -> float:
    """p of the dropout as it stands: 0 while not training."""
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
