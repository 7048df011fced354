"""`merge_adapters`: one adapter from a weighted sum of several."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.analysis import progress
from lora_kernels.analysis.rank_report import RankedLayer, RankReport
from lora_kernels.analysis.resize import size_of
from lora_kernels.analysis.stored import (
    StoredAdapter,
    StoredUpdate,
    exact_rules,
    rank_fields,
    read_stored,
    write_stored,
)
from lora_kernels.analysis.truncate import balanced, check_rank, distance, kept_rank, norm_of, spectra_of
from lora_kernels.models.adapter_files import Parts
from lora_kernels.models.targets import some

HOW = ("svd", "concat", "weights")
_RULES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
"""The fields of a config that choose layers."""

Piece = tuple[float, StoredUpdate]
"""An update of an adapter and the number it is multiplied with, the adapter's weight times s."""


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out_dir: str | os.PathLike[str],
    how: str = "svd",
    r: int | None = None,
    energy: float | None = None,
) -> RankReport:
    """Write the weighted sum of several adapters as one adapter, and return the rank and the error of each layer.

        ΔW = Σᵢ wᵢ sᵢ Bᵢ Aᵢ

    ``how="concat"`` puts the factors side by side: A = [A₁; A₂; ...], B = [w₁ s₁ B₁, w₂ s₂ B₂, ...]. The result is ΔW,
    up to the rounding of B, and its rank is the sum of the ranks. ``how="svd"`` is the nearest update of rank r to ΔW;
    neither ΔW nor its whole decomposition is made. ``how="weights"`` is what PEFT calls "linear": A = Σᵢ ±√|wᵢ sᵢ| Aᵢ
    and B = Σᵢ √|wᵢ sᵢ| Bᵢ, whose product has cross terms Bᵢ Aⱼ and is **not** ΔW. The report tells how far it is from
    ΔW, in general about as far as ΔW is long.

    The adapters may have different ranks, scales and layers; a layer that an adapter does not have counts as zero. The
    result has s = 1, that is, lora_alpha is the rank of the layer, and the widest dtype of the files.

    Args:
        adapters: directories in PEFT's format.
        weights: a number for each. Negative ones subtract.
        out_dir: the directory to write. Both files are replaced together or not at all.
        how: "svd", "concat" or "weights".
        r: the rank of each layer for "svd". None, without `energy`, is the largest that the layer has in one of the
            adapters (PEFT gives every layer the largest of all).
        energy: for "svd", keep the least rank with Σ_{i≤r} σᵢ² ≥ energy · Σ σᵢ² in each layer, and with `r` at most r.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: arguments that do not fit together; adapters whose layers have other sizes, or other ranks for
            "weights"; DoRA, or tensors beside A and B (modules_to_save, trained biases, ...), which have no such sum;
            and what `resize_adapter` raises for files.
        OSError: the files cannot be written. Nothing is changed after any error.
    """
    _check(adapters, weights, how, r, energy)
    stored = [read_stored(directory) for directory in adapters]
    _refuse(stored)
    names = list(dict.fromkeys(name for each in stored for name in each.layers))
    layers, parts = [], {}
    for name in progress.over(names, "merge"):
        having = [(w, each) for w, each in zip(weights, stored, strict=True) if name in each.layers]
        pieces = _pieces(name, having)
        largest = max(each.rank(name) for _, each in having)
        keep = (largest if r is None and energy is None else r, energy)
        layer, parts[name] = _merged(name, pieces, how, keep)
        layers.append(layer)
    ranks = {layer.name: layer.r for layer in layers}
    fields = _fields(stored, names) | rank_fields(ranks, {n: float(k) for n, k in ranks.items()}, stored[0].config)
    write_stored(out_dir, fields, parts)
    return RankReport(layers, _notes(stored, how), fields, parts)


def _check(adapters: Sequence[Any], weights: Sequence[float], how: str, r: int | None, energy: float | None) -> None:
    """Raise ValueError for arguments that do not fit together."""
    if isinstance(adapters, (str, os.PathLike)) or not adapters or len(adapters) != len(weights):
        raise ValueError(f"give a weight for each adapter, got adapters={adapters!r} and weights={weights!r}")
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"weights must be finite numbers, got {bad[0]!r}")
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(map(repr, HOW))}, got {how!r}")
    if (r, energy) != (None, None):
        if how != "svd":
            raise ValueError(f'r={r!r} and energy={energy!r} go with how="svd": the rank of how={how!r} is given')
        check_rank(r, energy)


def _refuse(stored: Sequence[StoredAdapter]) -> None:
    """Raise ValueError for adapters that have no sum."""
    for each in stored:
        if each.config.settings.use_dora:
            raise ValueError(
                f"{each.source} is of DoRA, whose weights are no sum of W and ΔW: merge it into its base, and "
                "extract_lora the result, to add it to others"
            )
        if each.others:
            raise ValueError(
                f"{each.source} has tensors beside A and B, which would be lost: {some(sorted(each.others))}"
            )
    parameters = {frozenset(each.config.rules.target_parameters or ()) for each in stored}
    if len(parameters) > 1:
        told = " and ".join(str(sorted(each)) for each in parameters)
        raise ValueError(
            f"the adapters have different target_parameters, {told}, by which PEFT names the tensors of experts"
        )


