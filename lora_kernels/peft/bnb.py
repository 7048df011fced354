"""PEFT's LoRA linears over the 4 and 8 bits of bitsandbytes on the fused path (QLoRA). Imported with bitsandbytes only.

    Linear4bit    y = to x's dtype(c Wᵀ + bias + s · (dropout(c) Aᵀ) Bᵀ), c = x in compute_dtype; W in nf4 or fp4
    Linear8bitLt  y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ, W in int8

W is what bitsandbytes stores, shared and not copied. Merging, which quantises W + s·B·A again, stays PEFT's. For int8
bitsandbytes rounds x to 8 bits too, but for its outliers (LLM.int8, arXiv:2208.07339; not while training on the CPU);
here x stays as it is, which is nearer to x times the W that is stored.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, "QLoRA", 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora import bnb as peft_layers
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lora_kernels.nn.quantized import quantized_linear
from lora_kernels.ops import check
from lora_kernels.ops.autograd import as_dtype, device_type, no_autocast
from lora_kernels.peft.linear import Fused, autocast_of, has_hooks, part, tensor
from lora_kernels.quant.weight import DTYPES, QuantizedWeight, from_bnb


class _Stored:
    """The weight of a bitsandbytes layer, or why there is none, for as long as bitsandbytes holds the same tensors:
    moving, merging, loading and re-packing replace one of them. A copy, or an unpickled one, starts empty."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget, and hold nothing."""
        self._of: tuple[Any, ...] = (None, None, None)
        self._at = (0, False)
        self.found: QuantizedWeight | str = ""
        """What `of` has found last."""

    def of(self, base: Any) -> QuantizedWeight | str:
        """Of the layer, Linear4bit or Linear8bitLt."""
        weight = base._parameters["weight"]
        state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
        packed = False
        if state is not None:
            scales, packed = state.absmax, getattr(state, "packing_format_for_cpu", False)
        elif (scales := getattr(weight, "SCB", None)) is None:  # a Linear8bitLt moves it there in its first forward
            scales = getattr(getattr(base, "state", None), "SCB", None)
        at = self._at[0]
        if not torch.compiler.is_compiling():  # which knows no addresses: there the parameter itself has to do
            with torch._C.DisableTorchFunctionSubclass():  # a Params4bit's would cost microseconds
                at = weight.data_ptr()
        of = self._of
        if weight is not of[0] or state is not of[1] or scales is not of[2] or (at, packed) != self._at:
            try:
                self.found = from_bnb(base)
            except (TypeError, ValueError) as error:
                self.found = f"its base weight cannot be read: {error}"
            self._of, self._at = (weight, state, scales), (at, packed)
        return self.found

    def __deepcopy__(self, memo: object) -> _Stored:
        return _Stored()

    def __reduce__(self) -> tuple[type[_Stored], tuple[()]]:
        return _Stored, ()


