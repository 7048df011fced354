"""The merged weight, the first magnitude and the fitness for PEFT's files of a convolution with an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.nn import merging
from lora_kernels.ops.conv_dora import magnitude_of
from lora_kernels.ops.dora_norm import ratio


def merged_weight(layer: Any, safe: bool) -> Tensor:
    """Return W + s·B A, or with DoRA d ⊙ that, in W's shape and dtype, computed in fp64 and rounded once. Raises
    ValueError where `AdapterConv.merge` says so."""
    merging.refuse_computed(layer)
    merging.refuse_absent(layer)
    w, a, b, g = layer.weight.detach(), layer.lora_A, layer.lora_B, layer.groups
    if g > 1 and not layer.grouped:
        raise ValueError(
            f"A {tuple(a.shape)} sees all {layer.in_channels} channels, and W {tuple(w.shape)} those of one of {g} "
            "groups, so no weight of W's shape holds the adapter: nothing was changed. Keep the layer unmerged, or "
            "make it with grouped=True"
        )
    of_a, of_b, _ = layer._shapes()
    of_w = layer.out_channels, layer.in_channels // g, *layer.kernel_size
    merging.refuse_sharded(layer, {"weight": of_w, "lora_A": of_a, "lora_B": of_b})
    d = None
    if layer.use_dora:
        d = ratio(layer.lora_magnitude_vector.detach(), _norm(layer)).flatten().chunk(g)
    made = torch.empty_like(w)
    for i, (w_g, a_g, b_g) in enumerate(zip(w.chunk(g), a.chunk(g), b.chunk(g), strict=True)):
        rows = w_g.flatten(1).__getitem__
        factor = None if d is None else d[i]
        flat = merging.updated_weight(rows, a_g.flatten(1), b_g.flatten(1), float(layer.scaling), w.dtype, factor)
        made.chunk(g)[i].copy_(flat.view(w_g.shape))
    if safe:
        merging.refuse_nonfinite(made, layer.scaling)
    return made


def _norm(layer: Any) -> Tensor:
    """Return the magnitude with which d = 1."""
    a, b, m = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    return magnitude_of(layer.weight, a, b, float(layer.scaling), m, layer.groups)


@torch.no_grad()
def reset_magnitude(layer: Any) -> None:
    """Make m the norm of W + s·B A."""
    layer.lora_magnitude_vector.copy_(_norm(layer))


@torch.no_grad()
def is_new_magnitude(layer: Any, or_norm: bool) -> bool:
    """Return whether m is NaN, as it is after ``to_empty``, or with `or_norm` the norm."""
    m = layer.lora_magnitude_vector
    return bool(m.isnan().all()) or (or_norm and torch.equal(m, _norm(layer)))


def dropped_by_peft(conv: Any) -> str:
    """Return what of a base `conv` the forward of PEFT (0.19 to 0.21) leaves out of A's convolution: a dilation and a
    padding mode other than the usual ones, in words. It is "" where PEFT leaves nothing out."""
    dropped = []
    if any(d != 1 and k != 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        dropped.append(f"dilation={conv.dilation}")
    padding = conv.padding
    if isinstance(padding, str):
        padded = padding == "same" and any(k != 1 for k in conv.kernel_size)
    else:
        padded = any(padding)
    if conv.padding_mode != "zeros" and padded:
        dropped.append(f"padding_mode={conv.padding_mode!r}")
    return " and ".join(dropped)
