"""PEFT's LoRA layers over codes that another package than bitsandbytes has made: base and adapter in one call.

    y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ, or DoRA over the same W

torchao (int8, integers, e4m3, NF4Tensor), HQQ (4 and 8 bits), GPTQ and AWQ (gptqmodel, 4 and 8 bits). The codes are the
tensors of the package, shared and not copied; `lora_kernels.quant.reader` says how they are read. What cannot be read,
or has no kernel, or is called in a dtype that the base does not take, is computed around the base's own forward, as
`lora_kernels.peft.around` does it.

A class is made when a model first has such a layer, because PEFT defines some of its classes only where the package of
the base is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.core.rows import Rows
from lora_kernels.nn.fit import has_hooks
from lora_kernels.ops import check
from lora_kernels.ops.autograd import as_dtype, autocast_of, device_type, no_autocast
from lora_kernels.peft import hooked, known
from lora_kernels.peft.around import FusedAround
from lora_kernels.peft.codes_cache import CodesCache
from lora_kernels.peft.dense_stand_in import MergedLinear, is_quantised
from lora_kernels.peft.fused import LORA_USES, Fused
from lora_kernels.peft.layer import Survey
from lora_kernels.peft.linear import FusedLinear
from lora_kernels.peft.merging import Sum, base_of
from lora_kernels.peft.reading import Operands, PeftAdapter, only_eager
from lora_kernels.quant.gptq import AWQ, GPTQ
from lora_kernels.quant.hqq import HQQ
from lora_kernels.quant.reader import Reader
from lora_kernels.quant.torchao import TORCHAO
from lora_kernels.quant.weight import DTYPES, QuantizedWeight

_Dtypes = tuple[torch.dtype, torch.dtype]


class FusedCodes(Fused):
    """The fused forward of PEFT's layers over codes of another package."""

    quantised_base: ClassVar = True
    shares_input: ClassVar = True
    promotes: ClassVar[bool] = False
    own: ClassVar = {**Fused.own, "_codes_cache": CodesCache}
    reader: ClassVar[Reader]
    _codes_cache: CodesCache

    def otherwise(self, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return y of a forward around the base, where its codes cannot be had or have no kernel."""
        if kwargs or not self.why_around(x):
            return None
        return FusedAround.forward(self, x, *args)  # type: ignore[arg-type]

    def why_around(self, x: Tensor) -> str:
        """Return why a call is computed around the base's own forward, or "" where it is one call of the kernels."""
        base = self.read_base(self)
        if isinstance(base, str):
            return base
        w = base[0]
        dtypes = self.base_dtypes(x, w, base[1], autocast_of(x))
        if isinstance(dtypes, str):
            return dtypes
        if self._backend is None and only_eager(x.device, (dtypes[0], dtypes[0]), (*w.shape, 8), False, w.format):
            return f"no kernel for a weight in {w.format} here"
        return ""

    @classmethod
    def read_base(cls, layer: Any) -> tuple[QuantizedWeight, Tensor | None] | str:
        """Return the quantised W and the bias, or why the kernels cannot have them."""
        base = layer._modules["base_layer"]
        if type(base) is MergedLinear:
            base = base_of(layer)
        if "forward" in base.__dict__ or not cls.knows_forward(base):
            return f"its base is a {type(base).__name__} with a forward that is not its package's own"
        if has_hooks(base) and (reason := hooked.refusal("its base layer", base)):
            return reason
        cache = layer.__dict__.get("_codes_cache")  # a layer that is not fused yet has none
        found = (CodesCache() if cache is None else cache).read(cls.reader, base)
        return found if isinstance(found, str) else (found, base.bias)

    @staticmethod
    def knows_forward(base: Any) -> bool:
        """Return whether the forward of the base is the one whose product the kernels compute."""
        return type(base).forward.__module__.startswith("gptqmodel.")

    @staticmethod
    def known_dtype(layer: Any) -> torch.dtype | None:
        """Return None: a layer computes in the dtype of x, as far as it takes it."""
        return None

    @classmethod
    def base_note(cls, layer: Any) -> str:  # type: ignore[override]
        """Return the format of the weight, and what of it is a copy."""
        return f", {cls.reader.facts(base_of(layer)).note}"

    @staticmethod
    def variant_reason(layer: Any, name: str) -> str | None:
        """Return why the adapter's variant is neither a DoRA nor an activated LoRA that can be fused; None where it is
        one."""
        if type(layer.lora_variant[name]).__name__ in ("ALoraLinearVariant", "DoraLinearVariant"):
            return FusedLinear.variant_reason(layer, name)
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward is not one that this package knows, or "" where it is."""
        uses = f"{LORA_USES} quant_linear_module"
        return known.why_not(cls.peft_class, uses, "forward", "_mixed_batch_forward")

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the size of the base and the adapters of `layer`, or what `FusedAround` finds where it cannot be
        read."""
        if isinstance(cls.read_base(layer), str):
            return FusedAround.survey(layer)
        return super().survey(layer)

    def sums(self, names: Sequence[str]) -> Sequence[Sum] | None:
        """Return what merging the adapters `names` adds to W and the bias; None where merging is PEFT's, or its
        refusal."""
        return super().sums(names) if is_quantised(base_of(self)) else FusedAround.sums(self, names)  # type: ignore[arg-type]

    def prepare(self) -> None:
        """Read the weight now, because a first forward inside ``torch.compile`` could not read it."""
        self.read_base(self)

    def base_dtypes(self, x: Tensor, w: Any, bias: Any, autocast: torch.dtype | None) -> _Dtypes | str:
        """Return the dtypes in which the base is computed and y is returned, or why x's dtype is not served."""
        raise NotImplementedError

    def _dtypes(
        self, x: Tensor, w: Any, adapters: dict[str, PeftAdapter], autocast: torch.dtype | None
    ) -> _Dtypes | str:
        found = self.base_dtypes(x, w, self.base_layer.bias, autocast)
        if isinstance(found, str):
            return found
        for name, adapter in adapters.items():
            dtype = adapter.a.dtype
            if dtype not in (found[0], torch.float32) and not (dtype in check.HALVES and found[0] == torch.float32):
                return f"adapter {name!r} is {dtype} beside {found[0]}"
            if dtype != x.dtype and not self.cast_input_dtype_enabled and autocast is None:
                return f"adapter {name!r} is {dtype} beside {x.dtype}, and x may not be converted"
        return found

    def _compute(self, x: Tensor, operands: Operands) -> Tensor:
        with no_autocast(device_type(x)):
            y = super()._compute(as_dtype(x, operands.inner), _with_bias_in(operands))
            return as_dtype(y, operands.outer)

    def compute_rows(self, x: Tensor, operands: Operands, numbers: Sequence[tuple[str, int]], rows: Rows) -> Tensor:
        """Return y, where each row of x is computed with the adapter that `rows` gives it."""
        with no_autocast(device_type(x)):
            y = super().compute_rows(as_dtype(x, operands.inner), _with_bias_in(operands), numbers, rows)
            return as_dtype(y, operands.outer)


def _with_bias_in(operands: Operands) -> Operands:
    bias, inner = operands.bias, operands.inner
    return operands if bias is None or bias.dtype == inner else operands.with_bias(bias.to(inner))


class OverTorchao(FusedCodes):
    """Over an nn.Linear with a weight of torchao. Its product is computed in x's dtype, under autocast too, except for
    the kinds of weights that torchao multiplies by torch's own linear."""

    reader = TORCHAO

    @staticmethod
    def knows_forward(base: Any) -> bool:
        """Return whether the base is an nn.Linear whose forward is its own."""
        return isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward

    def base_dtypes(self, x: Tensor, w: Any, bias: Any, autocast: torch.dtype | None) -> _Dtypes | str:
        """Return x's dtype, which must be that of W and the bias; under autocast what torchao's operator returns."""
        kind = type(self.base_layer._parameters["weight"]).__name__
        if x.dtype not in DTYPES or (bias is not None and bias.dtype != w.dtype):
            return f"x is {x.dtype}, W {w.dtype}, the bias {None if bias is None else bias.dtype}"
        if kind == "Int8Tensor":
            return (x.dtype, x.dtype) if x.dtype == w.dtype else f"x is {x.dtype}, W {w.dtype}"
        if autocast is None:
            return (x.dtype, x.dtype) if x.dtype == w.dtype else f"x is {x.dtype}, W {w.dtype}"
        if kind == "IntxUnpackedToInt8Tensor":
            return autocast, autocast
        return f"autocast over a {kind}"


class OverHqq(FusedCodes):
    """Over an HQQLinear, in its compute_dtype or that of autocast."""

    reader = HQQ
    promotes = True

    @staticmethod
    def knows_forward(base: Any) -> bool:
        """Return whether the forward of the base is one of HQQ's own products."""
        return type(base).__name__ == "HQQLinear" and type(base).forward.__module__ == "hqq.core.quantize"

    def base_dtypes(self, x: Tensor, w: Any, bias: Any, autocast: torch.dtype | None) -> _Dtypes | str:
        """Return the dtype of x, which must be compute_dtype, or that of autocast."""
        if autocast is not None and x.dtype in DTYPES:
            return autocast, autocast
        return (x.dtype, x.dtype) if x.dtype == w.dtype else f"x is {x.dtype}, compute_dtype {w.dtype}"


class OverGptq(FusedCodes):
    """Over a TorchLinear of gptqmodel, in the dtype of x or that of autocast."""

    reader: ClassVar[Reader] = GPTQ

    def base_dtypes(self, x: Tensor, w: Any, bias: Any, autocast: torch.dtype | None) -> _Dtypes | str:
        """Return the dtype of x, or that of autocast."""
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}"
        inner = autocast or x.dtype
        return inner, inner