class _FusedBnb(Fused):
    stored: ClassVar = True
    own: ClassVar = {**Fused.own, "_stored": _Stored}
    kind: ClassVar[type[Any]]
    _stored: _Stored

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        self.plain.merge(self, *args, **kwargs)
        self._stored.clear()  # of what merging has replaced

    @classmethod
    def base_reason(cls, layer: Any) -> str | None:
        """As said there; a base that bitsandbytes has not quantised yet is one reason."""
        base = layer._modules["base_layer"]
        if isinstance(base, BaseTunerLayer):
            return "its base is another tuner's layer"
        if type(base).forward is not cls.kind.forward:
            return f"its base is a {type(base).__name__} with a forward of its own"
        if has_hooks(base):
            return "its base layer has hooks, which the fused path would pass over"
        found = cls._found(layer)
        return found if isinstance(found, str) else None

    @staticmethod
    def _found(layer: Any) -> QuantizedWeight | str:
        stored = layer.__dict__.get("_stored")
        return (_Stored() if stored is None else stored).of(layer._modules["base_layer"])

    @staticmethod
    def adapter_reason(layer: Any, name: str) -> str | None:
        """As said there."""
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name])
            dora = kind is DoraLinearVariant
            return f"adapter {name!r} is " + ("DoRA over a quantised weight" if dora else f"a {kind.__name__}")
        return Fused.adapter_reason(layer, name)

    def _weight(self) -> QuantizedWeight:
        found = self._stored.found
        assert isinstance(found, QuantizedWeight), found
        return found

    def _dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype] | str:
        """(that in which base and adapter are computed, that of the result), or why there are none."""
        raise NotImplementedError

    def _dtype_reason(self, x: Tensor, names: list[str]) -> str | None:
        found = self._dtypes(x)
        if isinstance(found, str):
            return found
        inner, _ = found
        for name in names:
            dtype = tensor(part(self, "lora_A", name), "weight").dtype
            if dtype not in (inner, torch.float32) and not (dtype in check.HALVES and inner == torch.float32):
                return f"adapter {name!r} is {dtype} beside {inner}"
            if dtype != x.dtype and not self.cast_input_dtype_enabled and autocast_of(x) is None:
                return f"adapter {name!r} is {dtype} beside {x.dtype}, and x may not be converted"
        return None

    def _inner_dtype(self, x: Tensor) -> torch.dtype:
        found = self._dtypes(x)
        assert not isinstance(found, str), found
        return found[0]

    def operands(
        self, *names: str, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | QuantizedWeight, Tensor, Tensor, float | Tensor, Tensor | None, float]:
        """As said there; A and B of 16 bits in fp32 where that is `dtype`."""
        weight, a, b, scale, bias, p = super().operands(*names, dtype=dtype)
        if dtype == torch.float32:
            a, b = as_dtype(a, dtype), as_dtype(b, dtype)
        return weight, a, b, scale, bias, p

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        inner, outer = self._settle(x)
        with no_autocast(device_type(x)):
            return as_dtype(super()._fused(as_dtype(x, inner), names), outer)

    def _base(self, x: Tensor) -> Tensor:
        inner, outer = self._settle(x)
        bias = self.base_layer.bias
        with no_autocast(x.device.type):
            bias = None if bias is None else bias.to(inner)
            return quantized_linear(x.to(inner), self._weight(), bias, self._backend).to(outer)

    def _settle(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """`_dtypes` of an x that `_dtype_reason` has found in order."""
        found = self._dtypes(x)
        assert not isinstance(found, str), found
        return found


class FusedLinear4bit(_FusedBnb, peft_layers.Linear4bit):
    """PEFT's LoRA linear over a ``Linear4bit``, nf4 or fp4, with double quantisation or without.

    Served where the conversion to compute_dtype loses nothing of x that PEFT's adapter would see: an x of that dtype,
    one of 16 bits where it is fp32, and any under an autocast to it. Else PEFT computes the adapter from x as it was.
    """

    plain = peft_layers.Linear4bit
    kind = Linear4bit

    @staticmethod
    def base_note(layer: Any) -> str:
        """The format, and what it is computed in."""
        dtype = layer.base_layer.compute_dtype or "the dtype of x"
        return f", {getattr(_FusedBnb._found(layer), 'format', '')} in {str(dtype).removeprefix('torch.')}"

    def _dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype] | str:
        base: Any = self._modules["base_layer"]
        dtype = x.dtype
        inner = base.compute_dtype or dtype
        if not base.compute_type_is_set and dtype in (torch.float32, torch.bfloat16):
            inner = dtype  # what bitsandbytes makes compute_dtype at the first call
        if dtype not in DTYPES or inner not in DTYPES:
            return f"x is {dtype}, compute_dtype {inner}"
        autocast = autocast_of(x)
        if autocast is None:
            if inner not in (dtype, torch.float32):
                return f"x is {dtype}, compute_dtype {inner}, and there is no autocast: the adapter has all bits of x"
            return inner, dtype
        if inner not in (autocast, torch.float32):
            return f"compute_dtype is {inner}, autocast asks for {autocast}"
        return inner, torch.promote_types(dtype, autocast)

    def _settle(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        found = super()._settle(x)
        base: Any = self._modules["base_layer"]
        if not base.compute_type_is_set:  # the call is served, so bitsandbytes will not come to it
            base.set_compute_type(x)
            base.compute_type_is_set = True
        return found


class FusedLinear8bitLt(_FusedBnb, peft_layers.Linear8bitLt):
    """PEFT's LoRA linear over a ``Linear8bitLt`` with has_fp16_weights=False. x is not rounded to 8 bits."""

    plain = peft_layers.Linear8bitLt
    kind = Linear8bitLt

    @classmethod
    def base_reason(cls, layer: Any) -> str | None:
        """As said there."""
        if getattr(getattr(layer.base_layer, "state", None), "has_fp16_weights", False):
            return "its base has has_fp16_weights, and quantises its weight anew in every call"
        return super().base_reason(layer)

    @staticmethod
    def base_note(layer: Any) -> str:
        """The format, and what differs."""
        return ", int8 (x is not quantised)"

    def _dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype] | str:
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}, the base weight in int8"
        autocast = autocast_of(x)
        if autocast is None:
            return x.dtype, x.dtype
        # While training on the CPU bitsandbytes calls torch's linear, which autocast converts.
        plain = x.device.type in ("cpu", "xpu") and self.base_layer.training
        return autocast, autocast if plain else torch.promote_types(x.dtype, autocast)


KINDS: dict[type, type[Fused]] = {kind.plain: kind for kind in (FusedLinear4bit, FusedLinear8bitLt)}
"""PEFT's class → ours."""
