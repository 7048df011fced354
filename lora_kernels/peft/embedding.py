"""`FusedEmbedding`: PEFT's LoRA embedding on the fused path, for plain LoRA and for DoRA.

    result = base(ids) + Σ over active adapters of embed_scale · scaling · A[:, ids]ᵀ Bᵀ

The row padding_idx of the table is not adapted: PEFT gives it no gradient either, but adds what its A holds there.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_kernels.nn.dry_run import Watched
from lora_kernels.nn.embedding_fit import is_scaled, why_not_options
from lora_kernels.ops import check
from lora_kernels.ops.embedding import lora_embedding
from lora_kernels.ops.embedding_passes import without_row
from lora_kernels.peft import hooked, known, merged_terms
from lora_kernels.peft.by_row import KEYWORDS
from lora_kernels.peft.layer import FusedLayer, Survey
from lora_kernels.peft.merging import Sum

_USES = """
F T VARIANT_KWARG_KEYS __base__ _check_forward_args _embed _get_embed_scale _mixed_batch_forward active_adapter
active_adapters adapter_names append base_layer disable_adapters dtype embedding enumerate forward get get_base_layer
input_fn input_fns keys lora_embedding_A lora_embedding_B lora_variant max_norm merged norm_type output_fn output_fns
padding_idx pop result scale_grad_by_freq scaling set sparse to unmerge x
"""
"""The names that PEFT's forwards of an embedding with plain LoRA use."""
_DORA_USES = """
T _embed _get_embed_scale adapter_name base_layer detach dtype embed_fn get_base_layer get_lora_weight get_weight_norm
lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector lora_weight scaling to weight
"""
"""The names that the forwards of PEFT's DoRA over an embedding use."""
_DORA_UNKNOWN = known.why_not(DoraEmbeddingVariant, _DORA_USES) or known.why_not(DoraEmbeddingLayer, _DORA_USES)
"""Why DoRA of the installed PEFT cannot be fused; "" for the versions that this package knows."""


class _Adapter(NamedTuple):
    """One adapter of a PEFT layer."""

    a: Tensor
    """[R, V]"""
    b: Tensor
    """[D, R]"""
    scale: float | Tensor
    magnitude: Tensor | None


