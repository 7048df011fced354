"""`adapter_dropout`: whole adapters dropped at random, for single samples or segments of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_kernels.core.rows import BASE, BASE_NAMES

Ids = TypeVar("Ids", Tensor, Sequence[int], Sequence[str | None])
"""What `lora_kernels.mixed` takes."""


def adapter_dropout(
    ids: Ids,
    p: float | Mapping[Any, float],
    *,
    segments: Tensor | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Ids:
    """Return `ids` with adapters dropped at random: what `lora_kernels.mixed` takes for one step of training.

    Where an adapter is dropped, the rows have the base alone, as those of a sample to which this modality is missing
    (Palaskar et al., "Multimodal Large Language Models with Fusion Low Rank Adaptation for Device Directed Speech
    Detection", 2024, arXiv:2406.09617). So the trained model does no harm where a modality is missing. Nothing is
    multiplied by 1 / (1 − p), because the adapter is either there as a whole or not at all.

        with lora_kernels.mixed(model, adapter_dropout(ids, 0.3)):
            loss = model(x)

    Args:
        ids: the adapters of a step: one name for each sample (None is the base alone), ids [B], one for each sample, or
            ids [B, S], one for each token (-1 is the base alone). What is -1 or None stays so.
        p: the probability, in [0, 1], with which an adapter is dropped; or one for each adapter, by its name or number.
            An adapter that is not among these is never dropped.
        segments: integers from 0 on, in the shape of ids: rows of one segment and one adapter are dropped together.
            Without it, the segments are the samples: all tokens of an adapter in a sample. Packed sequences (B = 1)
            need it.
        generator: of the CPU; None is torch's own, so that ``torch.manual_seed`` makes the draws reproducible. They are
            the same whatever device ids are on.

    Returns:
        What was given, of the same kind: a tensor of the same dtype on the same device, or a list.

    Raises:
        ValueError: for a p out of range; ids of another dimension, segments of another shape or below 0.
        TypeError: for a string, and for ids or segments that are no integers.
    """
    if isinstance(ids, str):
        raise TypeError(f"ids must be a list, got the name {ids!r}: write [{ids!r}]")
    if isinstance(ids, Tensor):
        return _dropped(ids, p, segments, generator)
    names: list[Any] = [each for each in dict.fromkeys(ids) if each not in BASE_NAMES]
    if all(isinstance(each, int) for each in ids):
        numbers = torch.tensor(list(ids), dtype=torch.int64, device="cpu")
        return _dropped(numbers, p, segments, generator).tolist()  # type: ignore[no-any-return]
    if not all(isinstance(each, str) for each in names):
        raise TypeError(f"adapter_dropout takes either names or ids, got both: {list(ids)}")
    table: dict[Any, int] = {name: i for i, name in enumerate(names)}
    rates = {table[name]: rate for name, rate in p.items() if name in table} if isinstance(p, Mapping) else p
    numbers = torch.tensor([table.get(each, BASE) for each in ids], device="cpu")
    kept = _dropped(numbers, rates, segments, generator).tolist()
    return [None if i == BASE else names[i] for i in kept]  # type: ignore[misc]


def _dropped(
    ids: Tensor,
    p: float | Mapping[Any, float],
    segments: Tensor | Sequence[int] | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return `ids` with -1 where an adapter is dropped."""
    if ids.dim() not in (1, 2):
        raise ValueError(f"ids must be [B] or [B, S], got shape {tuple(ids.shape)}")
    _refuse_no_integers("ids", ids)
    numbers = ids.to("cpu", torch.int64)
    if segments is None:
        of = torch.arange(ids.shape[0], device="cpu").view(-1, *[1] * (ids.dim() - 1)).expand(ids.shape)
    else:
        given = torch.as_tensor(segments, device="cpu")
        _refuse_no_integers("segments", given)
        if given.shape != ids.shape or (given.numel() and given.min() < 0):
            raise ValueError(
                f"segments must have the shape of ids, {tuple(ids.shape)}, and no value below 0; got "
                f"{tuple(given.shape)}, least {given.min().item() if given.numel() else None}"
            )
        of = given.long()
    n = int(numbers.max()) + 1 if numbers.numel() else 0
    rates = torch.full((n,), 0.0 if isinstance(p, Mapping) else _probability(p), device="cpu")
    for i, rate in p.items() if isinstance(p, Mapping) else ():
        if not isinstance(i, int):
            raise TypeError(f"p must have a probability for each number of ids, got one for {i!r}")
        if i < n:
            rates[i] = _probability(rate)
    if not n:
        return ids.clone()
    drawn = torch.rand(int(of.max()) + 1, n, generator=generator, device="cpu")  # [segments, adapters]
    dropped = (drawn < rates)[of, numbers.clamp_min(0)]
    return torch.where(dropped.to(ids.device), BASE, ids)


def _probability(p: float) -> float:
    if not isinstance(p, Real) or not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p!r}")
    return p


def _refuse_no_integers(name: str, t: Tensor) -> None:
    if t.numel() and (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {t.dtype}")
