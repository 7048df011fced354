"""PEFT's LoRA linears over bitsandbytes' weights of 4 and 8 bits, on the fused path (QLoRA).

This module is imported only where PEFT has made such a layer, so that other models do not need bitsandbytes.

    Linear4bit    y = to x's dtype(c Wᵀ + bias + s · (dropout(c) Aᵀ) Bᵀ), c = x in compute_dtype; W in nf4 or fp4
    Linear8bitLt  y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ, W in int8

or DoRA over the same W (`lora_kernels.dora_linear`).

W is the tensor that bitsandbytes stores, shared and not copied. While merged, a dense weight stands beside it
(`lora_kernels.peft.dense_stand_in`).
With int8, bitsandbytes also rounds x to 8 bits, except for outliers (LLM.int8, arXiv:2208.07339) and except while
training on the CPU. Here x is not rounded, so the result is nearer to the product of x and the stored W.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, "QLoRA", 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.tuners.lora import bnb as peft_layers
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lora_kernels.core.rows import Rows
from lora_kernels.nn.fit import has_hooks
from lora_kernels.ops import check
from lora_kernels.ops.apart import lora_linear_apart
from lora_kernels.ops.autograd import as_dtype, device_type, no_autocast
from lora_kernels.peft import hooked
from lora_kernels.peft.dense_stand_in import MergedLinear
from lora_kernels.peft.fused import Fused
from lora_kernels.peft.linear import FusedLinear
from lora_kernels.peft.merging import Sum, base_of
from lora_kernels.peft.reading import Operands, PeftAdapter, as_one_adapter, weight_and_bias
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import DTYPES, Nested, QuantizedWeight


class _Layout(NamedTuple):
    """The facts about the weight of a bitsandbytes layer that are read from it once."""

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int
    nested: bool
    codes: Tensor | None
    """A copy of the codes in the order of `QuantizedWeight`, where bitsandbytes stores them in another. None where the
    weight itself is in this order."""
    scales: Tensor | None
    """The scales that belong to such a copy."""


class _Kept(NamedTuple):
    """A reading of a weight, and what it was read from. The layer's tensors are held weakly, so that they are freed
    when the layer gives them away."""

    weight: Callable[[], Any]
    state: Callable[[], Any]
    scales: Callable[[], Any]
    source: tuple[int, bool]
    """The address of the weight, and whether bitsandbytes has packed it for the CPU."""
    found: _Layout | str
    """The layout, or why the weight cannot be read."""


class _WeightCache:
    """A cache of the layout of a bitsandbytes layer's weight, valid for as long as bitsandbytes holds the same tensors.

    Moving, merging, loading and re-packing replace one of the tensors, or put the weight at another address. The weight
    is then read again. A copy and an unpickled object start empty.
    """

    def __init__(self) -> None:
        self.last: _Kept | None = None
        """The last reading. It is replaced as a whole, because several threads may read the same layer."""

    def read(self, base: Any) -> QuantizedWeight | str:
        """Return the weight of `base`, a Linear4bit or Linear8bitLt, or why it cannot be read."""
        weight = base._parameters["weight"]
        state: Any = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
        packed = False
        if state is not None:
            scales, packed = state.absmax, getattr(state, "packing_format_for_cpu", False)
        elif (scales := getattr(weight, "SCB", None)) is None:  # a Linear8bitLt moves it there in its first forward
            scales = getattr(getattr(base, "state", None), "SCB", None)
        kept = self.last
        if not torch.compiler.is_compiling():  # a compiler knows no addresses; `prepare` has read the weight before
            with torch._C.DisableTorchFunctionSubclass():  # otherwise data_ptr() of a Params4bit takes microseconds
                source = weight.data_ptr(), packed
            if (
                kept is None
                or kept.weight() is not weight
                or kept.state() is not state
                or kept.scales() is not scales
                or kept.source != source
            ):
                found = self._layout(base, weight)
                kept = _Kept(self._weakly(weight), self._weakly(state), self._weakly(scales), source, found)
                self.last = kept
        if kept is None:
            return "its base weight has not been read before torch.compile"
        found = kept.found
        if isinstance(found, str):
            return found
        codes, (N, K) = found.codes, found.shape
        if codes is None:
            with torch._C.DisableTorchFunctionSubclass():
                stored = weight if weight.dtype == torch.uint8 else weight.view(torch.uint8)  # for jit.trace
                codes = stored.view(N, K // 2) if found.blocksize else weight.view(N, K)
        if found.scales is not None:
            scales = found.scales
        nested = Nested(state.state2.code, state.state2.absmax, state.offset) if found.nested else None
        return QuantizedWeight(found.format, (N, K), found.dtype, codes, scales, found.blocksize, nested, checked=True)

    @staticmethod
    @torch.inference_mode(False)  # a copy of the codes is kept, and may be saved for a backward later
    @torch.no_grad()
    def _layout(base: Any, weight: Tensor) -> _Layout | str:
        try:
            q = from_bnb(base)
        except (TypeError, ValueError) as error:
            return f"its base weight cannot be read: {error}"
        own = q.codes.data_ptr() != weight.data_ptr()
        nested = q.nested is not None
        return _Layout(
            q.format, q.shape, q.dtype, q.blocksize, nested, q.codes if own else None, q.scales if own else None
        )

    def _weakly(self, held: Any) -> Callable[[], Any]:
        """Return a function that gives `held`, or None once nobody else holds it. This cache is then empty, so that it
        keeps no copy of the codes either."""
        if held is None:
            return _nothing
        cache = weakref.ref(self)

        def forget(_: Any) -> None:
            if (mine := cache()) is not None:
                mine.clear()

        return weakref.ref(held, forget)

    def clear(self) -> None:
        """Empty the cache."""
        self.last = None

    def __deepcopy__(self, memo: object) -> _WeightCache:
        return _WeightCache()

    def __reduce__(self) -> tuple[type[_WeightCache], tuple[()]]:
        return _WeightCache, ()


def _nothing() -> None:
    return None


def _base_of(layer: Any) -> Any:
    """Return the base of `layer`, which while merged is not in its place."""
    base = layer._modules["base_layer"]
    return base_of(layer) if type(base) is MergedLinear else base


class _FusedBnb(Fused):
    quantised_base: ClassVar = True
    shares_input: ClassVar = True
    own: ClassVar = {**Fused.own, "_weight_cache": _WeightCache}
    kind: ClassVar[type[Any]]
    """bitsandbytes' class of the base."""
    _weight_cache: _WeightCache

    @classmethod
    def read_base(cls, layer: Any) -> tuple[QuantizedWeight, Tensor | None] | str:
        """Return the quantised W and the bias, or why they cannot be used. One reason is a base that bitsandbytes has
        not quantised yet."""
        base = _base_of(layer)
        if isinstance(base, BaseTunerLayer):
            return "its base is another tuner's layer"
        if type(base).forward is not cls.kind.forward:
            return f"its base is a {type(base).__name__} with a forward of its own"
        if has_hooks(base) and (reason := hooked.refusal("its base layer", base)):
            return reason
        found = cls._weight_of(layer)
        if isinstance(found, str):
            return found
        return found, weight_and_bias(base)[1]

    @staticmethod
    def _weight_of(layer: Any) -> QuantizedWeight | str:
        cache = layer.__dict__.get("_weight_cache")  # a layer that is not fused yet has none
        return (_WeightCache() if cache is None else cache).read(_base_of(layer))

    @staticmethod
    def known_dtype(layer: Any) -> torch.dtype | None:
        """Return the compute_dtype of a Linear4bit. A Linear8bitLt computes in x's dtype."""
        dtype: torch.dtype | None = getattr(_base_of(layer), "compute_dtype", None)
        return dtype

    @staticmethod
    def variant_reason(layer: Any, name: str) -> str | None:
        """Return why the adapter's variant is neither a DoRA nor an activated LoRA that can be fused; None where it is
        one."""
        kind = type(layer.lora_variant[name])
        if kind in (ALoraLinearVariant, DoraLinearVariant):
            return FusedLinear.variant_reason(layer, name)
        return f"adapter {name!r} is a {kind.__name__}"

    def sums(self, names: Sequence[str]) -> Sequence[Sum] | None:
        """Return what merging the adapters `names` adds to W and the bias; None for a weight that cannot be read, whose
        forwards and merging are PEFT's."""
        return None if isinstance(self._weight_of(self), str) else super().sums(names)

    def prepare(self) -> None:
        """Read the quantised weight now, because a first forward inside ``torch.compile`` could not read it."""
        self.read_base(self)

    def _dtypes(
        self, x: Tensor, w: Any, adapters: dict[str, PeftAdapter], autocast: torch.dtype | None
    ) -> tuple[torch.dtype, torch.dtype] | str:
        found = self._base_dtypes(x, autocast)
        if isinstance(found, str):
            return found
        inner, outer = found
        for name, adapter in adapters.items():
            dtype = adapter.a.dtype
            if dtype not in (inner, torch.float32) and not (dtype in check.HALVES and inner == torch.float32):
                return f"adapter {name!r} is {dtype} beside {inner}"
            if dtype != x.dtype and not self.cast_input_dtype_enabled and autocast is None:
                return f"adapter {name!r} is {dtype} beside {x.dtype}, and x may not be converted"
            if adapter.magnitude is not None and torch.is_autocast_enabled("cuda"):
                # PEFT multiplies by m / ‖W + s·B A‖, in these dtypes. It converts y back outside of CUDA's autocast.
                outer = torch.promote_types(outer, torch.promote_types(adapter.magnitude.dtype, x.dtype))
        return inner, outer

    def _base_dtypes(self, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype] | str:
        """Return the dtypes in which the base is computed and y is returned, or why x's dtype cannot be served."""
        raise NotImplementedError

    def _compute(self, x: Tensor, operands: Operands) -> Tensor:
        self.settle(x)
        with no_autocast(device_type(x)):
            return as_dtype(super()._compute(as_dtype(x, operands.inner), operands), operands.outer)

    def compute_rows(self, x: Tensor, operands: Operands, numbers: Sequence[tuple[str, int]], rows: Rows) -> Tensor:
        self.settle(x)
        with no_autocast(device_type(x)):
            y = super().compute_rows(as_dtype(x, operands.inner), operands, numbers, rows)
            return as_dtype(y, operands.outer)


