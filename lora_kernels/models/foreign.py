"""Adapters in the formats of other tools: put into a model as those of PEFT are, converted where a layer needs it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.adapter_files import Parts, StoredAdapters
from lora_kernels.models.adapter_values import apply_stored, fill_stored
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.selection import select
from lora_kernels.models.targets import Rules
from lora_kernels.nn.settings import LoRASettings


@dataclass(frozen=True)
class Foreign:
    """Adapters that were read from another format, with the parts of PEFT's."""

    stored: StoredAdapters
    ranks: Mapping[str, int]
    """r of each layer."""
    alphas: Mapping[str, float]
    """lora_alpha of each layer."""
    rslora: bool | None = False
    """Whether s is alpha/√r and not alpha/r; None leaves that of existing layers as it is, beside their lora_alpha."""
    dora: bool = False
    """Whether every adapter has a magnitude."""
    dropout: float = 0.0
    """lora_dropout of new layers."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """‖ΔW - s·B A‖ / ‖ΔW‖ of the layers whose update had to be factored anew."""


def put_foreign(model: nn.Module, foreign: Foreign, others: Sequence[tuple[nn.Parameter, Tensor]] = ()) -> ApplyReport:
    """Put the adapters into a plain model, which gets layers for them, or into the layers of a model that has them
    already, and write `others`. Returns and raises as `load_adapter`."""
    stored = foreign.stored
    if lora_layers(model):
        report = fill_stored(model, stored, dict(foreign.alphas), foreign.rslora, others)
        return replace(report, converted=dict(foreign.errors))
    exact = "|".join(map(re.escape, stored.layers))
    try:
        selection = select(model, LoRASettings(use_dora=foreign.dora, lora_dropout=foreign.dropout), Rules(exact))
    except ValueError as error:
        raise ValueError(f"{stored.source} is of another base, or of layers not supported here: {error}") from None
    targets = [
        replace(t, settings=replace(t.settings, r=foreign.ranks[t.name], lora_alpha=foreign.alphas[t.name]))
        for t in selection.targets
    ]
    report = apply_stored(model, replace(selection, targets=targets), stored, others)
    return replace(report, converted=dict(foreign.errors))


def is_convolution(module: Any) -> bool:
    """Return whether a module is a convolution, plain or with an adapter."""
    return hasattr(module, "kernel_size") and hasattr(module, "out_channels") and hasattr(module, "groups")


def fitted(a: Tensor, b: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    """Return A and B with the dimensions that `module` has: a linear layer may be a convolution of 1 × 1 in the model
    of the file, and the reverse."""
    dims = len(module.kernel_size) if is_convolution(module) else 0
    if dims == 0 and a.ndim > 2 and a.shape[2:].numel() == b.shape[2:].numel() == 1:
        return a.flatten(1), b.flatten(1)
    if dims and a.ndim == b.ndim == 2:
        return a.view(*a.shape, *(1,) * dims), b.view(*b.shape, *(1,) * dims)
    return a, b


def as_convolution(delta: Tensor, rank: int | None, dtype: torch.dtype) -> tuple[Parts, float]:
    """Return A [r, C, k...] and B [N, r, 1...] in `dtype` with B A nearest to `delta` [N, C, k...], which is in fp64,
    and the relative error ‖delta - B A‖ / ‖delta‖.

    They are the SVD of delta as a matrix [N, C·k...] (Eckart and Young, 1936), whose singular values are divided
    between both. A rank of None takes as many as delta has.
    """
    flat = delta.flatten(1)
    u, s, vt = torch.linalg.svd(flat, full_matrices=False)
    threshold = s.max().item() * max(flat.shape) * torch.finfo(torch.float64).eps if s.numel() else 0.0
    r = max(1, int((s > threshold).sum())) if rank is None else rank
    a, b = flat.new_zeros(r, flat.shape[1]), flat.new_zeros(flat.shape[0], r)
    n = min(r, s.numel())
    root = s[:n].sqrt()
    a[:n], b[:, :n] = root[:, None] * vt[:n], u[:, :n] * root
    norm = torch.linalg.vector_norm(s).item()
    error = torch.linalg.vector_norm(s[n:]).item() / norm if norm > 0 else 0.0
    ones = (1,) * (delta.ndim - 2)
    parts = {
        "lora_A.weight": a.view(r, *delta.shape[1:]).to(dtype),
        "lora_B.weight": b.view(-1, r, *ones).to(dtype),
    }
    return parts, error if math.isfinite(error) else math.nan
