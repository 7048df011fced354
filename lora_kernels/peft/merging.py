"""Merging of PEFT's layers that `fuse` has fused: the base is kept, so that `unmerge` puts it back bit for bit.

    merged = round(W + Σ over merged adapters of s·B A)      summed in fp32 and rounded once

PEFT adds s·B A to the stored weight and subtracts it again. Each of the two rounds, so a weight in 16 bits drifts, and
one in 4 or 8 bits is quantised anew each time. Here the base layer gets another Parameter while it is merged, and the
layer keeps the one that it had. A base with quantised weights is kept as a whole, and a `MergedLinear` stands in its
place. A further merge computes the sum of all adapters from the W that is kept.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.nn import merging as sums_of_layers
from lora_kernels.nn import offload
from lora_kernels.nn.merged_sums import Term, sum_dtype, write_sums
from lora_kernels.ops.autograd import device_type, no_autocast
from lora_kernels.peft import dense_stand_in
from lora_kernels.peft.dense_stand_in import MergedLinear
from lora_kernels.peft.kept import Kept, KeptBase, KeptParameter, KeptShard

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ONE_AT_A_TIME = threading.RLock()
"""Held while a layer is merged or unmerged. PEFT's forward of disabled adapters unmerges, in as many threads as run it.
Without it the second thread would take the merged weight for W, or put W back twice."""


def _one_at_a_time(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> None:
        with _ONE_AT_A_TIME:
            function(*args, **kwargs)

    return alone


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


@torch.inference_mode(False)  # what is made in inference mode could not be moved or saved later
@torch.no_grad()
@_one_at_a_time
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
    kept: list[Kept] | None = layer._kept_base
    order = [*layer.merged_adapters, *wanted]
    offloaded = kept is None and offload.hook_of(layer.get_base_layer()) is not None
    if offloaded:
        warnings.warn(
            "a layer that accelerate has offloaded is merged in PEFT's way, which rounds W when it is merged and again "
            "when it is unmerged: accelerate.hooks.remove_hook_from_module(model, recurse=True) first keeps its bits",
            stacklevel=4,
        )
    sums = None if offloaded or _is_around_another(layer) else layer.sums(order)
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
    if any(_is_sharded(each) for each in sums):
        _merge_shards(layer, safe, order, [KeptShard(each.owner, each.name) for each in sums])
        return
    before = {(id(place.owner), place.name): place.before for place in kept or ()}
    new: list[tuple[Kept, nn.Parameter | MergedLinear]] = []
    standing: MergedLinear | None = None
    for each in sums:
        if standing is not None:  # the other parameter of a quantised base is its bias
            standing.take_bias(_dense(layer, each, {})[1])
            continue
        new.append(_quantised(layer, each, dtype) or _dense(layer, each, before))
        if isinstance(new[-1][1], MergedLinear):
            standing = new[-1][1]
    for _, merged in new:
        values = merged.own_tensors() if isinstance(merged, MergedLinear) else (merged,)
        if safe and not all(torch.isfinite(t).all() for t in values):
            raise ValueError(
                f"NaNs detected in the merged weights, or infinities: nothing was changed. One of the adapters "
                f"{', '.join(order)} seems to be broken: look at its lora_A and lora_B, and at its scaling"
            )
    for place, merged in new:
        if isinstance(merged, nn.Module):
            place.owner._modules[place.name] = merged
        else:
            place.owner._parameters[place.name] = merged
    layer._kept_base = [place for place, _ in new]
    layer.note_merged(order)
    try:
        for place, _ in new:
            place.seal()
    except BaseException:  # such as too little memory
        _put_back(layer)
        raise


def _is_around_another(layer: Any) -> bool:
    """Return whether the base of `layer` is a layer of another method of PEFT, which merges into the same weight."""
    inner = layer._modules["base_layer"]
    return "base_layer" in inner._modules and not issubclass(type(inner), layer.peft_class)


def _is_sharded(each: Sum) -> bool:
    return hasattr(each.owner._parameters.get(each.name), "placements")


def _merge_shards(layer: Any, safe: bool, names: list[str], places: list[KeptShard]) -> None:
    """Merge into DTensors as PEFT does, and keep this process's parts. Every process makes this call."""
    for place in layer._kept_base or ():
        place.put_back()
    places = layer._kept_base or places
    layer.note_merged([])
    try:
        layer.peft_class.merge(layer, safe, names)
    except BaseException:
        for place in places:
            place.put_back()
        layer._kept_base = None
        layer.note_merged([])
        raise
    for place in places:
        place.seal()
    layer._kept_base = places


