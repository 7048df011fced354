"""The choice of a plan: the one that ``python -m lora_kernels tune`` measured on this machine, if it was run, else one
from the built-in tables.

A choice is made once for each kind of call and then cached. `keep` and `forget` change the file of measured plans and
clear the caches of this process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from lora_kernels.plans import quant_tiles, sm90, store, tiles
from lora_kernels.plans.sm90 import Sm90Plan
from lora_kernels.plans.tiles import Case, Gpu, Plan, Tile


@functools.lru_cache(maxsize=4096)
def plan(op: str, case: Case, gpu: Gpu) -> Plan:
    """Return the plan of the Triton kernels for `op`, "forward" or "backward".

    A quantised w without `Plan.within` in its plan is dequantised first: it gets the plan of the same call with a
    dense w.
    """
    # Plans are measured with aligned operands only.
    if gpu.name is not None and case.aligned and (found := store.find(gpu.name, store.key(op, case), Plan)):
        return found
    if not case.w_format:
        return _dense(op, case, gpu)
    return _within(op, case, gpu) or plan(op, case._replace(w_format=""), gpu)


@functools.lru_cache(maxsize=4096)
def sm90_plan(op: str, case: Case, device: str) -> Sm90Plan:
    """Return the plan of the sm_90a kernels on `device`, named as its driver names it: the measured one, or
    `BY_RULE`."""
    return store.find(device, store.sm90_key(op, case), Sm90Plan) or sm90.BY_RULE


def _dense(op: str, case: Case, gpu: Gpu) -> Plan:
    """Return the tables' plan with a dense w."""
    M, few = case.M, case.M <= 512 and not case.dropout
    kind = "decode16" if M <= 16 else "decode64" if M <= 64 else "redundant" if few else "tickets"
    if op == "backward":
        kind = "backward"
    tile = tiles.find(kind, case, gpu.arch)
    redundant = tile is not None and kind not in ("tickets", "backward")
    if tile is None:
        tile = tiles.find("tickets", case, gpu.arch)
    assert tile is not None, "an entry for any rank ends every table"
    return Plan(redundant, tile, split(tile, redundant, case, gpu))


def _within(op: str, case: Case, gpu: Gpu) -> Plan | None:
    """Return the tables' plan that dequantises w within the product, or None where they have none."""
    for kind in ("backward",) if op == "backward" else ("decode16", "decode64", "tickets"):
        if quant_tiles.ROWS[kind] >= case.M:
            redundant = kind.startswith("decode")
            for tile in quant_tiles.find(kind, case, gpu.arch):
                return Plan(redundant, tile, split(tile, redundant, case, gpu), within=True)
    return None


def split(tile: Tile, redundant: bool, case: Case, gpu: Gpu) -> int:
    """Return `Plan.split` by rule: two programs to a multiprocessor.

    In a redundant forward each program has at least eight steps of K. In a backward each has at least four row blocks,
    and no more than 16 partial sums are added up. A forward by tickets is not split.
    """
    wanted = 2 * gpu.multiprocessors
    if tile.BLOCK_C:
        count = max(1, -(-max(case.N, case.K) // tile.BLOCK_C) * -(-case.R // tile.block_r(case.R)))
        return max(1, min(wanted // count, case.M // (4 * tile.BLOCK_M), 16))
    if not redundant:
        return 1
    count = max(1, -(-case.M // tile.BLOCK_M) * -(-case.N // tile.BLOCK_N))
    return max(1, min(wanted // count, case.K // (8 * tile.BLOCK_K)))


def keep(device: str, plans: Mapping[str, Plan | Sm90Plan]) -> Path:
    """Write `plans`, and no others, as the measured plans of `device`. Return the file's path.

    Raises OSError where the file cannot be written; the old file is then left as it was.
    """
    place = store.write(device, plans)
    cache_clear()
    return place


def forget(device: str) -> bool:
    """Delete the measured plans of `device`, of all versions. Return whether there were any."""
    existed = store.remove(device)
    cache_clear()
    return existed


def cache_clear() -> None:
    """Make the next call of every kind read the file and choose its plan again."""
    for cached in (store.load, plan, sm90_plan):
        cached.cache_clear()
