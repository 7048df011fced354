"""A weight as the arguments of a registered operator or an autograd Function, which take tensors, numbers and strings,
but no `QuantizedWeight`: its codes stand in the place of a dense tensor, and its other parts in further arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.autograd import as_dtype
from lora_kernels.quant import weight as quant
from lora_kernels.quant.weight import QuantizedWeight


def whole_weight(
    w: Tensor, w_scales: Sequence[Tensor] | None, w_format: str, w_blocksize: int, dtype: torch.dtype
) -> Tensor | QuantizedWeight:
    """Return the weight that the arguments of an operator or a Function stand for, in `dtype`."""
    if w_format == "dense":
        return as_dtype(w, dtype)
    return quant.assemble(w, w_scales or (), w_format, w_blocksize, dtype)


def weight_parts(w: Tensor | QuantizedWeight) -> tuple[Tensor] | tuple[Tensor, list[Tensor], str, int]:
    """Return the arguments that stand for a weight: the tensor itself, or codes, scales, format and blocksize."""
    return (w.codes, list(w.tensors[1:]), w.format, w.blocksize) if isinstance(w, QuantizedWeight) else (w,)


def each_weight(
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor] | None,
    w_format: Sequence[str] | None,
    w_blocksize: Sequence[int] | None,
    dtype: torch.dtype,
) -> list[Tensor | QuantizedWeight]:
    """Return the weights that the arguments of a group's operator or Function stand for, in `dtype`. Scales in uint8
    are quantised themselves, and the three tensors of `Nested` follow them; those of `Integers` follow its scales."""
    if w_format is None:
        return [as_dtype(w, dtype) for w in ws]
    scales, first = w_scales or (), 0
    whole: list[Tensor | QuantizedWeight] = []
    for w, format, blocksize in zip(ws, w_format, w_blocksize or (), strict=True):
        count = 0 if format == "dense" else quant.parts_in(format, scales[first])
        whole.append(whole_weight(w, scales[first : first + count], format, blocksize, dtype))
        first += count
    return whole


def each_weight_parts(
    ws: Sequence[Tensor | QuantizedWeight],
) -> tuple[list[Tensor], list[Tensor] | None, list[str] | None, list[int] | None]:
    """Return the arguments that stand for the weights of a group, as `each_weight` takes them. The last three are None
    where all weights are dense."""
    first: list[Tensor] = []
    scales: list[Tensor] = []
    formats: list[str] = []
    blocksizes: list[int] = []
    for w in ws:
        if isinstance(w, QuantizedWeight):
            first.append(w.codes)
            scales += w.tensors[1:]
            formats.append(w.format)
            blocksizes.append(w.blocksize)
        else:
            first.append(w)
            formats.append("dense")
            blocksizes.append(0)
    return (first, scales, formats, blocksizes) if scales else (first, None, None, None)