class FusedEmbedding(FusedLayer, peft_layer.Embedding):
    """PEFT's LoRA over an ``nn.Embedding`` or a scaled embedding of transformers. `lora_kernels.lora_embedding`
    computes every call that it can serve.

    PEFT ignores lora_dropout in an embedding, and so does this class. A table with sparse=True gets a dense gradient of
    A, where PEFT's backward raises an error.
    """

    peft_class = peft_layer.Embedding
    _modules: Any
    lora_embedding_A: Any
    lora_embedding_B: Any
    lora_magnitude_vector: Any
    lora_variant: Any
    scaling: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's forward returns for ids x, of int64 or int32."""
        read = self._read(x, args, kwargs)
        compiling = torch.compiler.is_compiling()
        if isinstance(read, str):
            if not compiling:
                self.count_left(read)
            return self.peft_class.forward(self, x, *args, **kwargs)
        if not compiling:
            self.__dict__["fused_calls"] += 1
        base = self._modules["base_layer"]
        a, b, scale, magnitude = _as_one(read)
        return lora_embedding(
            x,
            base.weight,
            a.t(),
            b,
            scale=scale,
            embed_scale=getattr(base, "embed_scale", 1.0),
            padding_idx=base.padding_idx,
            magnitude=magnitude,
        )

    def _read(self, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> list[_Adapter] | str:
        """Return the adapters of a forward with these arguments, or why PEFT's own forward serves it: "" where no
        adapter is to be computed."""
        if kwargs.get("adapter_names") is not None:
            return "adapter_names, with an adapter of its own for each sample"
        if self.disable_adapters or self.merged:
            return ""
        if args or any(key not in KEYWORDS for key in kwargs):
            return "further arguments for the base layer"
        names = [name for name in self.active_adapters if name in self.lora_embedding_A]
        if not names:
            return ""
        if x.dtype not in (torch.int64, torch.int32):
            return f"ids are {x.dtype}"
        if reason := self._why_not_base(self):
            return reason
        if x.device != (weight := self._modules["base_layer"].weight).device:
            return hooked.not_there("x", x, weight)
        adapters = []
        for name in names:
            adapter = self._read_adapter(self, name)
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
        if len(adapters) > 1 and any(each.magnitude is not None for each in adapters):
            return "a DoRA adapter beside others"
        return adapters

    @staticmethod
    def _why_not_base(layer: Any) -> str:
        """Return why no adapter can be fused with the base of `layer`, which may not be fused yet."""
        base = layer._modules["base_layer"]
        kind = type(base)
        if isinstance(base, BaseTunerLayer):
            return "its base is another tuner's layer"
        if not isinstance(base, nn.Embedding):
            return f"its base is a {kind.__name__}"
        if not is_scaled(base) and (kind.forward is not nn.Embedding.forward or hasattr(base, "embed_scale")):
            return f"its base is a {kind.__name__} with a forward of its own"
        if type(base.weight) not in (nn.Parameter, Tensor):
            return f"its base weight is a {type(base.weight).__name__}"
        if base.weight.requires_grad:
            return "its base weight is trained"
        if base.weight.dtype not in check.DTYPES:
            return f"its base weight is {base.weight.dtype}"
        if reason := why_not_options(base):
            return reason
        if reason := hooked.refusal("its base layer", base):
            return reason
        if getattr(layer, "tp_layer", None) is not None:
            return "its table is distributed by a tensor parallel plan"
        return ""

    @staticmethod
    def _read_adapter(layer: Any, name: str) -> _Adapter | str:
        """Return adapter `name` of `layer`, which may not be fused yet, or why it cannot be fused."""
        variant, magnitude = layer.lora_variant.get(name), None
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        dtype = layer._modules["base_layer"].weight.dtype
        for t in (a, b):
            if type(t) not in (nn.Parameter, Tensor):
                return f"adapter {name!r} has a {type(t).__name__}"
            if t.dtype != a.dtype or not (t.dtype == dtype or (t.dtype == torch.float32 and dtype in check.HALVES)):
                return f"adapter {name!r} is {a.dtype} and {b.dtype} beside {dtype}"
        if variant is not None:
            if type(variant) is not DoraEmbeddingVariant:
                return f"adapter {name!r} is a {type(variant).__name__}"
            if _DORA_UNKNOWN:
                return _DORA_UNKNOWN
            module = layer.lora_magnitude_vector[name]
            magnitude = module.weight
            if reason := hooked.refusal(f"the magnitude of adapter {name!r}", module):
                return reason
            if magnitude.dtype not in (a.dtype, torch.float32) or (a.dtype == torch.float64 != magnitude.dtype):
                return f"adapter {name!r} has a magnitude in {magnitude.dtype} beside {a.dtype}"
        return _Adapter(a, b, layer.scaling[name], magnitude)

    def adapters_to_merge(self) -> Container[str]:
        """Return the names of the adapters that this layer has."""
        adapters: Container[str] = self.lora_embedding_A
        return adapters

    def sums(self, names: Sequence[str]) -> Sequence[Sum]:
        """Return what merging the adapters `names` adds to the table [V, D], but for the row padding_idx."""
        base: Any = self.get_base_layer()
        terms = []
        for name in names:
            merged_terms.check_variant(self, name)
            a = self.lora_embedding_A[name].detach()
            if base.padding_idx is not None:
                a = without_row(a.t(), base.padding_idx).t()
            scale, magnitude = merged_terms.scale_of(self, name), merged_terms.magnitude(self, name)
            terms.append(merged_terms.product(a, self.lora_embedding_B[name], scale, True, magnitude))
        return [Sum(base, "weight", terms)]

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why PEFT's forward of this class is not the one that this package knows, or "" where it is."""
        return known.why_not(cls.peft_class, _USES, "forward", "_mixed_batch_forward", "_embed")

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return the size of the table and the adapters of `layer`, or why its base cannot be read."""
        if reason := cls._why_not_base(layer):
            return reason
        names = list(layer.lora_embedding_A)
        adapters = [cls._read_adapter(layer, name) for name in names]
        V, D = layer._modules["base_layer"].weight.shape
        ranks = ", ".join(f"{name} r={layer.r[name]}" for name in names)
        return Survey(f"{V}×{D}, {ranks}", tuple(why for why in adapters if isinstance(why, str)))

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for one that computes no adapter at present."""
        a = [self.lora_embedding_A[name] for name in self.active_adapters if name in self.lora_embedding_A]
        if self.merged or self.disable_adapters or not a:
            return None
        base = [self._modules["base_layer"].weight]
        return Watched(cast(nn.Module, self), base, a, lambda: (self.fused_calls, dict(self.passed_over)))


def _as_one(adapters: list[_Adapter]) -> _Adapter:
    """Return several adapters as one, whose rank is the sum of theirs."""
    if len(adapters) == 1:
        return adapters[0]
    # In 16 bits s·B would be rounded, and the gradient of s·B may overflow where that of B, s times it, does not.
    dtypes = [each.a.dtype for each in adapters]
    wide = torch.promote_types(max(dtypes, key=lambda dtype: dtype.itemsize), torch.float32)
    a = torch.cat([each.a.to(wide) for each in adapters])
    b = torch.cat([each.b.to(wide) * each.scale for each in adapters], 1)
    return _Adapter(a, b, 1.0, None)
