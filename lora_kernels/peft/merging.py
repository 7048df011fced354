"""Merging of PEFT's layers that `fuse` has fused: the base is kept, so that `unmerge` puts it back bit for bit.

    merged = round(W + Σ over merged adapters of s·B A)      summed in fp32 and rounded once

PEFT adds s·B A to the stored weight and subtracts it again. Each of the two rounds, so a weight in 16 bits drifts, and
one in 4 or 8 bits is quantised anew each time. Here the base layer gets another Parameter while it is merged, and the
layer keeps the one that it had. A base with quantised weights is kept as a whole, and a `MergedLinear` stands in its
place. A further merge computes the sum of all adapters from the W that is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn import merging as sums_of_layers
from lora_kernels.nn import offload
from lora_kernels.nn.merged_sums import Term, sum_dtype, write_sums
from lora_kernels.ops.autograd import device_type, no_autocast
from lora_kernels.peft import dense_stand_in
from lora_kernels.peft.dense_stand_in import MergedLinear

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def as_matrix(w: Tensor) -> Tensor:
    """Return a weight [N, K] as the stack [1, N, K]."""
    return w[None]


class Sum(NamedTuple):
    """One parameter of a base layer, and what merging adds to it."""

    owner: nn.Module
    """The module that has the parameter. A quantised base is replaced as a whole."""
    name: str
    terms: Sequence[Term]
    stack: Callable[[Tensor], Tensor] = as_matrix
    """Returns the parameter as the stack [G, P, Q] of the terms, a view where the parameter is contiguous."""


def as_vector(w: Tensor) -> Tensor:
    """Return a bias [N] as the stack [1, 1, N]."""
    return w[None, None]


@dataclass
class Place:
    """What merging has replaced: a parameter, or a quantised base layer."""

    owner: nn.Module
    """The module in which it was."""
    name: str
    """Its name there."""
    before: nn.Parameter | nn.Module
    """What was there, and will be there again: the object itself."""
    stamps: tuple[int | None, ...]
    """The `stamp` of each merged tensor."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that are there while merged."""
        if not isinstance(self.before, nn.Module):
            return (self.owner._parameters.get(self.name),)
        now: Any = self.owner._modules.get(self.name)
        if not isinstance(now, MergedLinear):
            return (None,)
        return now.own_tensors()

    def is_written(self) -> bool:
        """Return whether the values there are not those that merging has put there."""
        now = self.tensors()
        return any(t is None or t.grad is not None for t in now) or self.stamps != tuple(map(stamp, now))

    def put_back(self) -> None:
        """Put back what was there."""
        now = self.tensors()[0]
        if isinstance(self.before, nn.Module):
            standing: Any = self.owner._modules[self.name]
            self.before.train(standing.training)
            if not standing.has_own_bias:
                self.before._parameters["bias"] = standing._parameters["bias"]
            self.owner._modules[self.name] = self.before
            return
        if now is not None and now.requires_grad != self.before.requires_grad:
            self.before.requires_grad_(now.requires_grad)
        self.owner.__dict__.pop(self.name, None)
        self.owner._parameters[self.name] = self.before

    def extra_bytes(self) -> int:
        """Return the bytes that are in memory because of the merge."""
        if isinstance(self.before, nn.Module):
            return sum(t.nbytes for t in self.tensors() if t is not None)
        return self.before.nbytes


def stamp(t: Tensor | None) -> int | None:
    """Return a number of the bits of t, which changes with practically every write; None for a tensor without values.

    It is the sum of the memory as integers of 64 bits. Version counters would not do: a write through ``.data`` leaves
    them as they are, and a load of equal values changes them.
    """
    if t is None or t.is_meta or type(t) not in (Tensor, nn.Parameter):
        return None
    flat = t.detach().contiguous().view(-1)
    offset, size = flat.storage_offset() * flat.element_size(), flat.nbytes
    for width, dtype in ((8, torch.int64), (4, torch.int32), (2, torch.int16)):
        if size % width == 0 and offset % width == 0 and flat.element_size() <= width:
            return int(flat.view(dtype).sum().item())
    return int(flat.view(torch.uint8).sum().item())


