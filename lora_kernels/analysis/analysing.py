"""`analyse`: what an adapter has learned, layer by layer."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from lora_kernels.analysis.bases import Base, base_of, missing_all
from lora_kernels.analysis.delta import DeltaSVD, delta_svd
from lora_kernels.analysis.directions import amplification_of, fitting, intruders_of
from lora_kernels.analysis.findings import Comparison, LayerReport
from lora_kernels.analysis.measures import effective_rank, energy_rank, stable_rank
from lora_kernels.analysis.progress import over
from lora_kernels.analysis.report import Report
from lora_kernels.analysis.subspaces import random_similarity, similarity_of
from lora_kernels.analysis.updates import Source, Update, updates_of
from lora_kernels.models.targets import some


@torch.no_grad()
def analyse(
    adapter: Source,
    other: Source | None = None,
    base: nn.Module | str | os.PathLike[str] | Literal[False] | None = None,
    *,
    adapter_name: str | None = None,
    other_name: str | None = None,
    lora_alpha: float | None = None,
    top: bool = True,
    intruders: bool = False,
    seed: int = 0,
) -> Report:
    """Return what an adapter has learned: for each layer the singular values of ΔW = s·B A and what follows from them;
    with W, how large ΔW is beside W and what it does to the directions of W; with another adapter, how far the two have
    found the same directions.

    ΔW is never made: its singular values come from A and B in fp64. W is read one layer at a time. A bar shows progress
    on a terminal.

    Args:
        adapter: a model with adapters, this package's or PEFT's; a directory that PEFT or `save_adapter` has written; a
            safetensors file or a state dict with loralib's or PEFT's keys.
        other: an adapter to compare with, in any of these forms, of any rank.
        base: where W is read: a model; a directory or file of safetensors, also sharded, or quantised by bitsandbytes;
            or the name of a model of the Hub that is in its local cache. None takes the base of `adapter` where that is
            a model, and otherwise leaves W out, as False does always.
        adapter_name, other_name: which of several adapters of a model of PEFT.
        lora_alpha: α of files that have no config: s = α / r.
        top: whether to find W's own leading directions, for the reference of the amplification factor and φ of W and
            ΔW. Without it W is read faster.
        intruders: whether to count intruder dimensions. For each layer it solves two eigenvalue problems of min(N, K)
            in fp64, which take ten seconds and more each for 4096.
        seed: the seed of the search for W's leading directions.

    Returns a `Report`: ``report.layers``, ``print(report)``, ``report.to_json()``, ``report.plot(directory)``.

    Raises:
        FileNotFoundError: a file or directory that is not there.
        ValueError: damaged files or such of other methods than LoRA; a model without adapters, or with several and no
            name; values that are NaN or infinite; two adapters without a layer in common; a base that has the weight of
            no layer. A base that lacks some is no error: the report names them.
        KeyError: no adapter has this name.
    """
    own = updates_of(adapter, adapter_name, lora_alpha)
    theirs = None if other is None else updates_of(other, other_name, lora_alpha)
    if theirs is not None and not set(own.names) & set(theirs.names):
        raise ValueError(
            f"{own.source} and {theirs.source} have no layer in common: {some(list(own.names), 2)} beside "
            f"{some(list(theirs.names), 2)}"
        )
    weights = None
    if base is not False and (base is not None or isinstance(adapter, nn.Module)):
        weights = base_of(base, own)
    layers, without, without_values = [], {}, []
    for update in over(own.updates, "Analysing"):
        try:
            svd = delta_svd(update.a, update.b, update.scale)
            layer = _layer(update, svd)
            if theirs is not None and update.name in theirs.names:
                layer = replace(layer, comparison=_compare(svd, theirs.names[update.name]))
            found = None if weights is None else _with_weight(layer, update, svd, weights, top, intruders, seed)
        except ValueError as error:
            raise ValueError(f"{own.source}: {update.name}: {error}") from None
        if isinstance(found, str):
            without[update.name] = found
        layers.append(found if isinstance(found, LayerReport) else layer)
        if svd.rank == 0:
            without_values.append(update.name)
    if base is not None and weights is not None and len(without) == len(layers):
        raise ValueError(missing_all(weights, without))
    notes = list(dict.fromkeys((*own.notes, *(theirs.notes if theirs else ()))))
    if without_values:
        notes.append(f"ΔW is zero, as before training, in {some(without_values)}")
    if any(layer.dora for layer in layers):
        notes.append("with DoRA, ΔW is the update s·B A of the direction, before the rows of W + ΔW are scaled to m")
    return Report(
        adapter=own.source,
        layers=tuple(layers),
        base=None if weights is None else weights.name,
        other=None if theirs is None else theirs.source,
        notes=tuple(notes),
        without_weight=tuple(without.items()),
        only_here=tuple(name for name in own.names if theirs and name not in theirs.names),
        only_there=tuple(name for name in theirs.names if name not in own.names) if theirs else (),
    )


def _layer(update: Update, svd: DeltaSVD) -> LayerReport:
    """Return what the singular values tell."""
    return LayerReport(
        name=update.name,
        kind=update.kind,
        shape=(update.b.shape[0], update.a.shape[1]),
        r=update.a.shape[0],
        rank=svd.rank,
        scale=float(update.scale),
        dora=update.dora,
        singular_values=tuple(svd.s.tolist()),
        norm=float(torch.linalg.vector_norm(svd.s)),
        effective_rank=effective_rank(svd.s),
        stable_rank=stable_rank(svd.s),
        energy_rank_90=energy_rank(svd.s, 0.9),
        energy_rank_99=energy_rank(svd.s, 0.99),
    )


def _with_weight(
    layer: LayerReport, update: Update, svd: DeltaSVD, base: Base, top: bool, intruders: bool, seed: int
) -> LayerReport | str:
    """Return the layer with what W tells, or why W cannot be looked at."""
    found = base.find(update)
    if isinstance(found, str):
        return found
    frozen = fitting(found.weight, update.a, update.b, found.transposed)
    leading = frozen.leading(max(1, svd.rank), seed) if top else None
    phi = None
    if leading is not None and svd.rank:
        phi = float(similarity_of((leading.v.cpu(), leading.rank), (svd.v.cpu(), svd.rank))[svd.rank - 1, svd.rank - 1])
    return replace(
        layer,
        weight_norm=frozen.norm,
        amplification=amplification_of(frozen, svd, leading),
        phi_weight=phi,
        intruders=intruders_of(frozen, update.a, update.b, update.scale) if intruders else None,
    )


def _compare(svd: DeltaSVD, other: Update) -> Comparison:
    """Return how two updates of one layer resemble each other."""
    second = delta_svd(other.a, other.b, other.scale)
    (u1, s1, v1), (u2, s2, v2) = (tuple(t.cpu() for t in each) for each in (svd, second))
    if (len(u1), len(v1)) != (len(u2), len(v2)):
        raise ValueError(
            f"the update is ({len(u1)}, {len(v1)}), and ({len(u2)}, {len(v2)}) in the other adapter, which is of "
            "another base"
        )
    phi = similarity_of((v1, svd.rank), (v2, second.rank))
    inner = float(((u1.T @ u2) * (v1.T @ v2) * s1[:, None] * s2).sum())
    norms = float(torch.linalg.vector_norm(s1) * torch.linalg.vector_norm(s2))
    both = svd.rank and second.rank
    return Comparison(
        phi=tuple(map(tuple, phi.tolist())),
        at_rank=float(phi[svd.rank - 1, second.rank - 1]) if both else float("nan"),
        mean=float(phi.nanmean()),
        mean_random=float(random_similarity(svd.rank, second.rank, len(v1)).mean()) if both else float("nan"),
        random=max(svd.rank, second.rank) / len(v1),
        cosine=inner / norms if both else float("nan"),
    )
