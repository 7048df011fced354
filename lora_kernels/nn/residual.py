"""`ResLoRALinear`: a LoRA layer with shortcuts from the layers of the same kind in earlier blocks.

With n the number of a block, and s, A_n, B_n those of its LoRA layer:

    bs  y_n = W_n x_n + bias_n + s · Σ_{k=0..p} B_{n−k} A_{n−k} x̂_n
    is  y_n = W_n x_n + bias_n + s · B_n A_n dropout(x_n + x_{n−1})           x_{−1} = x_0
    ms  y_n = W_n x_n + bias_n + s · B_n (A_n x̂_n + Σ_{k=1..p} A_{n−k} x̂_{n−k})

Shi et al., "ResLoRA: Identity Residual Mapping in Low-Rank Adaption", 2024 (arXiv:2402.18039). "bs" is the block
shortcut, "is" the input shortcut and "ms" the middle shortcut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lora_kernels.core.dropout import draw_seed
from lora_kernels.nn.adapter import FilePart
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.nn.residual_calls import Chain, refuse_compilers
from lora_kernels.ops.around import add_low_rank
from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.weight import QuantizedWeight

Structure = Literal["bs", "is", "ms"]
_Base = tuple[Tensor | QuantizedWeight, Tensor | None]
"""W and bias."""


class ResLoRALinear(FusedLoRALinear):
    """A `FusedLoRALinear` with shortcuts from the layers before it, as `lora_kernels.apply_reslora` makes them.

    In "bs" it is a LoRA layer of rank Σ r: its A is that of this layer on top of those of the layers before it, and its
    B is theirs side by side, with one dropout mask for all of them. It is computed as that in one call, so it saves
    what such a layer saves, and is merged without an error. A and B stay parameters of their own layers: a
    ``state_dict`` has each of them once, and each gets the sum of its gradients. A copy of the model, or a pickle, has
    the same references inside of itself. ``deepcopy`` of one layer alone copies the layers before it too.

    In "is" and "ms" it reads what earlier layers have read or computed in the same forward of the module around the
    blocks, in this thread (`lora_kernels.nn.residual_calls`). So it cannot be called alone, and cannot be merged.

    A merged layer holds the values of the moment of `merge`, those of the other layers' A and B included.

    Attributes:
        structure: "bs", "is" or "ms".
        earlier: the layers that it has shortcuts from, the furthest first. They are no children of this module.
        lora_A, lora_B, r, lora_alpha, scaling: its own. `scaling` multiplies all of its sum.
        weight, bias, lora_dropout, merged: as in `FusedLoRALinear`.

    Raises:
        ValueError: by `merge`, `to_linear` and adapter files in "is" and "ms"; where an A or B of an earlier layer is
            sharded, or has no values.
        RuntimeError: by a forward in "is" and "ms" outside of one of the module around the blocks, also by a
            recomputation of activation checkpointing that does not compute all of that module.
    """

    plain_kind: ClassVar[type[FusedLoRALinear]] = FusedLoRALinear
    """The class of the same layer without shortcuts."""

    structure: Structure
    earlier: tuple[ResLoRALinear, ...]
    _chain: Chain
    _place: int
    """The place in the chain."""

    def connect(self, structure: Structure, chain: Chain, place: int, earlier: Sequence[ResLoRALinear]) -> None:
        """Give the layer its shortcuts from the layers `earlier`, which end before `place` in `chain`."""
        # The furthest comes first: copying a model then meets every layer before those that refer to it.
        self.__dict__.update(structure=structure, earlier=tuple(earlier), _chain=chain, _place=place)

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out_features] for x = `input` [..., in_features]. Raises what `lora_linear` raises."""
        if self.structure == "bs":
            return super().forward(input)
        refuse_compilers()
        self.count_call()
        weight, bias, a, b = self._parts()
        p = self.lora_dropout if self.training else 0.0
        # One seed for all products over x: the mask is a function of it and of the place of an element.
        how: dict[str, Any] = {"dropout_p": p, "seed": draw_seed(input.device) if p else None, "backend": self.backend}
        base = self._base_of(weight), bias
        if self.structure == "is":
            return self._with_input_shortcut(input, base, a, b, how)
        return self._with_middle_shortcuts(input, base, a, b, how)

    def _base_of(self, weight: Any) -> Tensor | QuantizedWeight:
        """Return W for the weight that `_parts` gives."""
        return cast(Tensor, weight)

    def _with_input_shortcut(self, x: Tensor, base: _Base, a: Tensor, b: Tensor, how: dict[str, Any]) -> Tensor:
        """Return x_n Wᵀ + bias + s · B A dropout(x_n + x_{n−1}), as LoRA over x_n plus the low-rank half over x_{n−1}
        with the same mask. No sum of the two is made or saved."""
        s, before = self.scaling, self._before(x.shape)
        self._chain.hand_on(self._place, x)
        if not before:  # reads x + x, so that the update has the same magnitude in every block
            return lora_linear(x, base[0], a, b, scale=2 * s, bias=base[1], **how)
        y = lora_linear(x, base[0], a, b, scale=s, bias=base[1], **how)
        return add_low_rank(y, before[0], a, b, scale=s, **how)

    def _with_middle_shortcuts(self, x: Tensor, base: _Base, a: Tensor, b: Tensor, how: dict[str, Any]) -> Tensor:
        """Return x_n Wᵀ + bias + s · B (A_n x̂_n + Σ h_{n−k}), as LoRA over x_n plus s · B Σ h_{n−k}. A layer that later
        ones read computes its h again, with the same mask, so that it has a graph of its own."""
        shape, one = (*x.shape[:-1], self.r), torch.eye(self.r, dtype=a.dtype, device=a.device)
        before = self._before(shape)
        if self._chain.is_read(self._place):
            self._chain.hand_on(self._place, add_low_rank(a.new_zeros(shape), x, a, one, scale=1.0, **how))
        y = lora_linear(x, base[0], a, b, scale=self.scaling, bias=base[1], **how)
        if not before:
            return y
        total = before[0] if len(before) == 1 else torch.stack(before).sum(0)
        return add_low_rank(y, total, one, b, scale=self.scaling, backend=self.backend)

    def _before(self, shape: Sequence[int]) -> list[Tensor]:
        """Return what the earlier layers have handed on. Raises ValueError for tensors of another shape."""
        before = self._chain.before(self._place, len(self.earlier))
        names = self._chain.names
        for k, other in enumerate(before, 1):
            if other.shape != torch.Size(shape):
                raise ValueError(
                    f"the rows of {names[self._place]} are not those of {names[self._place - k]}: "
                    f"{tuple(shape[:-1])} and {tuple(other.shape[:-1])}. Shortcuts of activations need the same tokens "
                    'in every block: take structure="bs"'
                )
        return before

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        weight, bias, a, b = super()._parts()
        if self.structure == "bs" and self.earlier:
            a, b = self._stacked(a, b)
        return weight, bias, a, b

    def _stacked(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [Σr, K] and B [N, Σr] of this layer and of those before it, the nearest first."""
        all_a, all_b = [a], [b]
        for layer in reversed(self.earlier):
            all_a.append(_beside(a, layer.lora_A, (layer.r, layer.in_features)))
            all_b.append(_beside(b, layer.lora_B, (layer.out_features, layer.r)))
        return torch.cat(all_a), torch.cat(all_b, 1)

    @property
    def total_rank(self) -> int:
        """The rank of the LoRA layer that this one computes: Σ r in "bs", else r."""
        return self.r + sum(layer.r for layer in self.earlier) if self.structure == "bs" else self.r

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [Σr, K] and B [N, Σr] of the plain LoRA layer that computes the same, this layer's own first and
        then those of the layers before it, the nearest first. Raises ValueError in "is" and "ms"."""
        if self.structure != "bs":
            raise ValueError(
                f'a layer of structure="{self.structure}" reads activations of other layers, so no adapter of its own '
                "computes the same. lora_kernels.reslora_to_lora(model, inputs) makes plain LoRA layers of them, and "
                "reports what that changes"
            )
        return self._stacked(self.lora_A, self.lora_B)

    @torch.inference_mode(False)
    @torch.no_grad()
    def as_lora(self, a: Tensor | None = None, b: Tensor | None = None) -> FusedLoRALinear:
        """Return a plain LoRA layer over the same weight and bias, with copies of A and B; by default of `factors`,
        with which it computes the same. Raises ValueError where the adapter has no values, and what `factors`
        raises."""
        if a is None or b is None:
            a, b = self.factors()
        kind: Any = self.plain_kind
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        own = {"structure", "earlier", "_chain", "_place"} | layer.__dict__.keys()
        layer.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        layer.training = self.training
        layer._parameters.update(self._parameters)
        layer._buffers.update(self._buffers)
        for name, value in (("lora_A", a), ("lora_B", b)):
            trained = self._parameters[name].requires_grad  # type: ignore[union-attr]
            layer._parameters[name] = nn.Parameter(value.detach().clone(), trained)
        ratio = a.shape[0] / self.r
        layer.r = a.shape[0]
        layer.lora_alpha = _whole(self.lora_alpha * (math.sqrt(ratio) if self.use_rslora else ratio))
        return cast(FusedLoRALinear, layer)

    def _merged_weight(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_lora()._merged_weight(*args, **kwargs)

    def file_parts(self) -> dict[str, FilePart]:
        """Raise ValueError: PEFT's format has no shortcuts."""
        raise ValueError(
            "the adapter of a ResLoRA layer is no plain LoRA of its own. "
            + (
                "lora_kernels.save_reslora(model, directory) writes the plain LoRA of rank Σr that computes the same, "
                "and load_reslora reads it"
                if self.structure == "bs"
                else "Keep state_dict() to go on training; lora_kernels.reslora_to_lora(model, inputs) makes plain "
                "LoRA layers, and reports what that changes"
            )
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel makes replicas of layers one by one, whose shortcuts would lead to the layers of the "
            "first GPU: take DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the shapes."""
        return f"{super().extra_repr()}, structure={self.structure!r}, earlier={len(self.earlier)}"


class ResLoRAConv1D(ResLoRALinear, FusedLoRAConv1D):
    """A `ResLoRALinear` over the Conv1D of transformers, whose `weight` is Wᵀ."""

    plain_kind = FusedLoRAConv1D


class QuantizedResLoRALinear(ResLoRALinear, QuantizedLoRALinear):
    """A `ResLoRALinear` over a W in 4 or 8 bits."""

    plain_kind = QuantizedLoRALinear

    def _base_of(self, weight: Any) -> QuantizedWeight:
        return self._assembled(weight)

    def _update(self, w: QuantizedWeight, merged: Tensor) -> Callable[[slice], Tensor]:
        return cast(QuantizedLoRALinear, self.as_lora())._update(w, merged)


KINDS: dict[type[FusedLoRALinear], type[ResLoRALinear]] = {
    kind.plain_kind: kind for kind in (ResLoRALinear, ResLoRAConv1D, QuantizedResLoRALinear)
}
"""The class with shortcuts for each class of plain layers."""


def _beside(own: Tensor, other: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the factor `other` of an earlier layer with the dtype and device of this layer's `own`. Raises ValueError
    where it is not whole here."""
    if other.shape != shape or hasattr(other, "placements") != hasattr(own, "placements"):
        raise ValueError(
            f"a factor {shape} of an earlier layer is sharded here, {type(other).__name__} {tuple(other.shape)}: a "
            "block with shortcuts reads the factors of the blocks before it. Give fully_shard() the module around all "
            "blocks, not each block, or leave the adapters out of sharding (ignored_params)"
        )
    if other.is_meta and not own.is_meta:
        raise ValueError(
            "a factor of an earlier layer is on the meta device and has no values: an offloaded model has the factors "
            "of one block at a time. Keep the adapters on the device of the forward"
        )
    return other if other.dtype == own.dtype and other.device == own.device else other.to(own.device, own.dtype)


def _whole(alpha: float) -> float:
    """Return alpha as an int where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha
