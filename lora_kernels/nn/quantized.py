"""`QuantizedLoRALinear`: a `FusedLoRALinear` whose frozen weight is stored in 4 or 8 bits (QLoRA)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn import by_row, construct, loading, merging, offload
from lora_kernels.nn.base import AdapterLinear
from lora_kernels.nn.in_force import CURRENT, current_for
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.loading import PARTS
from lora_kernels.nn.merging import MergeReport
from lora_kernels.nn.recompute import REMEMBERED
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.dora import dora_linear
from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import Nested, QuantizedWeight, quantize_like

torch.fx.wrap("lora_linear")  # as in nn/linear.py
torch.fx.wrap("dora_linear")


class QuantizedLoRALinear(FusedLoRALinear):
    """y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ, or with use_dora DoRA, over a W in nf4, fp4, int8 or fp8. On a CPU
    about 8 MB of the dequantised W are in memory at a time; on a GPU it is there as a whole during a call, unless
    `triton` serves a call of few rows.

    Make one with ``FusedLoRALinear.from_linear(linear, quant="nf4")``, `over` or `from_bnb`, not with the constructor.
    x may have any dtype of `lora_linear`. A bias of another dtype, as bitsandbytes' layers often have, is converted to
    x's in each call. A and B are in fp32 by default. The other adapter_dtype is `weight_dtype`, the dtype of the weight
    that was quantised.

    Attributes:
        weight: a parameter, the codes of W as they are in `QuantizedWeight`, but as int8 in every format. Models that
            convert x to ``layer.weight.dtype``, such as transformers' T5, do not convert it if that dtype is int8.
        weight_scales: a buffer, the scales of the codes.
        weight_table, weight_absmax, weight_offset: buffers, the parts of double quantisation. They exist only with it.
        format: "nf4", "fp4", "int8" or "fp8".
        blocksize: the blocksize of nf4 and fp4; 0 for the other formats.

    Conversions of dtype (``.half()``) change neither the codes nor these buffers.

    ``state_dict`` has one more key, weight_format: the format, the blocksize and whether there is double quantisation,
    as a tensor of letters. A dense weight [out, in], such as that of an ``nn.Linear``, is quantised in the same way
    when it is loaded. Loading another format, other shapes or half a weight raises ValueError, with nothing changed.
    Files of earlier versions, whose codes may be uint8 or float8, load too.

    With use_dora the norms in d and in the first m are those of the W that the codes stand for. m follows a weight that
    is loaded, as in `FusedLoRALinear`.

    Raises:
        ValueError: what `FusedLoRALinear` raises.
    """

    format: str
    blocksize: int
    _dtype: torch.dtype
    _unmerged: QuantizedWeight | None
    _report: MergeReport

    @classmethod
    def over(
        cls,
        weight: QuantizedWeight,
        bias: nn.Parameter | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> QuantizedLoRALinear:
        """Return a module over `weight`, whose tensors are shared, and `bias` [out], which is frozen.

        Raises:
            ValueError: parts of `weight` that do not fit together, or a bias that does not fit it; and what
                `FusedLoRALinear` raises.
            TypeError: parts of another dtype.
        """
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
        return cast(QuantizedLoRALinear, construct.over_codes(cls, weight, bias, settings))

    @classmethod
    def from_dense(cls, linear: nn.Linear, settings: LoRASettings) -> QuantizedLoRALinear:
        """Return a module over `linear`'s weight, quantised as `settings` say, and its bias. The caller has checked
        that `linear` fits, with `fit.why_not`. `FusedLoRALinear.from_linear` documents the other errors."""
        return cast(QuantizedLoRALinear, construct.over_quantised(cls, linear, settings))

    @classmethod
    def from_bnb(cls, linear: nn.Linear, *, dtype: torch.dtype | None = None, **settings: Any) -> QuantizedLoRALinear:
        """Return a module over a ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes, whose tensors it shares.

        `dtype` becomes `weight_dtype`; None is the dtype of the weight that was quantised, and fp16 for a Linear8bitLt.
        `settings` are the keywords of `over`.
        """
        return cls.over(from_bnb(linear, dtype), linear.bias, **settings).train(linear.training)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weight that was quantised."""
        return self._dtype

    @property
    def merged(self) -> bool:
        """Whether the stored weight is W + s·B·A, quantised again, at present."""
        return self._unmerged is not None

    def quantized_weight(self) -> QuantizedWeight:
        """Return the stored weight. Its tensors are the module's own."""
        return self._assembled(self._parts()[0])

    def frozen_weight(self) -> QuantizedWeight:
        """Return W, also that of a merged module."""
        return self._unmerged or self.quantized_weight()

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the codes. Those of 4 bits lie two to a byte."""
        return self.out_features, self.in_features // (2 if self.blocksize else 1)

    def _assembled(self, codes: Tensor) -> QuantizedWeight:
        """Return the stored weight with these codes.

        It is assembled in every call, which takes a microsecond or two. An object kept between calls would keep its
        codes in memory after hooks that offload a model have replaced the parameter.
        """
        parts: dict[str, Any] = self._buffers
        table = parts.get("weight_table")
        nested = None if table is None else Nested(table, parts["weight_absmax"], parts["weight_offset"])
        N, K = codes.shape
        if self.blocksize:  # nf4 or fp4, which pack two elements in a byte
            K *= 2
        return QuantizedWeight(
            self.format, (N, K), self._dtype, codes, parts["weight_scales"], self.blocksize, nested, checked=True
        )

    @by_row.asks
    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out_features] for x = `input` [..., in_features]. Raises what `lora_linear` raises."""
        compiling = torch.compiler.is_compiling()
        if compiling or CURRENT.get() is not None or REMEMBERED:
            context = current_for(self)
            if context is not None:
                self.count_call(self.merged)
                return by_row.forward_in(context, self, input)
        codes, bias, a, b = self._parts()
        w = self._assembled(codes)
        if self._unmerged is not None:
            self._check_merged(codes, self._unmerged.codes, a)
            self.count_call(merged=True)
            return quantized_linear(input, w, bias, self.backend)
        if not compiling:
            self.__dict__["fused_calls"] = self.fused_calls + 1
        p = self.lora_dropout if self.training else 0.0
        s, backend = self.scaling, self.backend
        if self.use_dora:
            m = self.lora_magnitude_vector
            return dora_linear(input, w, a, b, m, scale=s, bias=bias, dropout_p=p, backend=backend)
        return lora_linear(input, w, a, b, scale=s, bias=bias, dropout_p=p, backend=backend)

    @torch.no_grad()
    def _reset_base(self) -> None:
        loading.refuse_sharded_codes(self)
        K, N = self.in_features, self.out_features
        made = nn.Linear(K, N, self.bias is not None, device=self.weight.device, dtype=self._dtype)
        before = self.quantized_weight()
        new = quantize_like(made.weight, before)
        for own, part in zip(before.tensors, (new.codes.view(torch.int8), *new.tensors[1:]), strict=True):
            own.copy_(part)
        if self.bias is not None:
            self.bias.copy_(made.bias)

    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def merge(self, safe: bool = True, lossy: bool = False) -> MergeReport:  # type: ignore[override]
        """Store W + s·B·A, or with DoRA d ⊙ that, quantised again, and return how much that loses. The old weight is
        kept for `unmerge`.

        W + s·B·A is in memory as a whole, in fp32, until it is quantised. Merging a merged module does nothing and
        returns the first report again. `safe` has no effect here, since a result that is not finite cannot be stored.

        Raises:
            ValueError: without `lossy`, because quantising again loses part of the update (`to_linear` loses nothing);
                for a result that is not finite; for a weight that is sharded, or on the meta device. Nothing is
                changed.
        """
        if not lossy:
            raise ValueError(
                f"merging into {self.format} quantises W + s·B·A again, which loses part of the update: ask for it "
                "with merge(lossy=True), which reports how much, or take to_linear(), a dense layer that loses nothing"
            )
        if self._unmerged is not None:
            return self._report
        with offload.onloaded(self):
            before = self.quantized_weight()
            merged = self._merged_weight(safe=True, dtype=torch.float32)
            after = quantize_like(merged, before)
            report = merging.report(merged, after, self._update(before, merged))
            if offload.hook_of(self) is not None:
                before = before.to("cpu")
            self._put(after)
        self._unmerged, self._report = before, report
        self.__dict__["_merged_as"] = None if offload.hook_of(self) else self._parameters["weight"]
        return report

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the tensors back that `merge` has replaced. Does nothing where nothing is merged. Raises ValueError where
        the module was offloaded after it was merged."""
        before = self._unmerged
        if before is not None:
            if not (before.codes.is_meta or offload.has_replaced(self, "weight")):
                merging.refuse_absent(self)
            with offload.onloaded(self):
                here = self.weight.device
                self._put(before if before.device == here else before.to(here))  # merged while it was offloaded
            self._unmerged = self.__dict__["_merged_as"] = None

    def _put(self, w: QuantizedWeight) -> None:
        """Make the tensors of `w` the stored ones."""
        codes, *scales = w.tensors
        if not isinstance(codes, nn.Parameter) or codes.dtype != torch.int8:
            codes = nn.Parameter(codes.detach().view(torch.int8), requires_grad=False)
        self.format, self.blocksize, self._dtype = w.format, w.blocksize, w.dtype
        self.register_parameter(PARTS[0], codes)
        for name, part in zip(PARTS[1:], scales, strict=False):
            self.register_buffer(name, part)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. Raises TypeError for a `weight` that holds no codes, which code that ties
        weights may set."""
        if name == "weight" and param is not None and param.dtype != torch.int8:
            raise TypeError(
                f"the weight of this {type(self).__name__} is stored in {self.format}, and a Parameter in "
                f"{param.dtype} cannot take its place: "
                'load_state_dict({"weight": w}, strict=False) quantises w'
            )
        super().register_parameter(name, param)

    def _update(self, w: QuantizedWeight, merged: Tensor) -> Callable[[slice], Tensor]:
        """Return a function that gives rows of what the adapter adds to W: s·B A, or with DoRA the merged weight minus
        W."""
        wide = merging.wide_dtype(merged.device)
        if self.use_dora:
            return lambda rows: merged[rows].to(wide) - w.rows(rows.start, rows.stop, torch.float32).to(wide)
        a, b, scale = self.lora_A.to(wide), self.lora_B.to(wide), float(self.scaling)
        return lambda rows: b[rows] @ a * scale

    def _merged_weight(self, safe: bool, dtype: torch.dtype | None = None) -> Tensor:
        merging.refuse_absent(self)
        merging.refuse_sharded(self, self.whole_shapes)
        q = self.frozen_weight()
        merged = merging.updated_weight(
            lambda rows: q.rows(rows.start, rows.stop, torch.float32),
            self.lora_A,
            self.lora_B,
            float(self.scaling),
            dtype or self._dtype,
            self._ratio(),
        )
        if safe:
            merging.refuse_nonfinite(merged, self.scaling)
        return merged

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLoRALinear:
        """Move every tensor with `fn`, and convert the dtype only of those that are no part of the quantised weight."""
        own = {id(part) for part in self.quantized_weight().tensors}

        @functools.wraps(fn)  # its name tells the adapter of ``to_empty``
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in own or moved.dtype == t.dtype else t.to(moved.device)

        like = fn(torch.empty(0, dtype=self._dtype, device=self.weight.device))
        self._dtype = like.dtype
        if self._unmerged is not None and self._unmerged.codes.is_meta:
            self._unmerged = None  # it has no values that could be put back
        if self._unmerged is not None:
            kept = self._unmerged if self.weight.is_meta else self._unmerged.to(like.device)  # or it is offloaded
            self._unmerged = replace(kept, dtype=like.dtype)
        super()._apply(move, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        q = self.frozen_weight()
        for name, part in zip(PARTS, q.tensors, strict=False):
            destination[prefix + name] = part if keep_vars else part.detach()
        letters = list(loading.signature(self).encode())
        destination[prefix + "weight_format"] = torch.tensor(letters, dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, _, unexpected_keys, _ = rest  # nn.Module gives: metadata, strict, missing, unexpected, errors
        if self._unmerged is not None:
            raise ValueError(
                f"{prefix or 'the module'}: the adapter is merged, and merging what is loaded would lose part of it: "
                "unmerge() before loading"
            )
        loading.check_rank(self, state_dict, prefix)
        state_dict = loading.stored_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        unexpected_keys[:] = [name for name in unexpected_keys if name != prefix + "weight_format"]

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the shapes."""
        return f"{super().extra_repr()}, quant={loading.signature(self)!r}"


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, backend: str | None = None) -> Tensor:
    """Return x Wᵀ + bias, as `lora_linear` computes it with an adapter of zeros."""
    N, K = weight.shape
    return lora_linear(x, weight, x.new_zeros(1, K), x.new_zeros(N, 1), scale=0.0, bias=bias, backend=backend)


AdapterLinear.quantized_kind = QuantizedLoRALinear
