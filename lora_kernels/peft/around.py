"""PEFT's LoRA layers over the layers of other packages: the base by its own forward, the adapter on the fused path.

    y = base(x) + Σ over active adapters of scaling · lora_B(lora_A(dropout(x)))

GPTQ, AWQ, AQLM, EETQ, HQQ, Intel's neural compressor, torchao, and every subclass of nn.Linear with a forward of its
own, such as transformers' FP8Linear. The base's forward and backward run as they are. The low-rank half is added by
`lora_kernels.ops.around.add_low_rank`, so dropout, fp32 adapters beside 16 bits and the memory that is saved are those
of this package. While merged, a dense weight stands in the place of a quantised base that can give one.

A class is made when a model first has such a layer, because PEFT defines some of its classes only where the package of
the base is installed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lora_kernels.nn.dry_run import Watched
from lora_kernels.ops import check
from lora_kernels.ops.around import add_low_rank
from lora_kernels.ops.autograd import autocast_of
from lora_kernels.peft import hooked, known, merged_terms
from lora_kernels.peft.dense_stand_in import is_quantised
from lora_kernels.peft.fused import LORA_USES
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.linear import FusedLinear
from lora_kernels.peft.merging import Sum, base_of
from lora_kernels.peft.reading import PeftAdapter, only_eager


class _Source(NamedTuple):
    """A class of PEFT."""

    module: str
    """Its module in ``peft.tuners.lora``."""
    name: str
    promotes: bool = False
    """Whether its results under autocast are in the wider of the base's dtype and autocast's."""


_SOURCES: Mapping[str, _Source] = MappingProxyType(
    {
        "FusedAqlmLoraLinear": _Source("aqlm", "AqlmLoraLinear"),
        "FusedAwqLoraLinear": _Source("awq", "AwqLoraLinear", True),
        "FusedEetqLoraLinear": _Source("eetq", "EetqLoraLinear", True),
        "FusedGPTQLoraLinear": _Source("gptq", "GPTQLoraLinear"),
        "FusedHqqLoraLinear": _Source("hqq", "HqqLoraLinear", True),
        "FusedIncLoraLinear": _Source("inc", "IncLoraLinear"),
        "FusedTorchaoLoraLinear": _Source("torchao", "TorchaoLoraLinear"),
        "FusedLinearAround": _Source("layer", "Linear"),
    }
)
"""The fused classes of this module, which are attributes of it, and PEFT's."""


class FusedAround(FusedLayer):
    """The fused forward of PEFT's layers over the layers of other packages."""

    promotes: ClassVar[bool] = False
    _modules: Any
    lora_A: Any
    base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    _cast_input_dtype: Any
    cast_input_dtype_enabled: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns for x [..., in_features]."""
        compiling = torch.compiler.is_compiling()
        adapters = FusedAround._read(self, x, args, kwargs)
        if isinstance(adapters, str):
            if not compiling:
                self.count_left(adapters)
            y: Tensor = self.peft_class.forward(self, x, *args, **kwargs)
            return y
        if not compiling:
            self.__dict__["fused_calls"] += 1
        y = self.base_layer(x)
        if self.promotes and (autocast := autocast_of(x)) is not None:
            y = y.to(torch.promote_types(y.dtype, autocast))
        for a, b, _, scale, p, *_ in adapters:
            y = add_low_rank(y, x, a, b, scale=scale, dropout_p=p, backend=self._backend)
        return y

    def _read(self, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[PeftAdapter] | str:
        """Return the adapters of a forward, or why PEFT's own serves it: "" where no adapter is to be computed."""
        if self.disable_adapters or self.merged:
            return ""
        if args or kwargs:
            return "further arguments: " + ", ".join([*map(str, kwargs)] or ["one without a name"])
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return ""
        adapters = []
        for name in names:
            adapter = FusedAround.read_adapter(self, name)
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
            (R, K), N, dtype = adapter.a.shape, adapter.b.shape[0], adapter.a.dtype
            if x.device != adapter.a.device:
                return hooked.not_there("x", x, adapter.a)
            if x.dtype not in check.DTYPES:
                return f"x is {x.dtype}"
            if dtype != x.dtype and not self.cast_input_dtype_enabled and autocast_of(x) is None:
                return f"adapter {name!r} is {dtype} beside {x.dtype}, and x may not be converted"
            if (
                adapter.p > 0
                and self._backend is None
                and (x.device.type != "cpu" or only_eager(x.device, (x.dtype, dtype), (N, K, R), True, "dense"))
            ):
                return "no kernel for dropout here, and PEFT's own forward is faster than plain torch operations"
        return adapters

    @staticmethod
    def read_adapter(layer: Any, name: str) -> PeftAdapter | str:
        """Return adapter `name` of `layer`, which may not be fused yet, or why it cannot be fused."""
        variant = layer.lora_variant.get(name)
        if variant is not None:
            what = "DoRA" if isinstance(variant, DoraLinearVariant) else f"a {type(variant).__name__}"
            return f"adapter {name!r} is {what}, which needs more of the base than its own forward"
        adapter = FusedLinear.read_adapter(layer, name)
        if not isinstance(adapter, str) and adapter.b_bias is not None:
            return f"adapter {name!r} has lora_bias"
        return adapter

    def sums(self, names: Sequence[str]) -> Sequence[Sum] | None:
        """Return what merging the adapters `names` adds to W and the bias; None over a base whose weight cannot be
        read densely, where merging is PEFT's, or its refusal."""
        base = base_of(self)
        if not is_quantised(base):
            if not isinstance(base, nn.Linear) or type(base._parameters.get("weight")) is not nn.Parameter:
                return None
            warnings.warn(
                f"the base is a {type(base).__name__} with a forward of its own: while merged, the adapter goes "
                "through that forward too, and y is the same only if it is x Wᵀ + bias",
                stacklevel=5,
            )
        return merged_terms.of_lora(self, names)

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward is not one that this package knows, or "" where it is."""
        return known.why_not(cls.peft_class, f"{LORA_USES} quant_linear_module")

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the sizes and adapters of `layer`."""
        reasons = [why for name in layer.lora_A if isinstance(why := cls.read_adapter(layer, name), str)]
        ranks = ", ".join(f"{name} r={layer.r[name]}" for name in layer.lora_A)
        base = layer._modules["base_layer"]
        what = type(base).__name__
        if type(base) is nn.Linear:
            what = type(base.weight).__name__
        return Survey(f"{layer.in_features}→{layer.out_features}, around {what}, {ranks}", tuple(reasons))

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or self.disable_adapters or not active:
            return None
        a = [self.lora_A[name].weight for name in active]
        layer: Any = self
        return Watched(layer, [], a, lambda: (self.fused_calls, dict(self.passed_over)))


def __getattr__(name: str) -> Any:
    """Return the fused class `name`, which is made the first time."""
    if (source := _SOURCES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    peft_class = getattr(importlib.import_module(f"peft.tuners.lora.{source.module}"), source.name)
    made = type(
        name,
        (FusedAround, peft_class),
        {
            "__module__": __name__,
            "__doc__": f"PEFT's {source.name}, fused around its base.",
            "peft_class": peft_class,
            "promotes": source.promotes,
        },
    )
    return globals().setdefault(name, made)