def _quantised(layer: Any, each: Sum, dtype: torch.dtype | None) -> tuple[Kept, MergedLinear] | None:
    """Return the quantised base that is to be kept, and what takes its place; None for a parameter of another base."""
    if each.name != "weight" or not dense_stand_in.is_quantised(each.owner):
        return None
    total = dense_sum(layer, each, dtype)
    return KeptBase(layer, "base_layer", each.owner), MergedLinear(each.owner, total)


@torch.no_grad()
def dense_sum(layer: Any, each: Sum, dtype: torch.dtype | None = None) -> Tensor:
    """Return the merged weight of a quantised base, by default in the dtype in which the base computes."""
    read = dense_stand_in.read(each.owner)
    return _total(layer, read.rows, read.shape, dtype or read.dtype, read.device, each)


def _dense(layer: Any, each: Sum, before: dict[tuple[int, str], Any]) -> tuple[Kept, nn.Parameter]:
    """Return the parameter that is to be kept, and the one that takes its place."""
    w: Any = before.get((id(each.owner), each.name))
    if w is None:
        _refuse_weight(layer, each.owner, each.name)
        w = each.owner._parameters[each.name]
    stack = each.stack(w)
    total = _total(layer, lambda g, block: stack[g, block], tuple(w.shape), w.dtype, w.device, each)
    if w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last):
        total = total.contiguous(memory_format=torch.channels_last)
    return KeptParameter(each.owner, each.name, w), nn.Parameter(total, requires_grad=w.requires_grad)


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
        wanted = (*term.left.shape[:2], term.right.shape[2])
        if out.shape != wanted:
            raise ValueError(
                f"{each.name} of this {type(layer).__name__} has the shape {tuple(shape)}, and its adapter is for "
                f"{wanted}: nothing was changed. If this process holds a part of "
                "the weights, as with FSDP1 or ZeRO-3, gather them first"
            )
    wide = sum_dtype(made, *(t for term in each.terms for t in (term.left, term.right)))
    with no_autocast(device_type(made)):
        write_sums(out, rows, each.terms, wide)
    return made


@torch.no_grad()
@_one_at_a_time
def unmerge(layer: Any) -> None:
    """Put the base of a merged layer back, bit for bit. Raises ValueError, and changes nothing, where the merged weight
    was written to since it was merged."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=4)
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
    """Unmerge a layer whose merged weight may have been written to. With `keep` what is there now becomes the base,
    which must not be quantised; else it is thrown away and the base is put back."""
    if not keep:
        _put_back(layer)
        return
    layer._kept_base = None
    layer.note_merged([])


def released(layer: Any) -> nn.Module:
    """Return the base of `layer` for a model without adapters: with the merged weight if it is merged, quantised again
    if the base was quantised. Nothing is kept after it."""
    kept: list[Kept] | None = layer._kept_base
    layer._kept_base = None
    for place in kept or ():
        if isinstance(place, KeptBase) and (standing := place.standing) is not None:
            place.put_back()
            if not dense_stand_in.requantise(place.before, standing):
                names, layer.merged_adapters = layer.merged_adapters, []
                layer.peft_class.merge(layer, False, names)  # quantises in the way of its package
    base: nn.Module = layer.get_base_layer()
    return base


def apply(layer: Any, whole: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    """Move or convert a merged layer with ``whole(fn, recurse)``, and what is kept of it with `fn` too."""
    kept: list[Kept] = layer._kept_base
    written = [place.is_written() for place in kept]
    whole(fn, recurse)
    for place, changed in zip(kept, written, strict=True):
        place.apply(fn)
        if not changed:
            place.seal()
    return layer


def base_of(layer: Any) -> Any:
    """Return the base layer of `layer`, also while a `MergedLinear` stands in its place."""
    for place in layer.__dict__.get("_kept_base") or ():
        if isinstance(place, KeptBase):
            return place.before
    return layer.get_base_layer()


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


def _refuse_written(layer: Any, place: Kept) -> None:
    if isinstance(place, KeptShard) and place.is_gathered():
        raise ValueError(
            f"FSDP2 has gathered the {place.name} of the base of this {type(layer).__name__}, as it does from a "
            "forward to its backward: nothing was changed. Call reshard() of the modules that fully_shard has returned "
            "first"
        )
    if not place.is_written():
        return
    names = ", ".join(layer.merged_adapters)
    got = ", or trained," if place.is_trained() else ""
    raise ValueError(
        f"{place.name} of this {type(layer).__name__} was written to{got} while {names} were merged into it, by "
        "load_state_dict, an optimiser, a conversion or other code: unmerging would throw that away, so nothing was "
        "changed. lora_kernels.unmerge_written(model, keep=False) puts the base of before the merge back, and with "
        "keep=True what is there now becomes the base"
    )