@torch.inference_mode(False)  # what is made in inference mode could not be moved or saved later
@torch.no_grad()
def merge(layer: Any, safe: bool, names: list[str] | None, dtype: torch.dtype | None = None) -> None:
    """Merge the adapters `names` of a fused layer, by default the active ones; those that are merged already stay so.

    `dtype` is that of the dense weight that stands for a quantised base, by default the one in which the base computes.

    Raises:
        ValueError: the merged weight would not be finite (`safe`); W has no values here, is parametrised, sharded, or
            of a dtype in which nothing can be added; the merged weight was written to since, or is PEFT's.
        NotImplementedError: an adapter whose update is no matrix.
        RuntimeError: an adapter with a bias, over a base that has none.
    In every case nothing is changed.
    """
    from peft.tuners.tuners_utils import check_adapters_to_merge  # it is there if the layer is

    wanted = check_adapters_to_merge(layer, names)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"the adapters to merge are {wanted}, of which one is named twice: name each of them once")
    wanted = [name for name in wanted if name in layer.adapters_to_merge()]
    if not wanted:
        return
    kept: list[Place] | None = layer._kept_base
    order = [*layer.merged_adapters, *wanted]
    sums = None if kept is None and _is_offloaded(layer) else layer.sums(order)
    if sums is None:
        layer.peft_class.merge(layer, safe, wanted)
        return
    if kept is None and layer.merged:
        raise ValueError(
            f"{', '.join(layer.merged_adapters)} of this {type(layer).__name__} were merged by PEFT before fuse(), and "
            "W is not known: nothing was changed. Call unmerge_adapter() first, and merge all adapters together"
        )
    for place in kept or ():
        _refuse_written(layer, place)
    before = {(id(place.owner), place.name): place.before for place in kept or ()}
    new: list[tuple[Place, nn.Parameter | MergedLinear]] = []
    standing: MergedLinear | None = None
    for each in sums:
        if standing is not None:  # the other parameter of a quantised base is its bias
            standing.take_bias(_dense(layer, each, {})[1])
            continue
        new.append(_quantised(layer, each, dtype) or _dense(layer, each, before))
        if isinstance(new[-1][1], MergedLinear):
            standing = new[-1][1]
    for place, merged in new:
        values = merged.own_tensors() if isinstance(merged, MergedLinear) else (merged,)
        if safe and not all(torch.isfinite(t).all() for t in values):
            raise ValueError(
                f"NaNs detected in the merged weights, or infinities: nothing was changed. One of the adapters "
                f"{', '.join(order)} seems to be broken: look at its lora_A and lora_B, and at its scaling"
            )
        place.stamps = tuple(map(stamp, values))
    for place, merged in new:
        if isinstance(merged, nn.Module):
            place.owner._modules[place.name] = merged
        else:
            place.owner._parameters[place.name] = merged
    layer._kept_base = [place for place, _ in new]
    layer.note_merged(order)


def _quantised(layer: Any, each: Sum, dtype: torch.dtype | None) -> tuple[Place, MergedLinear] | None:
    """Return the quantised base that is to be kept, and what takes its place; None for a parameter of another base."""
    if each.name != "weight" or not dense_stand_in.is_quantised(each.owner):
        return None
    read = dense_stand_in.read(each.owner)
    total = _total(layer, read.rows, read.shape, dtype or read.dtype, read.device, each)
    return Place(layer, "base_layer", each.owner, ()), MergedLinear(each.owner, total)


