"""The variants of PEFT's LoRA linear that are a product B' A' in the place of B A, and how A' and B' are computed.

    MiCA      A' = A                      B' = B
    KaSA      A' = diag(e) A              B' = B
    BD-LoRA   A' or B' has the blocks of A or B on its diagonal, and zeros elsewhere

A' [R, K] and B' [N, R] are computed in every forward by differentiable torch operations on PEFT's own parameters, so
that autograd gives the gradients of these. Nothing of x's or W's size takes part. DeLoRA and AdaLoRA have layers of
their own in PEFT: `lora_kernels.peft.folded`.

MiCA: arXiv:2604.01694. KaSA: Wang et al., 2024, arXiv:2412.06071. BD-LoRA: block-diagonal LoRA, arXiv:2510.23346.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import variants
from torch import Tensor, nn

from lora_kernels.peft import known
from lora_kernels.peft.reading import weight_and_bias

_KASA_USES = (
    "F KasaLinearVariant _apply_deferred_truncation dtype linear lora_A lora_B lora_diag lora_dropout scaling to"
)
_USES = {
    "MiCALinearVariant": "lora_A lora_B lora_dropout scaling",
    "KasaLinearVariant": _KASA_USES,
    "BdLoraLinearVariant": "_cast_input_dtype dtype lora_A lora_B lora_dropout scaling weight",
}
"""What the forward of each variant uses."""
_BLOCKS_USE = "dim einsum nblocks out_features reshape shape torch view weight"


def _variant(name: str) -> type[Any] | None:
    return getattr(variants, name, None)


_MICA, _KASA = _variant("MiCALinearVariant"), _variant("KasaLinearVariant")
_BLOCKS = _variant("BlockDiagonalLinear")
UNKNOWN: dict[type[Any], str] = {
    kind: known.why_not(kind, uses) for name, uses in _USES.items() if (kind := _variant(name)) is not None
}
"""The variants of the installed PEFT that fold, and why each of them cannot be fused; "" where it can."""
if _BLOCKS is not None and (_kind := _variant("BdLoraLinearVariant")) is not None:
    UNKNOWN[_kind] = UNKNOWN[_kind] or known.why_not(_BLOCKS, _BLOCKS_USE)


def why_not(layer: Any, name: str) -> str | None:
    """Return why adapter `name`, whose variant is in `UNKNOWN`, cannot be fused; None where it can."""
    kind = type(layer.lora_variant[name])
    if reason := UNKNOWN[kind]:
        return reason
    if kind is _KASA and name in layer._lora_kasa_truncation_deferred:
        return f"adapter {name!r} is KaSA, whose first forward is yet to cut the smallest singular values off W"
    return None


def is_folded(layer: Any, name: str) -> bool:
    """Return whether A' or B' of adapter `name` is computed anew in every call."""
    kind = type(layer.lora_variant.get(name))
    return kind in UNKNOWN and kind is not _MICA


def matrix(module: Any) -> tuple[Any, Any] | None:
    """Return the matrix and the bias of a ``lora_A`` or ``lora_B``; None for a module that is neither an nn.Linear nor
    BD-LoRA's."""
    kind = type(module)
    if kind is nn.Linear:
        return weight_and_bias(module)
    if kind is not _BLOCKS:
        return None
    return torch.block_diag(*module.weight.chunk(module.nblocks)), None


def scaled(layer: Any, name: str, a: Tensor) -> Tensor:
    """Return A' of adapter `name` for an A [R, K]."""
    if type(layer.lora_variant[name]) is not _KASA:
        return a
    diagonal: Tensor = layer.lora_diag[name]
    return a * diagonal[:, None]