def _pieces(name: str, having: Sequence[tuple[float, StoredAdapter]]) -> list[list[Piece]]:
    """Return what is added up for each update of a layer. Raises ValueError where sizes differ."""
    first = having[0][1]
    for _, other in having[1:]:
        forms = [
            [(u.part, u.a.shape[0], u.a.shape[2], u.b.shape[1], u.tails) for u in each.layers[name]]
            for each in (first, other)
        ]
        if forms[0] != forms[1]:
            raise ValueError(
                f"{name} is {size_of(first.layers[name])} in {first.source} and {size_of(other.layers[name])} in "
                f"{other.source}, or of another kind: they are adapters of different bases"
            )
    return [
        [(w * each.layers[name][i].scale, each.layers[name][i]) for w, each in having]
        for i in range(len(first.layers[name]))
    ]


def _merged(
    name: str, pieces: Sequence[Sequence[Piece]], how: str, keep: tuple[int | None, float | None]
) -> tuple[RankedLayer, Parts]:
    """Return the sum of a layer's updates, and its parts in the file."""
    whole = [_side_by_side(each) for each in pieces]
    updates = [each[0][1] for each in pieces]
    dtypes = [torch.float32 if u.a.dtype.itemsize == 1 else u.a.dtype for each in pieces for _, u in each]
    dtype = dtypes[0]
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    try:
        if how == "concat":
            made = [(a.to(dtype), b.to(dtype)) for a, b in whole]
        elif how == "weights":
            made = [_summed(each, dtype) for each in pieces]
        else:
            found = [spectra_of(StoredUpdate("", "", a, b, 1.0), name) for a, b in whole]
            k = kept_rank([s for each in found for _, s, _ in each], *keep)
            made = [balanced(each, k, dtype) for each in found]
    except ValueError as error:
        raise ValueError(f"{name}: {error}; nothing was written".replace(f"{name}: {name}: ", f"{name}: ")) from None
    parts: Parts = {}
    for update, (a, b) in zip(updates, made, strict=True):
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{name}: A or B overflows {dtype}; nothing was written")
        parts |= update.parts(a, b)
    far = math.hypot(*(distance(*one, *other) for one, other in zip(whole, made, strict=True)))
    norm = math.hypot(*(norm_of(a, b) for a, b in whole))
    return RankedLayer(name, size_of(updates), whole[0][0].shape[1], made[0][0].shape[1], norm, far), parts


def _side_by_side(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Return A [E, Σ r, K] and B [E, N, Σ r] in fp64 whose product is the sum."""
    a = torch.cat([update.a.double() for _, update in pieces], dim=1)
    return a, torch.cat([c * update.b.double() for c, update in pieces], dim=2)


def _summed(pieces: Sequence[Piece], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weighted sums of the A and of the B. The sign of a weight goes to A."""
    ranks = sorted({update.a.shape[1] for _, update in pieces})
    if len(ranks) > 1:
        raise ValueError(f'its ranks are {ranks}, and how="weights" adds matrices of one rank: take "svd"')
    a = sum((math.copysign(math.sqrt(abs(c)), c) * u.a.double() for c, u in pieces), start=torch.zeros(()))
    b = sum((math.sqrt(abs(c)) * u.b.double() for c, u in pieces), start=torch.zeros(()))
    return a.to(dtype), b.to(dtype)


def _fields(stored: Sequence[StoredAdapter], names: list[str]) -> dict[str, Any]:
    """Return the fields of the sum's config, but for ranks and alphas."""
    first = stored[0].fields
    bases = {each.fields.get("base_model_name_or_path") for each in stored}
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": bases.pop() if len(bases) == 1 else None,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(each.fields.get("fan_in_fan_out") for each in stored),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        **_rules([each.fields for each in stored], names),
    }


def _rules(fields: Sequence[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """Return the fields that choose the layers: those of the adapters if they are the same, the union of their lists of
    names, or the whole names of the layers."""
    rules = [{key: each.get(key) or None for key in _RULES} for each in fields]
    same = [{k: sorted(v) if isinstance(v, list) else v for k, v in each.items()} for each in rules]
    if all(each == same[0] for each in same):
        return rules[0]
    lists = [each["target_modules"] for each in rules if isinstance(each["target_modules"], list)]
    if len(lists) == len(rules) and not any(each[key] for each in rules for key in _RULES[1:]):
        return {"target_modules": sorted({name for each in lists for name in each})}
    parameters: list[str] | None = rules[0]["target_parameters"]
    ends = [each.rpartition(".")[0] for each in parameters or ()]
    modules = [name for name in names if not any(f".{name}".endswith(f".{end}") for end in ends)]
    return exact_rules(modules) | {"target_parameters": parameters}


def _notes(stored: Sequence[StoredAdapter], how: str) -> tuple[str, ...]:
    notes = []
    if how == "weights":
        notes.append("the product of the summed A and B is not the sum of the updates: see the errors")
    bases = dict.fromkeys(str(each.fields.get("base_model_name_or_path")) for each in stored)
    if len(bases) > 1:
        notes.append(f"the adapters name different bases: {some(list(bases))}")
    return tuple(notes)