def _dense(layer: Any, each: Sum, before: dict[tuple[int, str], Any]) -> tuple[Place, nn.Parameter]:
    """Return the parameter that is to be kept, and the one that takes its place."""
    w: Any = before.get((id(each.owner), each.name))
    if w is None:
        _refuse_weight(layer, each.owner, each.name)
        w = each.owner._parameters[each.name]
    stack = each.stack(w)
    total = _total(layer, lambda g, block: stack[g, block], tuple(w.shape), w.dtype, w.device, each)
    if w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last):
        total = total.contiguous(memory_format=torch.channels_last)
    return Place(each.owner, each.name, w, ()), nn.Parameter(total, requires_grad=w.requires_grad)


def _total(
    layer: Any,
    rows: Callable[[int, slice], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    each: Sum,
) -> Tensor:
    made = torch.empty(shape, dtype=dtype, device=device)
    out = each.stack(made)
    for term in each.terms:
        G, P, Q = out.shape
        if term.left.shape[:2] != (G, P) or term.right.shape[::2] != (G, Q):
            raise ValueError(
                f"{each.name} of this {type(layer).__name__} has the shape {tuple(shape)}, and its adapter is for "
                f"{(G, term.left.shape[1], term.right.shape[2])}: nothing was changed. If this process holds a part of "
                "the weights, as with FSDP1 or ZeRO-3, gather them first"
            )
    wide = sum_dtype(made, *(t for term in each.terms for t in (term.left, term.right)))
    with no_autocast(device_type(made)):
        write_sums(out, rows, each.terms, wide)
    return made


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """Put the base of a merged layer back, bit for bit. Raises ValueError, and changes nothing, where the merged weight
    was written to since it was merged."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    if layer._kept_base is None:  # PEFT has merged it, before fuse() or while it was offloaded
        layer.peft_class.unmerge(layer)
        return
    for place in layer._kept_base:
        _refuse_written(layer, place)
    _put_back(layer)


def _put_back(layer: Any) -> None:
    for place in layer._kept_base:
        place.put_back()
    layer._kept_base = None
    layer.note_merged([])


def settle(layer: Any, keep: bool) -> None:
    """Unmerge a layer whose merged weight may have been written to: with `keep` what is there now becomes the base,
    else it is thrown away and the base is put back.

    Raises ValueError for a quantised base that is to be kept: its place would be taken by a dense layer.
    """
    if not keep:
        _put_back(layer)
        return
    if any(isinstance(place.before, nn.Module) for place in layer._kept_base):
        raise ValueError(
            f"the base of this {type(layer).__name__} is quantised, and what was written is dense: nothing was "
            "changed. Take keep=False, or merge_and_unload(), which quantises what is there"
        )
    layer._kept_base = None
    layer.note_merged([])


def released(layer: Any) -> nn.Module:
    """Return the base of `layer` for a model without adapters: with the merged weight if it is merged, quantised again
    if the base was quantised. Nothing is kept after it."""
    kept: list[Place] | None = layer._kept_base
    layer._kept_base = None
    for place in kept or ():
        if isinstance(place.before, nn.Module):
            standing = cast(MergedLinear, place.owner._modules[place.name])
            place.put_back()
            if not dense_stand_in.requantise(place.before, standing):
                names, layer.merged_adapters = layer.merged_adapters, []
                layer.peft_class.merge(layer, False, names)  # quantises in the way of its package
    base: nn.Module = layer.get_base_layer()
    return base


def apply(layer: Any, whole: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    """Move or convert a merged layer with ``whole(fn, recurse)``, and what is kept of it with `fn` too."""
    kept: list[Place] = layer._kept_base
    written = [place.is_written() for place in kept]
    whole(fn, recurse)
    for place, changed in zip(kept, written, strict=True):
        if isinstance(place.before, nn.Module):
            place.before._apply(fn)
        else:
            holder = nn.Module()  # torch's own rules say whether the Parameter stays the same object
            holder.register_parameter("weight", place.before)
            place.before = cast(nn.Parameter, holder._apply(fn)._parameters["weight"])
        if not changed:
            place.stamps = tuple(map(stamp, place.tensors()))
    return layer


def base_of(layer: Any) -> Any:
    """Return the base layer of `layer`, also while a `MergedLinear` stands in its place."""
    for place in layer.__dict__.get("_kept_base") or ():
        if isinstance(place.before, nn.Module):
            return place.before
    return layer.get_base_layer()


def _is_offloaded(layer: Any) -> bool:
    return offload.hook_of(layer.get_base_layer()) is not None


def _refuse_weight(layer: Any, owner: nn.Module, name: str) -> None:
    """Raise ValueError where nothing can be added to a parameter of a base layer."""
    what = f"the {name} of the base of this {type(layer).__name__}"
    w = owner._parameters.get(name)
    if w is None:
        raise ValueError(
            f"{what} is parametrised or pruned, so that merging cannot replace it: nothing was changed. Make it plain "
            "first, with torch.nn.utils.parametrize.remove_parametrizations or prune.remove"
        )
    if w.is_meta:
        sums_of_layers.refuse_absent(owner)
    if type(w) not in (nn.Parameter, Tensor):
        raise ValueError(
            f"{what} is a {type(w).__name__}, to which s·B·A cannot be added here: nothing was changed. "
            "lora_kernels.unfuse(model) gives PEFT's own merge"
        )
    if w.dtype not in _FLOATS:
        raise ValueError(
            f"{what} is stored in {w.dtype}, in which W + s·B·A would lose the update: nothing was changed. Store it "
            "in bf16 first (without layerwise casting, or with model.to(torch.bfloat16))"
        )


def _refuse_written(layer: Any, place: Place) -> None:
    if not place.is_written():
        return
    names = ", ".join(layer.merged_adapters)
    got = "" if all(t is None or t.grad is None for t in place.tensors()) else ", or trained,"
    raise ValueError(
        f"{place.name} of this {type(layer).__name__} was written to{got} while {names} were merged into it, by "
        "load_state_dict, an optimiser, a conversion or other code: unmerging would throw that away, so nothing was "
        "changed. lora_kernels.unmerge_written(model, keep=False) puts the base of before the merge back, and with "
        "keep=True what is there now becomes the base"
    )


def merged_bytes(model: nn.Module) -> int:
    """Return the bytes that `model` has in memory because fused layers of PEFT are merged at present: the weights that
    are kept for unmerging, or over quantised bases the dense weights beside the codes."""
    places = {
        id(place.before): place
        for layer in model.modules()
        for place in getattr(layer, "_kept_base", None) or ()
        if isinstance(place, Place)
    }
    return sum(place.extra_bytes() for place in places.values())


def unmerge_written(model: nn.Module, *, keep: bool) -> list[str]:
    """Unmerge every fused layer of PEFT in `model` whose merged weight was written to since it was merged, which
    ``unmerge_adapter()`` refuses, and return the names of these layers.

    Args:
        model: a PeftModel, or any module with such layers inside.
        keep: True makes what was written the base, without the adapters; the base of before the merge is given up.
            False throws away what was written, and puts the base of before the merge back.

    Raises ValueError, with nothing changed, for a quantised base with `keep`.
    """
    found: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if getattr(layer, "_kept_base", None) and any(place.is_written() for place in cast(Any, layer)._kept_base)
    }
    if keep:
        for layer in found.values():
            if any(isinstance(place.before, nn.Module) for place in layer._kept_base):
                settle(layer, keep)
    for layer in found.values():
        settle(layer, keep)
    return list(found)


def refuse_merged(model: nn.Module) -> None:
    """Raise ValueError where a layer of `model` is merged and keeps its base: PEFT's layers would not know of it."""
    merged = [name or "the model" for name, layer in model.named_modules() if getattr(layer, "_kept_base", None)]
    if merged:
        raise ValueError(
            f"{len(merged)} layers are merged, such as {merged[0]}, and keep the base that PEFT's unmerge() would not "
            "put back: nothing was changed. Call unmerge_adapter() first, or merge_and_unload()"
        )