class Over4bit(_FusedBnb):
    """The part of a fused forward that depends on a ``Linear4bit``, nf4 or fp4, with double quantisation or without.

    PEFT converts x to compute_dtype for the base, and gives all bits of x to the adapter. One call computes both where
    nothing is lost by this: without autocast for an x in compute_dtype or where compute_dtype is fp32, under autocast
    where compute_dtype is autocast's or fp32. Without autocast beside another compute_dtype, as after
    ``prepare_model_for_kbit_training`` with an x in fp32 and compute_dtype bf16, there are two (`is_apart`):

        y = to x's dtype(c Wᵀ + bias),  c = x in compute_dtype          then y ← y + s · (dropout(x) Aᵀ) Bᵀ

    DoRA, and rows with adapters of their own, are one call there too, with all bits of x for the base as well. PEFT
    serves the calls under another autocast.
    """

    kind = Linear4bit

    @staticmethod
    def base_note(layer: Any) -> str:
        """Return the weight's format and the dtype of the computation."""
        dtype = _base_of(layer).compute_dtype or "the dtype of x"
        return f", {getattr(_FusedBnb._weight_of(layer), 'format', '')} in {str(dtype).removeprefix('torch.')}"

    def _base_dtypes(self, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype] | str:
        base: Any = self._modules["base_layer"]
        dtype = x.dtype
        inner = base.compute_dtype or dtype
        if not base.compute_type_is_set and dtype in (torch.float32, torch.bfloat16):
            inner = dtype  # bitsandbytes makes it compute_dtype at the first call
        if dtype not in DTYPES or inner not in DTYPES:
            return f"x is {dtype}, compute_dtype {inner}"
        if autocast is None:
            return torch.promote_types(inner, dtype), dtype
        if inner not in (autocast, torch.float32):
            return f"compute_dtype is {inner}, autocast asks for {autocast}: make bnb_4bit_compute_dtype the same"
        return inner, torch.promote_types(dtype, autocast)

    def compute_alike(self, x: Tensor, operands: Operands) -> Tensor:
        """Return y of the base with one adapter, or with several that are neither DoRA nor have dropout."""
        if not self.is_apart(operands):
            return super().compute_alike(x, operands)
        dtype, bias = self._modules["base_layer"].compute_dtype, operands.bias
        w, a, b, scale, b_biases, p = as_one_adapter(operands.with_bias(None))
        assert isinstance(w, QuantizedWeight)
        bias = None if bias is None else as_dtype(bias, dtype)
        y = lora_linear_apart(x, w, a, b, dtype=dtype, scale=scale, bias=bias, dropout_p=p, backend=self._backend)
        return y if b_biases is None else y + b_biases

    def is_apart(self, operands: Operands) -> bool:
        """Return whether the base is computed in compute_dtype, and the adapters of a call with all bits of x."""
        dtype = self._modules["base_layer"].compute_dtype
        if dtype in (None, operands.inner, torch.float32):
            return False
        return all(adapter.magnitude is None for adapter in operands.adapters.values())

    def settle(self, x: Tensor) -> None:
        """Set compute_dtype by x in the first call, as bitsandbytes does."""
        base: Any = self._modules["base_layer"]
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True


