"""What ``python -m lora_kernels tune`` tries: an explicit list around the tables' entries. Only that command asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from lora_kernels.plans import quant_tiles, tiles
from lora_kernels.plans.tiles import Case, Plan, Tile

REDUNDANT_ROWS = 1024
"""No redundant forward is tried above this M: its every tile would repeat the work of h."""

CHANGES: dict[str, dict[str, tuple[int, ...]]] = {
    "redundant": {
        "BLOCK_M": (16, 32, 64, 128),
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
"""What is tried beside every entry of the tables: these values, one field at a time. At 16 bits the row blocks of
tickets and backward take no less than 64 rows: they may share no line of L1."""


class Size(NamedTuple):
    """x [M,K], w [N,K], a [R,K], b [N,R]."""

    M: int
    K: int
    N: int
    R: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}:{self.R}"


def describe(plan: Plan, case: Case) -> str:
    """Everything that tells one plan for a case from another."""
    tile = plan.tile
    kind = "redundant" if plan.redundant else "backward" if tile.BLOCK_C else "tickets"
    words = ["w first:"] if case.w_format and not plan.within else []
    words += [kind, f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}", f"r{tile.block_r(case.R)}"]
    words += [f"c{tile.BLOCK_C} t{tile.BLOCK_T}"] if tile.BLOCK_C else []
    words += [f"group {tile.GROUP_M}", f"warps {tile.num_warps}", f"stages {tile.num_stages}"]
    words += ["tma"] if tile.tma else []
    words += [f"split {plan.split}"] if plan.split > 1 else []
    return " ".join(words)


def candidates(op: str, case: Case) -> dict[str, Plan]:
    """What to measure, by description; the tables' own choice first.

    For a quantised w that is dequantised first there is one candidate, or two: the tables' plan for a dense w, and what
    was measured for one.
    """
    by_table, dense = case._replace(device=None), case._replace(w_format="")
    module = quant_tiles if case.w_format else tiles
    plans = {describe(plan, case): plan for plan in [module.plan(op, by_table)]}
    if case.w_format:
        for first in (tiles.plan(op, dense._replace(device=None)), tiles.plan(op, dense)):
            plans.setdefault(describe(first, case), first)
    for name, entry in module.TABLES[tiles.resolve(case.arch) or case.arch, case.itemsize].items():
        kind = name.split("_")[0] if name.startswith(("tickets", "backward")) else "redundant"
        if (kind == "backward") != (op == "backward") or ("_dropout" in name and not case.dropout):
            continue
        if kind == "redundant" and (case.M > REDUNDANT_ROWS or case.R > entry.BLOCK_R):
            continue
        for tile in (entry, *_changed(entry, CHANGES[kind], case.M), *_described(entry, case)):
            for split in _splits(kind, tile, case, more=tile is entry):
                plan = Plan(kind == "redundant", tile, split, within=bool(case.w_format))
                plans.setdefault(describe(plan, case), plan)
    return plans


def _changed(tile: Tile, changes: dict[str, tuple[int, ...]], M: int) -> Iterator[Tile]:
    for field, values in changes.items():
        for value in values:
            # Beyond the rows that there are, more rows to a tile are only padding.
            if field != "BLOCK_M" or value < max(2 * M, 32) or value < tile.BLOCK_M:
                changed: dict[str, Any] = {field: value}
                yield replace(tile, **changed)


def _described(tile: Tile, case: Case) -> Iterator[Tile]:
    """Over a quantised w, whose tables have none, the same with x and dy through descriptors, where there are any."""
    dense = tiles.TABLES[tiles.resolve(case.arch) or case.arch, case.itemsize]
    if case.w_format and any(each.tma for each in dense.values()):
        yield replace(tile, tma=True)


def _splits(kind: str, tile: Tile, case: Case, more: bool) -> list[int]:
    """What the tables' rule gives; where `more` are wanted also half of it, twice, and one."""
    if kind == "tickets":
        return [1]
    rule = tiles.split(tile, kind == "redundant", case)
    most = case.K // tile.BLOCK_K if kind == "redundant" else case.M // tile.BLOCK_M
    wanted = (rule, rule // 2, 2 * rule, 1) if more else (rule,)
    return [split for split in dict.fromkeys(wanted) if 1 <= split <= max(1, most)]
