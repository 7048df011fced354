"""`QuantizedLoRALinear`: a `FusedLoRALinear` whose frozen weight is stored in 4 or 8 bits (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.nn import merging
from lora_kernels.nn.init import split_named
from lora_kernels.nn.linear import FusedLoRALinear, check_settings, scaling_of
from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import QuantizedWeight, assemble, quantize_weight

_PARTS = ("weight_scales", "weight_table", "weight_absmax", "weight_offset")
"""The buffers of a quantised weight beside its codes; the last three with double quantisation only."""


class MergeReport(NamedTuple):
    """What quantising W' = W + s·B·A again has cost, by Frobenius norms; Q is what is stored of it."""

    error: float
    """‖Q - W'‖ / ‖W'‖"""
    update: float
    """‖s·B·A‖ / ‖W'‖: where it is not well above `error`, most of the update is lost."""


class QuantizedLoRALinear(FusedLoRALinear):
    """y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ over a W in nf4, fp4, int8 or fp8. On a CPU W never lies in memory
    whole; on a GPU it does during a call with many rows.

    Made by ``FusedLoRALinear.from_linear(linear, quant="nf4")``, by `over` and by `from_bnb`. `x` may have any dtype of
    `lora_linear`; `weight_dtype`, that of the weight that was quantised, is what A and B have by default.

    Attributes:
        weight: the codes, and weight_scales (with double quantisation weight_table, weight_absmax, weight_offset too)
            the rest, as in `QuantizedWeight`. Conversions of dtype (``.half()``) leave them alone.
        format: "nf4", "fp4", "int8" or "fp8". blocksize: of nf4 and fp4.

    ``state_dict`` has a key more, weight_format: format, blocksize and whether there is double quantisation, as a
    tensor of letters. Loading a dense weight [out, in], as from the state_dict of an ``nn.Linear``, quantises it as
    this one is. Loading another format, other shapes or half a weight raises ValueError, with nothing changed here.

    Raises:
        ValueError: use_dora, and what FusedLoRALinear raises.
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
        """The module over `weight`, whose tensors are shared, and `bias` [out], which is frozen.

        Raises:
            ValueError: use_dora; parts of `weight` that do not fit together, or a bias that does not fit it; and what
                FusedLoRALinear raises. TypeError: parts of another dtype.
        """
        check_settings(r, lora_alpha, lora_dropout)
        refuse_dora(use_dora, weight.format)
        weight.check()
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias {tuple(bias.shape)} does not fit a weight of {weight.shape}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.out_features, module.in_features = weight.shape
        module._unmerged = None
        module._put(weight)
        module.register_parameter("bias", bias)
        module._add_adapter(r, lora_alpha, lora_dropout, use_rslora, False, adapter_dtype, backend)
        return module

    @classmethod
    def _over_dense(cls, linear: nn.Linear, format: str, init: str, how: dict[str, Any], **settings: Any) -> Any:
        """``FusedLoRALinear.from_linear(linear, quant=format, init=init, **how, **settings)``: `how` W is quantised,
        and the `settings` of `over`, all of them."""
        refuse_dora(settings["use_dora"], format)
        split = split_named(init, format)
        if split is None:
            weight, start = quantize_weight(linear.weight, format, **how), ()
        else:
            scale = scaling_of(settings["lora_alpha"], settings["r"], settings["use_rslora"])
            weight, *start, _ = split(linear.weight, settings["r"], scale, format=format, **how)
        module = cls.over(weight, linear.bias, **settings)
        module._start(init, *start)
        return module.train(linear.training)

    @classmethod
    def from_bnb(cls, linear: nn.Linear, *, dtype: torch.dtype | None = None, **settings: Any) -> QuantizedLoRALinear:
        """The module over a ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes, sharing its tensors. `dtype` becomes
        `weight_dtype`, which is fp16 for a Linear8bitLt where none is given; `settings` are those of `over`."""
        return cls.over(from_bnb(linear, dtype), linear.bias, **settings).train(linear.training)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weight that was quantised."""
        return self._dtype

    @property
    def merged(self) -> bool:
        """Whether the stored weight is W + s·B·A, quantised again, at present."""
        return self._unmerged is not None

    def quantized_weight(self) -> QuantizedWeight:
        """What is stored, as one; its tensors are the module's own."""
        b: dict[str, Any] = self._buffers
        scales = [part for name in _PARTS if (part := b[name]) is not None]
        codes = self._tensors()["weight"]
        return assemble(codes, scales, self.format, self.blocksize, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → y [..., out_features]. Raises what `lora_linear` raises."""
        p = self._tensors()
        a, b, bias, w = p["lora_A"], p["lora_B"], p["bias"], self.quantized_weight()
        if self._unmerged is not None:
            self._warn_if_trained(a)
            return quantized_linear(x, w, bias, self.backend)
        dropout_p = self.lora_dropout if self.training else 0.0
        return lora_linear(x, w, a, b, scale=self.scaling, bias=bias, dropout_p=dropout_p, backend=self.backend)

    @torch.no_grad()
    def merge(self, safe: bool = True, lossy: bool = False) -> MergeReport:  # type: ignore[override]
        """weight ← W + s·B·A, quantised again; what was stored is kept for `unmerge`. In between W + s·B·A lies in
        memory whole, in fp32. Merging twice does nothing, and tells of the first time.

        Raises:
            ValueError: without `lossy`, because quantising again loses part of the update: `to_linear` merges into a
                dense layer instead; and for a result that is not finite, in both cases with nothing changed. (`safe` is
                as for a dense weight; here there is no way to store what is not finite.)
        """
        if not lossy:
            raise ValueError(
                f"merging into {self.format} quantises W + s·B·A again, which loses part of the update: ask for it "
                "with merge(lossy=True), which tells how much, or take to_linear() for a dense layer that loses nothing"
            )
        if self._unmerged is not None:
            return self._report
        before = self.quantized_weight()
        merged = self._merged_weight(safe=True, dtype=torch.float32)
        after = self._quantize(merged)
        wide = merging.wide_dtype(after.device)
        a, b = self.lora_A.to(wide), self.lora_B.to(wide)
        error = norm = update = 0.0
        for rows in merging.row_blocks(self.out_features):
            want = merged[rows].to(wide)
            norm += want.square().sum().item()
            error += (after.rows(rows.start, rows.stop, torch.float32).to(wide) - want).square().sum().item()
            update += (b[rows] @ a).square().sum().item()
        norm = max(norm, torch.finfo(torch.float64).tiny)
        self._put(after)
        self._unmerged = before
        self._report = MergeReport((error / norm) ** 0.5, abs(float(self.scaling)) * (update / norm) ** 0.5)
        return self._report

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight as it was before `merge`, bit for bit. Does nothing where nothing is merged."""
        if self._unmerged is not None:
            self._put(self._unmerged)
            self._unmerged = None

    def _put(self, w: QuantizedWeight) -> None:
        self.format, self.blocksize, self._dtype = w.format, w.blocksize, w.dtype
        self.weight = nn.Parameter(w.codes, requires_grad=False)
        parts = (w.scales, *(w.nested or (None, None, None)))
        for name, part in zip(_PARTS, parts, strict=True):
            self.register_buffer(name, part)

    def _quantize(self, w: Tensor) -> QuantizedWeight:
        """As what is stored is quantised."""
        old = self.quantized_weight()
        if self.format == "fp8":
            shape = tuple(old.scales.shape)
            scaling = "tensor" if shape == (1, 1) else "row" if shape == (self.out_features, 1) else "block"
            q = quantize_weight(w, "fp8", scaling=scaling)
        elif self.format == "int8":
            q = quantize_weight(w, "int8")
        else:
            nested = old.nested is not None
            q = quantize_weight(w, self.format, blocksize=self.blocksize, double_quant=nested)
        return replace(q, dtype=self._dtype)

    def _merged_weight(self, safe: bool, dtype: torch.dtype | None = None) -> Tensor:
        q = self._unmerged or self.quantized_weight()
        merged = merging.updated_weight(
            lambda rows: q.rows(rows.start, rows.stop, torch.float32),
            self.lora_A,
            self.lora_B,
            float(self.scaling),
            dtype or self._dtype,
        )
        if safe:
            merging.refuse_nonfinite(merged, self.scaling)
        return merged

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLoRALinear:
        """Moves everything, and converts what is no part of the quantised weight."""
        own = {id(part) for part in (self.weight, *(self._buffers[name] for name in _PARTS))}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in own or moved.dtype == t.dtype else t.to(moved.device)

        like = fn(torch.empty(0, dtype=self._dtype, device=self.weight.device))
        self._dtype = like.dtype
        if self._unmerged is not None:
            self._unmerged = replace(self._unmerged.to(like.device), dtype=like.dtype)
        super()._apply(move, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        q = self._unmerged or self.quantized_weight()
        for name, part in zip(("weight", *_PARTS), q.tensors, strict=False):
            destination[prefix + name] = part if keep_vars else part.detach()
        letters = list(self._signature().encode())
        destination[prefix + "weight_format"] = torch.tensor(letters, dtype=torch.uint8, device="cpu")

    def _signature(self) -> str:
        text = f"{self.format} {self.blocksize}" if self.blocksize else self.format
        return text + (" double_quant" if self._buffers["weight_table"] is not None else "")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._unmerged is not None:
            raise ValueError(
                f"{prefix or 'the module'}: the adapter is merged, and merging what is loaded would lose part of it: "
                "unmerge() before loading"
            )
        self._check_rank(state_dict, prefix)
        state_dict = self._stored_state(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [name for name in unexpected_keys if name != prefix + "weight_format"]

    def _stored_state(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """`state_dict` with a weight as it is stored here, all of it found to fit: torch would cast other dtypes and
        load half of what does not."""
        names, key = ("weight", *_PARTS), prefix + "weight_format"
        weight, mine = state_dict.get(prefix + "weight"), self.quantized_weight()
        nothing = "nothing was loaded into it"
        if key in state_dict:
            given = bytes(state_dict[key].tolist()).decode(errors="replace")
            if given != self._signature():
                raise ValueError(
                    f"{prefix}weight is in format {given!r}, this module's in {self._signature()!r}: {nothing}. "
                    "Build it with that format"
                )
            missing = [name for name, _ in zip(names, mine.tensors, strict=False) if prefix + name not in state_dict]
            if missing:
                raise ValueError(f"{key} is there, but not {', '.join(missing)}: {nothing}")
        elif weight is not None and weight.is_floating_point() and weight.shape == mine.shape:
            q = self._quantize(weight if self.weight.is_meta else weight.to(self.weight.device))
            parts = zip(names, q.tensors, strict=False)
            state_dict = state_dict | {prefix + name: part for name, part in parts}
        elif any(prefix + name in state_dict for name in names):
            got = "nothing" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
            raise ValueError(
                f"{prefix}weight must be dense, {mine.shape}, or come with weight_format as state_dict gives it; got "
                f"{got}: {nothing}"
            )
        stored = dict(zip(names, mine.tensors, strict=False))
        for name, own in (stored | dict(self.named_parameters(recurse=False))).items():
            other = state_dict.get(prefix + name, own)
            if other.shape != own.shape:
                raise ValueError(f"{prefix}{name} is {tuple(other.shape)}, here {tuple(own.shape)}: {nothing}")
            if name in stored and other.dtype != own.dtype:
                raise ValueError(f"{prefix}{name} is {other.dtype}, here {own.dtype}: {nothing}")
        return state_dict

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the shapes."""
        return f"{super().extra_repr()}, quant={self._signature()!r}"


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, backend: str | None = None) -> Tensor:
    """x Wᵀ + bias: `lora_linear` with an adapter of zeros."""
    N, K = weight.shape
    return lora_linear(x, weight, x.new_zeros(1, K), x.new_zeros(N, 1), scale=0.0, bias=bias, backend=backend)


def refuse_dora(use_dora: bool, format: str) -> None:
    """Raises ValueError where DoRA is asked for over a quantised weight."""
    if use_dora:
        raise ValueError(
            f"use_dora over a quantised weight ({format}) is not served: its norm needs W anew in every step. "
            "Leave use_dora or quant away"
        )
