"""`Update`: a low-rank update of a model beside the weight that it belongs to, and their sum in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.pairs import ATTENTION, CONV, EMBEDDING, EXPERTS, Pair
from lora_kernels.nn import merging
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.merged_sums import sum_dtype
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.ops.embedding_passes import without_row
from lora_kernels.train import sharded

_BLOCK, _BLOCK_ON_A_GPU = 1 << 19, 1 << 24
"""The number of elements that are computed at a time, which bounds the temporaries."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Update:
    """W + s·B A, of which each process holds the part that it has of W."""

    pair: Pair
    weight: nn.Parameter
    """The Parameter that holds W."""
    turned: bool
    """Whether it holds Wᵀ."""
    w: Tensor
    """[G, P, Q], a view of the memory of `weight`: W, or Wᵀ."""

    @property
    def name(self) -> str:
        """The name of the layer, and the part of it if it has several updates."""
        return ".".join(filter(None, (self.pair.name, self.pair.part))) or "the layer"

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return left [G, P, R] and right [G, R, Q], whose product belongs to `w`: B and A, or Aᵀ and Bᵀ. Every process
        that has a part of them makes this call."""
        pair = self.pair
        a, b = pair.as_a(sharded.whole(pair.a)), pair.as_b(sharded.whole(pair.b))
        if pair.kind == EMBEDDING and (row := getattr(pair.layer, "padding_idx", None)) is not None:
            a = without_row(a[0].t(), row).t()[None]  # a layer of ours passes over the update of this row
        if pair.kind == CONV:
            order = _in_memory(self.weight)
            inside = a.view(*a.shape[:2], *self.weight.shape[1:])
            a = inside.permute(0, 1, *(dim + 1 for dim in order)).reshape(a.shape)
        left, right = (a.mT, b.mT) if self.turned else (b, a)
        return sharded.parts_beside(self.weight, left, right, pair.kind == EXPERTS)

    def overflows(self) -> bool:
        """Return whether an element of this process's part of W + s·B A is not finite in W's dtype."""
        left, right = self.sides()
        if not self.w.numel():
            return False
        rows, columns = left.float().norm(dim=2).amax(), right.float().norm(dim=1).amax()
        least, most = self.w.aminmax()
        bound = torch.maximum(-least, most).float() + abs(self.pair.scale) * rows * columns
        if bound.item() <= torch.finfo(self.w.dtype).max:
            return False
        return any(
            not torch.isfinite(total.to(self.w.dtype)).all() for *_, total, _ in self._sums(self.w, (left, right))
        )

    def add(self, master: Tensor | None = None) -> tuple[float, float]:
        """Write W + s·B A over W, and return the Frobenius norms of s·B A and of what rounding has changed.

        Blocks of W are computed one after the other, in fp32, or in fp64 where W or an adapter is in fp64 or torch may
        round the factors of fp32 products. With `master`, W in fp32 of the shape of `w`, the sums are made in it, and W
        is what it rounds to.
        """
        norm = lost = 0.0  # squares
        start = self.w if master is None else master
        for place, before, change, total, spare in self._sums(start, self.sides()):
            arrived, in_place = total, before is not spare
            error = spare if in_place else total
            if not in_place:
                start[place].copy_(total)
            if master is not None:
                self.w[place].copy_(total if in_place else start[place])
            if master is not None or not in_place:
                arrived = error.copy_(self.w[place])
            torch.sub(arrived, before, out=error).sub_(change)  # what has arrived in W, less what should have
            norm += _squares(change)
            if in_place:
                start[place].copy_(total)
            lost += _squares(error)
        return sharded.summed(norm, self.weight) ** 0.5, sharded.summed(lost, self.weight) ** 0.5

    def _sums(
        self, start: Tensor, sides: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[Any, Tensor, Tensor, Tensor, Tensor]]:
        """Yield, for one block of [G, P, Q] after the other: where it is, `start`, the update of `sides` and their sum
        there, and a spare block. `start` is itself the block where it has the dtype of the sums, else its copy is in
        the spare block. The memory of the last three is that of the next block."""
        wide, device = sum_dtype(self.w, self.pair.a, self.pair.b), self.w.device
        G, P, Q = self.w.shape
        rows = max(1, (_BLOCK if device.type == "cpu" else _BLOCK_ON_A_GPU) // max(1, Q))
        buffers = torch.empty(3, min(rows, P), Q, dtype=wide, device=device)
        for g in range(G):
            left, right = (side[g].to(wide) for side in sides)
            left = left * self.pair.scale
            for first in range(0, P if Q else 0, rows):  # a process may hold no column of W
                place = g, slice(first, min(P, first + rows))
                change, total, spare = buffers[:, : min(P, first + rows) - first]
                before = start[place] if start.dtype == wide else spare.copy_(start[place])
                torch.mm(left[place[1]], right, out=change)
                yield place, before, change, torch.add(before, change, out=total), spare


def _squares(values: Tensor) -> float:
    """Return the sum of squares of a contiguous tensor. They are made in fp64 where they may be too small or too large
    for its own dtype."""
    flat = values.view(-1)
    squares = torch.dot(flat, flat).item()
    if not 1e-25 < squares < 1e30 and flat.any():
        squares = flat.to(merging.wide_dtype(flat.device)).square_().sum().item()
    return squares


def update_of(pair: Pair) -> Update | str:
    """Return the update of `pair` beside its weight, or why it cannot be added to it."""
    reason = _of_layer(pair)
    if reason:
        return reason
    owner, name, turned = _place(pair)
    weight = owner._parameters.get(name)
    if weight is None:
        return f"its {name} is no parameter of its own, but parametrised, pruned or quantised"
    if weight.is_meta or pair.a.is_meta or pair.b.is_meta:
        return (
            "it has no values here, as in a model that accelerate has offloaded: call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        )
    if not sharded.is_plain(weight) or weight.dtype not in _FLOATS:
        return (
            f"its {name} is a {type(weight).__name__} in {weight.dtype}: to quantise W + s·B·A again loses part of the "
            "update at every restart. Train over a dense weight, such as bf16"
        )
    if not weight.device == pair.a.device == pair.b.device:
        return f"its {name} is on {weight.device}, A on {pair.a.device} and B on {pair.b.device}: move them together"
    if not pair.zero_at_start.requires_grad:
        return "the matrix that restart makes zero is frozen, so the update would stay zero"
    if pair.scale == 0:
        return "its scaling is 0, so the restart would throw its values away"
    return _beside(pair, weight, turned)


def _of_layer(pair: Pair) -> str:
    """Return why the layer of `pair` as a whole cannot take in the update; "" where it can."""
    layer: Any = pair.layer
    if layer.merged:
        return "it is merged: unmerge() it first"
    if isinstance(layer, QuantizedLoRALinear):
        return (
            f"its weight is in {layer.format}: to quantise W + s·B·A again loses part of the update at every restart. "
            "Train over a dense weight, such as bf16"
        )
    if isinstance(layer, AdapterLayer):
        return ""
    if layer.disable_adapters:
        return "its adapters are disabled: call enable_adapter_layers() first"
    names = {*layer.lora_A, *layer.lora_embedding_A}
    if len(names) > 1:
        others = sorted(names - {pair.adapter})
        return (
            f"it has the adapters {', '.join(others)} too, which were made for W as it is: delete_adapter() them first"
        )
    if list(layer.active_adapters) != [pair.adapter]:
        return f"its adapter {pair.adapter!r} is not active: set_adapter({pair.adapter!r}) first"
    variant = type(layer.lora_variant.get(pair.adapter)).__name__
    if "ALora" in variant:
        return "it is an activated LoRA, whose update some tokens do not get"
    return ""


def _place(pair: Pair) -> tuple[Any, str, bool]:
    """Return the module that holds W as a parameter, the name of the parameter, and whether it is stored as Wᵀ."""
    layer: Any = pair.layer
    own = isinstance(layer, AdapterLayer)
    base = layer if own else layer.get_base_layer()
    if pair.kind == EXPERTS:
        return base, pair.part, layer.is_transposed if own else not layer._did_swap_in_out_features
    if pair.kind == ATTENTION:
        return (base.out_proj, "weight", False) if pair.part == "out_proj" else (base, "in_proj_weight", False)
    if pair.kind == EMBEDDING:
        return base, "weight", True
    turned = isinstance(layer, FusedLoRAConv1D) or bool(getattr(layer, "fan_in_fan_out", False))
    return base, (pair.part if not own and pair.part else "weight"), turned


def _beside(pair: Pair, weight: nn.Parameter, turned: bool) -> Update | str:
    """Return the update beside this process's part of `weight`, or why their shapes do not go together."""
    a, b = pair.as_a(torch.empty(pair.a.shape, device="meta")), pair.as_b(torch.empty(pair.b.shape, device="meta"))
    if a.shape[1] != b.shape[2] or b.shape[0] * b.shape[1] * a.shape[2] != weight.numel():
        return (
            f"A {tuple(pair.a.shape)} and B {tuple(pair.b.shape)} do not go with a weight {tuple(weight.shape)}: a "
            "process holds a part of it, as with FSDP1 or ZeRO-3 (use FSDP2), or A sees the channels of all groups of "
            "a convolution"
        )
    if reason := sharded.why_not_beside(weight):
        return reason
    w = sharded.local(weight)
    if pair.kind == CONV:
        w = w.permute(0, *_in_memory(weight))
        try:
            w = w.view(pair.groups, w.shape[0] // pair.groups, a.shape[2])
        except RuntimeError:
            return f"its weight {tuple(weight.shape)} has the strides {w.stride()}: make it contiguous first"
    return Update(pair, weight, turned, w if pair.kind == EXPERTS or pair.kind == CONV else w[None])


def _in_memory(weight: Tensor) -> list[int]:
    """Return the dimensions of the channels and the kernel of a convolution in the order in which they lie in memory,
    such as channels_last."""
    stride = sharded.local(weight).stride()
    return sorted(range(1, weight.ndim), key=lambda dim: stride[dim], reverse=True)