class OverAwq(FusedCodes):
    """Over an AwqTorchLinear of gptqmodel, in the dtype of x or that of autocast. gptqmodel rounds an fp32 x to fp16;
    here it keeps its bits."""

    reader = AWQ
    promotes = True

    def base_dtypes(self, x: Tensor, w: Any, bias: Any, autocast: torch.dtype | None) -> _Dtypes | str:
        """Return the dtype of x, or that of autocast with y in the wider of the two."""
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}"
        return (x.dtype, x.dtype) if autocast is None else (autocast, torch.promote_types(x.dtype, autocast))


class _Source(NamedTuple):
    module: str
    """The module of PEFT's class in ``peft.tuners.lora``."""
    name: str
    over: type[FusedCodes]


_SOURCES: Mapping[str, _Source] = MappingProxyType(
    {
        "FusedAwqCodes": _Source("awq", "AwqLoraLinear", OverAwq),
        "FusedGPTQCodes": _Source("gptq", "GPTQLoraLinear", OverGptq),
        "FusedHqqCodes": _Source("hqq", "HqqLoraLinear", OverHqq),
        "FusedTorchaoCodes": _Source("torchao", "TorchaoLoraLinear", OverTorchao),
        "FusedNF4TensorCodes": _Source("layer", "Linear", OverTorchao),
    }
)
"""The fused classes of this module, which are attributes of it, and PEFT's."""


def class_for(kind: type, layer: Any) -> type[FusedCodes] | None:
    """Return the fused class for a layer of PEFT's class `kind` whose base the kernels read, or None."""
    for name, source in _SOURCES.items():
        if kind.__module__ == f"peft.tuners.lora.{source.module}" and kind.__name__ == source.name:
            readable = not isinstance(source.over.read_base(layer), str)
            return globals().get(name) or __getattr__(name) if readable else None
    return None


def __getattr__(name: str) -> Any:
    """Return the fused class `name`, which is made the first time."""
    if (source := _SOURCES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    peft_class = getattr(importlib.import_module(f"peft.tuners.lora.{source.module}"), source.name)
    doc = f"PEFT's {source.name} over codes of another package."
    made = type(name, (source.over, peft_class), {"__module__": __name__, "__doc__": doc, "peft_class": peft_class})
    return globals().setdefault(name, made)
