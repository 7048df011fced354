"""DoRA's magnitude m of a fused layer: the norm that it starts as, and whether it still has its first value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.dora_norm import weight_norm
from lora_kernels.quant.weight import QuantizedWeight


def norm_of(layer: Any) -> Tensor:
    """Return ‖W + s·B A‖ of a `FusedLoRALinear`, dense or quantised: the magnitude with which d = 1. Under FSDP2 it is
    sharded as m is, and every process must make this call, which gathers W."""
    w: Any
    w, a, b, m = layer.frozen_weight(), layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    if not hasattr(m, "placements"):
        return weight_norm(w, a, b, float(layer.scaling), m)
    from torch.distributed.tensor import distribute_tensor  # heavy to import, and loaded already where m is sharded

    a, b = a.full_tensor(), b.full_tensor()
    if isinstance(w, QuantizedWeight):
        codes: Any = w.codes
        w = replace(w, codes=codes.full_tensor())
    else:
        w = w.full_tensor()
    norm = weight_norm(w, a, b, float(layer.scaling), m)
    return distribute_tensor(norm, m.device_mesh, m.placements)


def is_new(layer: Any, or_norm: bool) -> bool:
    """Return whether m is NaN, as it is after ``to_empty``, or with `or_norm` the norm."""
    m = layer.lora_magnitude_vector
    return bool(m.isnan().all()) or (or_norm and torch.equal(m, norm_of(layer)))
