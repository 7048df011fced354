"""`resize_adapter`: an adapter of a lower rank from a trained one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from lora_kernels.analysis import progress
from lora_kernels.analysis.rank_report import RankedLayer, RankReport
from lora_kernels.analysis.stored import StoredAdapter, StoredUpdate, rank_fields, read_stored, write_stored
from lora_kernels.analysis.truncate import balanced, check_rank, distance, kept_rank, spectra_of
from lora_kernels.models.adapter_files import Parts


def resize_adapter(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    r: int | None = None,
    energy: float | None = None,
) -> RankReport:
    """Write the adapter in `source` with lower ranks to `out_dir`, and return the rank and the error of each layer.

        ΔW = s·B A = U diag(σ) Vᵀ    ΔW_r = U[:, :r] diag(σ[:r]) V[:, :r]ᵀ

    ΔW_r is the nearest matrix of rank r (Eckart and Young, 1936). ΔW is never made: the decomposition comes from QR of
    B and Aᵀ and an r×r matrix, in fp64. A = √(σ/s) Vᵀ and B = U √(σ/s) are rounded once to the dtype of the file. Each
    layer keeps its s: lora_alpha, rank_pattern and alpha_pattern are written so that α/r, or α/√r with rsLoRA, is what
    it was. PEFT and `lora_kernels.load_adapter` read the result.

    Linear layers, embeddings, convolutions, nn.MultiheadAttention and experts are served. The experts of a layer share
    a rank, and `energy` counts over all of them. The magnitudes of DoRA stay as they are, so that the rows of its
    weights keep their norms; the error is that of ΔW before the normalisation. Tensors beside A and B (modules_to_save,
    trained biases, ...) are copied.

    Args:
        source: the directory of an adapter in PEFT's format.
        out_dir: the directory to write. It may be `source` itself. Both files are replaced together or not at all.
        r: the rank of each layer. Layers of lower rank keep theirs.
        energy: keep the least rank with Σ_{i≤r} σᵢ² ≥ energy · Σ σᵢ² in each layer, and with `r` at most r.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: neither r nor energy, or values that they cannot have; damaged files; convolutions with groups; a
            head tied to an embedding; an initialisation that changed the base (its weights depend on the rank); NaN.
        OSError: the files cannot be written. Nothing is changed after any error.
    """
    check_rank(r, energy)
    stored = read_stored(source)
    layers, parts = [], {}
    for name in progress.over(list(stored.layers), "resize"):
        layer, parts[name] = _resized(name, stored.layers[name], r, energy)
        layers.append(layer)
    ranks = {layer.name: layer.r for layer in layers}
    alphas = {name: _alpha(stored, name, rank) for name, rank in ranks.items()}
    fields = stored.fields | rank_fields(ranks, alphas, stored.config) | {"init_lora_weights": True}
    write_stored(out_dir, fields, parts, stored.others)
    return RankReport(layers, _notes(stored), fields, parts)


def _resized(
    name: str, updates: Sequence[StoredUpdate], r: int | None, energy: float | None
) -> tuple[RankedLayer, Parts]:
    """Return what becomes of a layer, and its parts in the file."""
    found = [spectra_of(update, name) for update in updates]
    scales = [abs(update.scale) for update in updates]
    spectra = [s * scale for each, scale in zip(found, scales, strict=True) for _, s, _ in each]
    k = kept_rank(spectra, r, energy)
    parts: Parts = {}
    far = []
    for update, each in zip(updates, found, strict=True):
        try:
            a, b = balanced(each, k, update.a.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; nothing was written") from None
        parts |= update.parts(a, b)
        far.append(abs(update.scale) * distance(update.a, update.b, a, b))
    norm = math.hypot(*(torch.linalg.vector_norm(s).item() for s in spectra))
    return RankedLayer(name, size_of(updates), updates[0].a.shape[1], k, norm, math.hypot(*far)), parts


def size_of(updates: Sequence[StoredUpdate]) -> str:
    """Return the size of a layer's update as reports show it."""
    sizes = {f"{each.a.shape[2]} → {each.b.shape[1]}": None for each in updates}
    return f"{len(updates[0].a)} × " * updates[0].stacked + ", ".join(sizes)


def _alpha(stored: StoredAdapter, name: str, r: int) -> float:
    """Return the lora_alpha with which rank r has the s that the layer has now."""
    ratio = r / stored.rank(name)
    return stored.alpha(name) * (math.sqrt(ratio) if stored.config.settings.use_rslora else ratio)


def _notes(stored: StoredAdapter) -> tuple[str, ...]:
    notes = []
    if stored.config.settings.use_dora:
        notes.append("DoRA: the magnitudes are kept, and the errors are those of ΔW before the normalisation")
    if beside := [key for key in stored.others if not key.endswith("lora_magnitude_vector")]:
        notes.append(f"copied as they are: {len(beside)} tensors beside the adapter, such as {beside[0]}")
    return tuple(notes)
