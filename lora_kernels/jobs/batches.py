"""The batches of several jobs as one batch of the model, and its rows and outputs apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core.rows import Rows

PADDING: Mapping[Any, float] = {
    "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": -100,
    "decoder_input_ids": 0, "decoder_attention_mask": 0,
}  # fmt: skip
"""The fields of a batch that are padded at the end of their sequences, and the value that fills them. A caller adds
others."""


WHOLE = "the output"
"""What errors call all that a model returns."""


class Joined(NamedTuple):
    """The batches of several jobs as one."""

    batch: Any
    counts: tuple[int, ...]
    """The number of samples of each job."""
    lengths: dict[int, tuple[int, ...]]
    """For each length that sequences have here, the lengths that those of each job had."""


def join(names: Sequence[str], batches: Sequence[Any], padding: Mapping[Any, float], device: torch.device) -> Joined:
    """Return the batches of the jobs `names` one after another, on `device`, with sequences padded to the longest.

    Raises:
        TypeError: a batch holds something else than tensors.
        ValueError: the batches differ in their fields, dtypes or sizes, but for the length (dimension 1) of a field
            that `padding` names; sequences are padded without an attention_mask; a batch has no samples.
    """
    fields = [_fields(name, batch) for name, batch in zip(names, batches, strict=True)]
    first = fields[0]
    for name, each in zip(names, fields, strict=True):
        if each.keys() != first.keys():
            raise ValueError(
                f"the batches of all jobs must have the same fields: {names[0]!r} has {list(first)}, {name!r} has "
                f"{list(each)}"
            )
    counts = tuple(len(next(iter(each.values()))) for each in fields)
    lengths: dict[int, tuple[int, ...]] = {}
    whole = {}
    for key in first:
        parts = [each[key].to(device) for each in fields]
        whole[key] = torch.cat(_padded(key, names, parts, padding))
        if parts[0].dim() > 1:
            length, own = whole[key].shape[1], tuple(part.shape[1] for part in parts)
            if lengths.setdefault(length, own) != own:
                raise ValueError(
                    f"two fields of the batch are padded to the length {length} from different lengths, {own} and "
                    f"{lengths[length]}, and then a layer cannot tell whose rows are padding. Pad one of them to a "
                    "fixed length in each job's collate"
                )
    padded = [length for length, own in lengths.items() if set(own) != {length}]
    if padded and "input_ids" in first and "attention_mask" not in first:
        raise ValueError(
            f"sequences are padded to {padded[0]} tokens, and the batches have no attention_mask, without which the "
            "model takes padding for text. Give every batch one"
        )
    return Joined(_like(batches[0], whole), counts, lengths)


def _fields(name: str, batch: Any) -> dict[Any, Tensor]:
    """Return the tensors of a batch by key or place."""
    if isinstance(batch, Mapping):
        found = dict(batch)
    else:
        found = dict(enumerate((batch,) if isinstance(batch, Tensor) else batch))
    odd = [f"{key!r} (a {type(value).__name__})" for key, value in found.items() if not isinstance(value, Tensor)]
    if odd or not found:
        raise TypeError(
            f"job {name!r}: a batch must be a tensor, or a tuple or mapping of tensors, and has "
            f"{', '.join(odd) or 'nothing'}"
        )
    sizes = {key: tuple(value.shape) for key, value in found.items()}
    if not all(sizes.values()) or len({shape[0] for shape in sizes.values()}) > 1 or not next(iter(sizes.values()))[0]:
        raise ValueError(f"job {name!r}: every tensor of a batch must have one row for each sample, got {sizes}")
    return found


def _padded(key: Any, names: Sequence[str], parts: list[Tensor], padding: Mapping[Any, float]) -> list[Tensor]:
    """Return the tensors of one field with sequences of one length."""
    kinds = {(part.dtype, part.dim(), *part.shape[2:]) for part in parts}
    longest = max(part.shape[1] if part.dim() > 1 else 0 for part in parts)
    equal = len({part.shape[1:] for part in parts}) == 1
    if len(kinds) > 1 or not (equal or key in padding):
        told = ", ".join(f"{name!r} {tuple(p.shape)} {p.dtype}" for name, p in zip(names, parts, strict=True))
        raise ValueError(
            f"the field {key!r} of the batches does not fit together: {told}. Make its samples equally large in each "
            "job's collate, or name it in `padding` if the model leaves out what is filled in"
        )
    if equal:
        return parts
    return [F.pad(part, (*(0, 0) * (part.dim() - 2), 0, longest - part.shape[1]), value=padding[key]) for part in parts]


def _like(batch: Any, fields: dict[Any, Tensor]) -> Any:
    """Return `fields` in the form of `batch`."""
    if isinstance(batch, Tensor):
        return fields[0]
    return fields if isinstance(batch, Mapping) else tuple(fields.values())


def split(outputs: Any, counts: tuple[int, ...], what: str = WHOLE) -> list[Any]:
    """Return the part of each job of a tensor, or of a tuple, list, mapping or dataclass of tensors, with a row for
    each sample. Objects of other kinds inside them, such as None or a cache, go to every job.

    Raises ValueError for a tensor with another number of rows: a number for the whole batch, such as the auxiliary loss
    of a router, cannot be told apart. Raises TypeError for an output that is of another kind itself.
    """
    n = len(counts)
    if isinstance(outputs, Tensor):
        if not outputs.dim() or outputs.shape[0] != sum(counts):
            raise ValueError(
                f"{what} has shape {tuple(outputs.shape)}, and not a row for each of the {sum(counts)} samples: it "
                "mixes the jobs. Leave it out of what the model returns (labels and output_router_logits make models "
                "of transformers return losses of the whole batch), or pick the outputs in `call`"
            )
        return list(outputs.split(counts))
    if isinstance(outputs, Mapping):
        parts = {key: split(value, counts, f"{what}[{key!r}]") for key, value in outputs.items()}
        made = [{key: part[i] for key, part in parts.items()} for i in range(n)]
        return made if type(outputs) is dict else [type(outputs)(**each) for each in made]
    if isinstance(outputs, (tuple, list)):
        each = [split(value, counts, f"{what}[{place}]") for place, value in enumerate(outputs)]
        kind: Callable[..., Any] = getattr(type(outputs), "_make", type(outputs))
        return [kind(part[i] for part in each) for i in range(n)]
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        held = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
        return [dataclasses.replace(outputs, **each) for each in split(held, counts, what)]
    if what == WHOLE:
        raise TypeError(
            f"the model returned a {type(outputs).__name__}, of which the rows of a job cannot be taken: return "
            "tensors, or tuples, mappings or dataclasses of them, or pick the outputs in `call`"
        )
    return [outputs] * n


class RowsOf:
    """Which rows of a layer's x belong to which job, for a batch whose samples are sorted by job.

    With dropout, rows of padding belong to no job. So the place of a row among those of its job, and with it the mask
    of dropout, does not depend on how long the sequences of other jobs are.
    """

    def __init__(self, joined: Joined, dropout: bool) -> None:
        self._counts, self._lengths = joined.counts, joined.lengths
        self._samples = sum(joined.counts)
        self._is_padded = any(set(own) != {length} for length, own in joined.lengths.items())
        self._dropout = dropout
        self._made: dict[tuple[int, torch.device], Rows] = {}

    def __call__(self, x: Tensor) -> Rows:
        """Return the rows of x [B, ..., K], or of an x [B · T, K] in which the sequences follow each other. Raises
        ValueError for an x that does not have B samples."""
        B, M = self._samples, x.numel() // x.shape[-1]
        S = M // B
        flat = x.dim() == 2 and x.shape[0] != B
        if M != S * B or (flat and S not in self._lengths) or (x.dim() > 2 and x.shape[0] != B) or x.dim() < 2:
            raise ValueError(
                f"a layer with adapters got x {tuple(x.shape)}, which does not have a row for each of the {B} samples, "
                "so whose rows are whose is not known (experts that get a choice of the tokens, and models with the "
                "batch in another dimension, are such). Leave this layer out with exclude_modules"
            )
        if self._is_padded and self._dropout and S > 1 and S not in self._lengths:
            raise ValueError(
                f"a layer with adapters got x {tuple(x.shape)} beside sequences that are padded to "
                f"{list(self._lengths)}: which of its {S} rows are padding is not known, so dropout would depend on "
                "the lengths of other jobs. Pad to a fixed length in each job's collate, or leave the layer out"
            )
        kept = self._made.get((S, x.device))
        if kept is None:
            kept = self._made[S, x.device] = self._rows(S).to(x.device)
        return kept

    def _rows(self, S: int) -> Rows:
        """Return the rows where each sample has S of them."""
        lengths: list[int] = []
        which: list[int] = []
        whole = (S,) * len(self._counts)
        known = self._lengths.get(S, whole) if self._dropout else whole
        for i, (count, own) in enumerate(zip(self._counts, known, strict=True)):
            if own == S:
                lengths.append(count * S)
                which.append(i)
            else:
                lengths += [own, S - own] * count
                which += [i, -1] * count
        return Rows.by_length(lengths, which, len(self._counts))


def all_of_one(x: Tensor) -> Rows:
    """Return the rows of x [..., K] where all belong to one adapter."""
    return Rows.by_length([x.numel() // x.shape[-1]], [0])
