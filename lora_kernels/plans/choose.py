"""The choice of a plan: the one that ``python -m lora_kernels verify --tune`` measured on this device, if it was run,
else one from the built-in tables.

A choice is made once for each kind of call and then cached. `cache_clear` makes the next choices look at the evidence
again.
"""

from __future__ import annotations

import functools

import torch

from lora_kernels.core.operands import Call
from lora_kernels.evidence import file
from lora_kernels.evidence import find as evidence
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
    if gpu.device is not None and case.aligned and (found := store.find(gpu.device, store.key(op, case), Plan)):
        return found
    if not case.w_format:
        return _dense(op, case, gpu)
    return _within(op, case, gpu) or plan(op, case._replace(w_format=""), gpu)


@functools.lru_cache(maxsize=4096)
def sm90_plan(op: str, case: Case, device: torch.device) -> Sm90Plan:
    """Return the plan of the sm_90a kernels on a device: the measured one, else `BY_RULE`. If that plan could
    take clusters, and clusters were not right on this device, return one without clusters instead."""
    plan = store.find(device, store.sm90_key(op, case), Sm90Plan) or sm90.BY_RULE
    return plan if sm90_may_run(plan, op, case, device) else sm90.WITHOUT_CLUSTERS


def sm90_may_run(plan: Sm90Plan, op: str, case: Case, device: torch.device) -> bool:
    """Return whether a plan may run on a device: not if it could take clusters, and clusters were not right there."""
    known = evidence.of(device)
    if plan == sm90.BY_RULE:
        could = sm90.may_cluster(op, case.M, case.N, case.K, known.identity.multiprocessors)
    else:
        could = plan.cluster > 1
    call = Call(op, device, *case.dtypes, case.M, case.N, case.K, case.R, case.dropout)
    verdict = known.verdicts.get(file.class_key("cuda", sm90.CLUSTERS, call)) if could else None
    return verdict is None or verdict.result == file.RIGHT


def _dense(op: str, case: Case, gpu: Gpu) -> Plan:
    """Return the tables' plan with a dense w."""
    kind = "decode16" if case.M <= 16 else "decode64" if case.M <= 64 else "tickets"
    if op == "backward":
        kind = "backward"
    tile = tiles.find(kind, case, gpu.arch)
    redundant = tile is not None and kind.startswith("decode")
    if tile is None:
        tile = tiles.find("tickets", case, gpu.arch)
    assert tile is not None, "an entry for any rank ends every table"
    return Plan(redundant, tile, split(tile, redundant, case, gpu))


def _within(op: str, case: Case, gpu: Gpu) -> Plan | None:
    """Return the tables' plan that dequantises w within the product, or None where they have none."""
    for kind in ("backward",) if op == "backward" else ("decode16", "decode64"):
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


def cache_clear() -> None:
    """Make the next call of every kind look at the evidence and choose its plan again."""
    plan.cache_clear()
    sm90_plan.cache_clear()
