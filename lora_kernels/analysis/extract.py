"""`extract_lora`: an adapter from the difference of two models."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.analysis import progress
from lora_kernels.analysis.rank_report import RankedLayer, RankReport
from lora_kernels.analysis.short_names import short_names
from lora_kernels.analysis.stored import rank_fields, write_stored
from lora_kernels.analysis.truncate import check_rank, kept_rank
from lora_kernels.analysis.weights import TRANSPOSED, Source, Weights, difference, relative_difference, weights_of
from lora_kernels.models.adapter_files import Parts
from lora_kernels.models.pairs import CONV, EMBEDDING
from lora_kernels.models.targets import Names, by_reason, matches, some
from lora_kernels.nn import low_rank

EXACT = 1024
"""The largest of the smaller sides of a matrix whose whole SVD is made."""
_NITER, _MORE = 6, 8
"""The iterations of the randomised SVD, and the columns that it finds beyond those that are kept."""


class Left(NamedTuple):
    """A tensor that differs between two models and is not in the adapter."""

    reason: str
    relative: float | None
    """‖tuned - base‖ / ‖base‖; None where the two cannot be subtracted."""


@dataclass(frozen=True)
class Extracted(RankReport):
    """The adapter that was extracted, and what it does not hold."""

    left: dict[str, Left] = field(default_factory=dict)
    """The tensors that differ between the two models and are not in the adapter. A base with the adapter lacks these
    changes."""
    unchanged: int = 0
    """The number of tensors that are equal in both models."""

    def to_json(self) -> dict[str, Any]:
        """Return what `RankReport.to_json` returns, with what the adapter does not hold."""
        return super().to_json() | {
            "left": {name: each._asdict() for name, each in self.left.items()},
            "unchanged": self.unchanged,
        }


def extract_lora(
    tuned: Source,
    base: Source,
    out_dir: str | os.PathLike[str] | None = None,
    r: int | None = None,
    energy: float | None = None,
    target_modules: Names | None = None,
    dtype: torch.dtype = torch.float32,
) -> Extracted:
    """Return the low-rank adapter that takes a model nearest to a fully fine-tuned one, and write it to `out_dir`.

        s·B A = SVD_r(W_tuned - W_base) of each layer

    Where the smaller side of W is at most 1024, the decomposition is exact, in fp64. Larger ones are decomposed by a
    randomised SVD with six iterations and eight further columns (Halko et al., 2011, arXiv:0909.4061), whose error is
    within 1 % of the best one, also where the singular values hardly decay. The error of each layer in the report is
    measured against the difference itself, after the rounding of A and B, in either case. s is 1, that is, lora_alpha
    is the rank of the layer.

    Tensors that differ and are no weights of linear layers or convolutions (norms, biases, embeddings, ...) cannot be
    in such an adapter, or were not asked for. They are named in the report's `left`, and a warning tells them.

    Args:
        tuned, base: two models, two directories of safetensors (with an index or without), or one of each. Files are
            read tensor by tensor, so that only one layer of both is in memory at a time. They do not tell classes of
            modules: convolutions need models, and two-dimensional weights count as linear unless they are called like
            embeddings.
        out_dir: the directory to write in PEFT's format. None writes nothing: the report says which rank is needed, and
            holds the adapter.
        r: the rank of each layer.
        energy: keep the least rank with Σ_{i≤r} σᵢ² ≥ energy · ‖W_tuned - W_base‖² in each layer, and with `r` at most
            r.
        target_modules: the layers to extract, by PEFT's rule: names or their ends, or a regular expression. None is all
            linear layers and convolutions that differ. Embeddings are extracted where they are named.
        dtype: the dtype of A and B.

    Raises:
        ValueError: neither r nor energy, or values that they cannot have; no layer differs; models with adapters, with
            quantised weights, or without values; the two have no names in common; values that are not finite.
        FileNotFoundError: a directory without safetensors.
        OSError: the files cannot be written. Nothing is written after any error.
    """
    check_rank(r, energy)
    new, old = weights_of(tuned), weights_of(base)
    found = _Difference(new, old, target_modules)
    layers, parts = [], {}
    for name in progress.over(found.names, "extract"):
        module = name.rpartition(".")[0]
        layer = _extracted(new, old, name, (r, energy), dtype)
        if layer is None:
            found.unchanged.append(name)
        else:
            ranked, parts[module] = layer
            layers.append(ranked)
    left = found.left()
    told = _told(left)
    if not layers:
        raise ValueError(
            f"no layer that an adapter could hold differs between {new.name} and {old.name}. {told}".strip()
        )
    fields = _fields(new, old, {layer.name: layer.r for layer in layers}, base)
    if out_dir is not None:
        write_stored(out_dir, fields, parts)
    if left:
        warnings.warn(told, stacklevel=2)
    return Extracted(layers, (told,) * bool(left), fields, parts, left, len(found.unchanged))


class _Difference:
    """The tensors of two models: which are to be extracted, and which cannot be."""

    def __init__(self, new: Weights, old: Weights, wanted: Names | None) -> None:
        self._new, self._old = new, old
        mine, theirs = new.shapes(), old.shapes()
        if not mine.keys() & theirs.keys():
            raise ValueError(
                f"{new.name} and {old.name} have no names in common: {some(list(mine), 2)} in the one, and "
                f"{some(list(theirs), 2)} in the other. Give two whole models, of which one was trained from the other"
            )
        rules = wanted if wanted is None or isinstance(wanted, str) else tuple(wanted)
        self.unchanged: list[str] = []
        self.names: list[str] = []
        self._reasons: dict[str, str] = dict.fromkeys(mine.keys() ^ theirs.keys(), "only in one of the models")
        for name in mine:
            if name in self._reasons:
                continue
            reason = self._why_not(name, rules, mine[name], theirs[name])
            if reason:
                self._reasons[name] = reason
            else:
                self.names.append(name)
        if rules is not None and not self.names:
            raise ValueError(f"target_modules match no weight of a linear layer or convolution of {new.name}")

    def _why_not(self, name: str, rules: Any, mine: tuple[int, ...], theirs: tuple[int, ...]) -> str:
        if mine != theirs:
            return f"of other shapes, {mine} and {theirs}"
        kind = _kind(self._new, self._old, name)
        if not kind:
            return "no weight of a linear layer or convolution"
        chosen = rules is not None and matches(rules, name.rpartition(".")[0])
        if rules is not None and not chosen:
            return "not in target_modules"
        return "an embedding: name it in target_modules" if kind == EMBEDDING and not chosen else ""

    def left(self) -> dict[str, Left]:
        """Return the tensors that differ and are left out."""
        left = {}
        for name, reason in sorted(self._reasons.items()):
            if reason.startswith(("only in", "of other")):
                left[name] = Left(reason, None)
                continue
            mine, theirs = self._new.tensor(name), self._old.tensor(name)
            if torch.equal(mine, theirs.to(mine.device, mine.dtype)):
                self.unchanged.append(name)
            else:
                subtracts = mine.is_floating_point() and theirs.is_floating_point()
                left[name] = Left(reason, relative_difference(mine, theirs) if subtracts else None)
        return left


def _told(left: Mapping[str, Left]) -> str:
    """Return the tensors that are left out as text, with the largest relative difference for each reason."""
    parts = []
    for reason, names in by_reason({name: each.reason for name, each in left.items()}).items():
        known = [far for name in names if (far := left[name].relative) is not None]
        size = f", changed by up to {max(known):.2g} of their norm" if known else ""
        parts.append(f"{some(names)} ({reason}{size})")
    return f"these tensors differ and are not in the adapter: {'; '.join(parts)}" if parts else ""


def _extracted(
    new: Weights, old: Weights, name: str, keep: tuple[int | None, float | None], dtype: torch.dtype
) -> tuple[RankedLayer, Parts] | None:
    """Return a layer of the adapter, or None where the two weights are equal."""
    mine, theirs = new.tensor(name), old.tensor(name)
    if not (mine.is_floating_point() and theirs.is_floating_point()):
        raise ValueError(f"{name} is {mine.dtype} and {theirs.dtype}, as quantised weights are: give dense models")
    kind = _kind(new, old, name)
    e = difference(mine, theirs)
    tail = tuple(e.shape[2:])
    e = e.flatten(1) if kind == CONV else e.T if kind in (TRANSPOSED, EMBEDDING) else e
    norm = low_rank.norm(e)
    if norm == 0:
        return None
    if not math.isfinite(norm):
        raise ValueError(f"{name}: the difference has values that are not finite; nothing was written")
    a, b = _factors(e, *keep, norm)
    a, b = low_rank.finite("A", a.to(dtype)), low_rank.finite("B", b.to(dtype))
    k, (N, K) = len(a), e.shape
    ranked = RankedLayer(
        name.rpartition(".")[0], f"{K} → {N}", min(N, K), k, norm, low_rank.norm(low_rank.minus(e, a, b, 1.0, e.dtype))
    )
    if kind == EMBEDDING:
        return ranked, {"lora_embedding_A": a, "lora_embedding_B": b}
    ones = (1,) * len(tail)
    return ranked, {"lora_A.weight": a.reshape(k, -1, *tail), "lora_B.weight": b.reshape(N, k, *ones)}


def _factors(e: Tensor, r: int | None, energy: float | None, norm: float) -> tuple[Tensor, Tensor]:
    """Return A [k, K] and B [N, k] of the SVD of E [N, K] at the rank that r and energy ask for."""
    most = min(e.shape)
    if most <= EXACT:
        a, b = low_rank.factors(e.double(), low_rank.Part(most, 1.0, None, torch.float64))
        k = kept_rank([a.square().sum(1)], r, energy)
        return a[:k], b[:, :k]
    tried = most if r is None else min(r, most)
    start = min(tried, 64) if energy is not None else tried
    while True:
        # Beyond a quarter of the side, the whole SVD takes no longer.
        exact = start + _MORE > most // 4
        if exact:
            a, b = low_rank.factors(e.double(), low_rank.Part(most, 1.0, None, torch.float64))
        else:
            a, b = low_rank.factors(e.float(), low_rank.Part(start + _MORE, 1.0, _NITER))
        s = a.double().square().sum(1).cpu()
        if exact:
            k = kept_rank([s], r, energy)
        else:
            kept = s.square().cumsum(0)[:start] / norm**2
            k = start if energy is None else int((kept < energy).sum()) + 1
        if exact or k <= start or start == tried:
            k = min(k, tried)
            return a[:k], b[:, :k]
        start = min(2 * start, tried)


def _kind(new: Weights, old: Weights, name: str) -> str:
    """Return what a tensor is the weight of, by a model where one of the two is one."""
    return (old if new.guesses else new).kind(name)


def _fields(new: Weights, old: Weights, ranks: dict[str, int], base: Any) -> dict[str, Any]:
    """Return the fields of LoraConfig for layers with these ranks and s = 1."""
    kinds = {_kind(new, old, f"{name}.weight") for name in ranks}
    where = getattr(base, "name_or_path", None) if isinstance(base, torch.nn.Module) else base
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": os.fspath(where) if where else None,
        "inference_mode": True,
        **rank_fields(ranks, {name: float(k) for name, k in ranks.items()}),
        "lora_dropout": 0.0,
        "target_modules": short_names(list(ranks), old.modules()),
        "bias": "none",
        "fan_in_fan_out": TRANSPOSED in kinds,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