class FusedLinear4bit(Over4bit, peft_layers.Linear4bit):
    """PEFT's LoRA linear over a ``Linear4bit``."""

    peft_class = peft_layers.Linear4bit


class Over8bit(_FusedBnb):
    """The part of a fused forward that depends on a ``Linear8bitLt`` with has_fp16_weights=False."""

    kind = Linear8bitLt

    @classmethod
    def read_base(cls, layer: Any) -> tuple[QuantizedWeight, Tensor | None] | str:
        """Return the quantised W and the bias, or why they cannot be used. One reason is a base that is quantised again
        in every call."""
        if getattr(getattr(layer._modules["base_layer"], "state", None), "has_fp16_weights", False):
            return "its base has has_fp16_weights, and quantises its weight anew in every call"
        return super().read_base(layer)

    @staticmethod
    def base_note(layer: Any) -> str:
        """Return the weight's format, and the difference from bitsandbytes' own forward."""
        return ", int8 (x is not quantised)"

    def _base_dtypes(self, x: Tensor, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype] | str:
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}, the base weight in int8"
        if autocast is None:
            return x.dtype, x.dtype
        # While training on the CPU bitsandbytes calls torch's linear, which autocast converts.
        torch_linear = x.device.type in ("cpu", "xpu") and self.base_layer.training
        return autocast, autocast if torch_linear else torch.promote_types(x.dtype, autocast)


class FusedLinear8bitLt(Over8bit, peft_layers.Linear8bitLt):
    """PEFT's LoRA linear over a ``Linear8bitLt`` with has_fp16_weights=False. x is not rounded to 8 bits."""

    peft_class = peft_layers.Linear8bitLt
