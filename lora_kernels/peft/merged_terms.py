"""What merging adds to W, for each way in which PEFT keeps A and B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.merged_sums import Term
from lora_kernels.peft import folds
from lora_kernels.peft.merging import Sum, as_vector, base_of

_PLAIN = ("Dora", "Velora", "MiCA", "Monteclora")
"""How the names of those variants of PEFT's LoRA begin whose update is s·B A, or with DoRA is made of it. MonteCLoRA
merges without its samples."""


def product(a: Tensor, b: Tensor, scale: float, turned: bool, magnitude: Tensor | None = None) -> Term:
    """Return the update scale·B A of a matrix, for A [r, K] and B [N, r]; with `turned` its transpose."""
    left, right = (a.t(), b.t()) if turned else (b, a)
    return Term(left[None], right[None], scale, magnitude, turned)


def of_lora(layer: Any, names: Sequence[str]) -> list[Sum]:
    """Return the updates of a linear layer's weight, and of its bias where an adapter has one of its own."""
    base, turned = base_of(layer), bool(getattr(layer, "fan_in_fan_out", False))
    terms = [product(*_factors(layer, name), scale_of(layer, name), turned, magnitude(layer, name)) for name in names]
    return [Sum(base, "weight", terms), *biases(layer, base, names)]


def biases(layer: Any, base: nn.Module, names: Sequence[str]) -> list[Sum]:
    """Return the update of the bias of `base`: an empty list where no adapter has a bias."""
    biased = {name: bias for name in names if (bias := getattr(layer.lora_B[name], "bias", None)) is not None}
    if not biased:
        return []
    if getattr(base, "bias", None) is None:
        raise RuntimeError(
            "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: nothing was changed. "
            "Give the base a bias of zeros first"
        )
    one = torch.ones(1, 1, 1)
    return [Sum(base, "bias", [Term(one, b[None, None], scale_of(layer, n)) for n, b in biased.items()], as_vector)]


def scale_of(layer: Any, name: str) -> float:
    """Return PEFT's scaling of adapter `name`, which may be a tensor."""
    return float(layer.scaling[name])


def magnitude(layer: Any, name: str) -> Tensor | None:
    """Return DoRA's m of adapter `name`; None for another adapter."""
    variant = layer.lora_variant.get(name)
    if variant is None or not _kind(variant).startswith("Dora"):
        return None
    m: Tensor = layer.lora_magnitude_vector[name].weight
    return m


def check_variant(layer: Any, name: str) -> None:
    """Raise NotImplementedError for an adapter whose update is no matrix that can be added to W."""
    variant = layer.lora_variant.get(name)
    if variant is None or _kind(variant).startswith(_PLAIN):
        return
    if _kind(variant).startswith("ALora"):
        raise NotImplementedError("aLoRA does not support merging.")  # in PEFT's words; nothing was changed here either
    raise NotImplementedError(
        f"adapter {name!r} is PEFT's {type(variant).__name__}, which cannot be merged: nothing was changed. Merge the "
        "other adapters by their names"
    )


def _kind(variant: Any) -> str:
    return type(variant).__name__.lstrip("_")


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A [r, K] and B [N, r] of adapter `name` of a linear layer; those in their place for a variant that folds
    into them, in fp32 at least."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    if type(layer.lora_variant.get(name)) not in folds.UNKNOWN:
        check_variant(layer, name)
        return down.weight, up.weight
    if name in getattr(layer, "_lora_kasa_truncation_deferred", ()):
        if layer.merged:
            raise ValueError(
                f"adapter {name!r} is KaSA, whose first use is yet to cut the smallest singular values off W: nothing "
                "was changed. Call unmerge() first, and merge all adapters together"
            )
        layer.lora_variant[name]._apply_deferred_truncation(layer, name)
    found = [folds.matrix(module) for module in (down, up)]
    assert found[0] is not None and found[1] is not None
    a, b = (part[0].to(torch.promote_types(part[0].dtype, torch.float32)) for part in found if part is not None)
    return folds.scaled(layer, name, a), b
