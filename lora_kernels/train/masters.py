"""Copies of 16-bit base weights in fp32, which keep from restart to restart what rounding would lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_kernels.models.targets import some
from lora_kernels.train.base_weights import Update


def checked(master: Mapping[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return the copy [G, P, Q] of each weight that has 16 bits, from `master` or new.

    Raises ValueError for a copy of another shape or dtype, one that does not round to its weight, and copies of other
    layers alone.
    """
    updates = list(updates)
    if master and not any(update.name in master for update in updates):
        raise ValueError(
            f"master has copies of {some(sorted(master))}, and none of the restarted layers, such as "
            f"{updates[0].name}: it is of another model. Nothing was changed. Give the one of this model, or an empty "
            "dictionary"
        )
    kept = {}
    for update in updates:
        w, copy = update.w, master.get(update.name)
        if w.dtype in (torch.float32, torch.float64):
            continue
        if copy is None:
            kept[update.name] = w.to(torch.float32, copy=True)
            continue
        if copy.shape != w.shape or copy.dtype != torch.float32:
            raise ValueError(
                f"master[{update.name!r}] is {tuple(copy.shape)} in {copy.dtype}, and must be {tuple(w.shape)} in "
                "fp32, as the restart made it that filled it, on as many processes. Nothing was changed"
            )
        copy = copy.to(w.device)
        if not all(torch.equal(mine.to(w.dtype), its) for mine, its in zip(_rows(copy), _rows(w), strict=True)):
            raise ValueError(
                f"master[{update.name!r}] does not round to the weight of this layer, which was changed by something "
                "else than a restart, such as a checkpoint that was loaded. Nothing was changed. Load the master of "
                "that checkpoint too, or give an empty dictionary"
            )
        kept[update.name] = copy
    return kept


def _rows(w: Tensor) -> list[Tensor]:
    return [block for each in w.unbind() for block in each.split(512)]
