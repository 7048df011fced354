"""The plans of the Triton kernels that ``verify --tune`` tries: a fixed list around the entries of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lora_kernels.plans import choose, quant_tiles, tiles
from lora_kernels.plans.tiles import Case, Gpu, Plan, Tile

REDUNDANT_ROWS = 64
"""No redundant forward is tried above this M, because every tile of y would repeat the work of h."""

CHANGES: dict[str, dict[str, tuple[int, ...]]] = {
    "redundant": {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (32, 64, 128, 256),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (4, 8),
    },
    "tickets": {
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "GROUP_M": (4, 8, 16),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (4, 8),
    },
    "backward": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "BLOCK_K": (64, 128, 256),
        "BLOCK_C": (64, 128),
        "BLOCK_T": (32, 64),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (4, 8),
    },
}
"""The values that are tried beside every entry of the tables, one field at a time. At 16 bits the row blocks of tickets
and backward have at least 64 rows, so that they share no line of L1."""


def describe(plan: Plan, case: Case) -> str:
    """Return a description in which any two plans for a case differ."""
    tile = plan.tile
    kind = "redundant" if plan.redundant else "backward" if tile.BLOCK_C else "tickets"
    words = ["w first:"] if case.w_format and not plan.within else []
    words += [kind, f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}", f"r{tile.block_r(case.R)}"]
    words += [f"c{tile.BLOCK_C} t{tile.BLOCK_T}"] if tile.BLOCK_C else []
    words += [f"group {tile.GROUP_M}", f"warps {tile.num_warps}", f"stages {tile.num_stages}"]
    words += ["tma"] if tile.tma else []
    words += [f"split {plan.split}"] if plan.split > 1 else []
    return " ".join(words)


def plans_to_try(op: str, case: Case, gpu: Gpu) -> dict[str, Plan]:
    """Return the plans to measure, by description; the tables' own choice first.

    A quantised w that is dequantised first gets one plan or two: the tables' plan for a dense w, and the plan that was
    measured for one.
    """
    by_table, dense = gpu._replace(device=None), case._replace(w_format="")
    tables = quant_tiles.TABLES if case.w_format else tiles.TABLES
    plans = {describe(plan, case): plan for plan in [choose.plan(op, case, by_table)]}
    if case.w_format:
        for first in (choose.plan(op, dense, by_table), choose.plan(op, dense, gpu)):
            plans.setdefault(describe(first, case), first)
    for name, entry in tables[tiles.resolve(gpu.arch) or gpu.arch, case.itemsize].items():
        kind = name.split("_")[0] if name.startswith(("tickets", "backward")) else "redundant"
        if (kind == "backward") != (op == "backward") or ("_dropout" in name and not case.dropout):
            continue
        if kind == "redundant" and (case.M > REDUNDANT_ROWS or case.R > entry.BLOCK_R):
            continue
        for tile in (entry, *_changed(entry, CHANGES[kind], case.M)):
            for split in _splits(kind, tile, case, gpu, more=tile is entry):
                plan = Plan(kind == "redundant", tile, split, within=bool(case.w_format))
                plans.setdefault(describe(plan, case), plan)
    return plans


def _changed(tile: Tile, changes: dict[str, tuple[int, ...]], M: int) -> Iterator[Tile]:
    """Yield the tile with one field changed at a time."""
    for field, values in changes.items():
        for value in values:
            # Rows of a tile beyond M are only padding.
            if field != "BLOCK_M" or value < max(2 * M, 32) or value < tile.BLOCK_M:
                changed: dict[str, Any] = {field: value}
                yield replace(tile, **changed)


def _splits(kind: str, tile: Tile, case: Case, gpu: Gpu, more: bool) -> list[int]:
    """Return the split that the tables' rule gives; with `more` also half of it, twice of it, and 1."""
    if kind == "tickets":
        return [1]
    rule = choose.split(tile, kind == "redundant", case, gpu)
    most = case.K // tile.BLOCK_K if kind == "redundant" else case.M // tile.BLOCK_M
    wanted = (rule, rule // 2, 2 * rule, 1) if more else (rule,)
    return [split for split in dict.fromkeys(wanted) if 1 <= split <= max(1, most)]
