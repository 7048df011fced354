"""What merging the fused layers of PEFT has done to a model as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.nn import merging as merged_weights
from lora_kernels.nn.merging import MergeReport
from lora_kernels.peft import dense_stand_in, merging
from lora_kernels.peft.kept import Kept, KeptBase
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.weight import quantize_like


def _kept(model: nn.Module) -> Iterator[tuple[str, Any, list[Kept]]]:
    """Yield the name, the layer and what it keeps, for each merged layer of `model`."""
    for name, layer in model.named_modules():
        if kept := getattr(layer, "_kept_base", None):
            yield name, layer, kept


def merged_bytes(model: nn.Module) -> int:
    """Return the bytes that `model` has in memory because fused layers of PEFT are merged at present: the weights that
    are kept for unmerging, or over quantised bases the dense weights beside the codes."""
    return _bytes_of(kept for _, _, kept in _kept(model))


def _bytes_of(kept: Iterable[Sequence[Kept]]) -> int:
    places = {id(place.before): place for each in kept for place in each}  # two layers may keep one weight
    return sum(place.extra_bytes() for place in places.values())


def told(layers: Iterable[Any]) -> str:
    """Return the line of a report about those of `layers` that are merged at present; "" where none is."""
    kept = [layer._kept_base for layer in layers if layer._kept_base]
    if not kept:
        return ""
    return f"  {len(kept)} merged at present: {_bytes_of(kept) / 2**20:.1f} MiB are in memory until unmerge_adapter()"


def unmerge_written(model: nn.Module, *, keep: bool) -> list[str]:
    """Unmerge every fused layer of PEFT in `model` whose merged weight was written to since it was merged, which
    ``unmerge_adapter()`` refuses, and return the names of these layers.

    Args:
        model: a PeftModel, or any module with such layers inside.
        keep: True makes what was written the base, without the adapters; the base of before the merge is given up.
            False throws away what was written, and puts the base of before the merge back.

    Raises ValueError, with nothing changed, for a quantised base with `keep`.
    """
    found = {name: layer for name, layer, kept in _kept(model) if any(place.is_written() for place in kept)}
    dense = [name for name, layer in found.items() if any(isinstance(place, KeptBase) for place in layer._kept_base)]
    if keep and dense:
        raise ValueError(
            f"the base of {dense[0] or 'the model'} is quantised, and what was written to its merged weight is dense: "
            "nothing was changed. Take keep=False, or merge_and_unload(), which quantises what is there"
        )
    for layer in found.values():
        merging.settle(layer, keep)
    return list(found)


def merge_losses(model: nn.Module) -> dict[str, MergeReport]:
    """Return what ``merge_and_unload()`` would lose in each fused layer of PEFT over a weight of bitsandbytes, by the
    name of the layer, for the adapters that are active or merged now. Nothing is changed.

    ``error`` is ‖Q - W'‖ / ‖W'‖, where Q is W' = W + s·B A in 4 or 8 bits, and ``update`` is ‖W' - W‖ / ‖W'‖: where
    the second is not well above the first, most of the update is lost. W' is in memory in fp32, a layer at a time.
    """
    losses: dict[str, MergeReport] = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "_kept_base"):
            continue
        base: Any = merging.base_of(layer)
        if type(base._parameters.get("weight")).__module__.partition(".")[0] != "bitsandbytes":
            continue
        fused: Any = layer
        names = [each for each in fused.merged_adapters or fused.active_adapters if each in fused.adapters_to_merge()]
        sums = fused.sums(names) if names and dense_stand_in.is_quantised(base) else None
        if not sums:
            continue
        before = from_bnb(base)
        merged = merging.dense_sum(layer, sums[0], torch.float32)
        after = quantize_like(merged.half() if before.format == "int8" else merged, before)
        wide = merged_weights.wide_dtype(merged.device)

        def update(rows: slice, merged: torch.Tensor = merged, before: Any = before, wide: Any = wide) -> torch.Tensor:
            return merged[rows].to(wide) - before.rows(rows.start, rows.stop, torch.float32).to(wide)

        losses[name] = merged_weights.report(merged, after, update)
    return losses


def refuse_merged(model: nn.Module) -> None:
    """Raise ValueError where a layer of `model` is merged and keeps its base: PEFT's layers would not know of it."""
    merged = [name or "the model" for name, _, _ in _kept(model)]
    if merged:
        raise ValueError(
            f"{len(merged)} layers are merged, such as {merged[0]}, and keep the base that PEFT's unmerge() would not "
            "put back: nothing was changed. Call unmerge_adapter() first, or merge_and_unload()"
        )
