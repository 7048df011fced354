"""The measured plans of a device, as the evidence about it holds them: by which key, and in which form.

``python -m lora_kernels verify --tune`` measures plans on this machine and adds them to the file of evidence.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from lora_kernels.core.operands import power_of_two
from lora_kernels.evidence import find as evidence
from lora_kernels.plans.sm90 import BY_RULE, PLANS, Sm90Plan
from lora_kernels.plans.tiles import Case, Plan, Tile

P = TypeVar("P", Plan, Sm90Plan)


def key(op: str, case: Case) -> str:
    """Return the key of a plan in the evidence.

    It names the dtypes of x and of the adapters, N and K as they are, M rounded up to a power of two, R rounded up to
    the tile that holds it (a power of two, at least 16), dropout, and the format of a quantised w.
    """
    rows, rank = power_of_two(case.M), max(16, power_of_two(case.R))
    types = "+".join(str(each).removeprefix("torch.") for each in case.dtypes)
    words = [op, types, f"M{rows} N{case.N} K{case.K} R{rank}"]
    return " ".join([*words, *["dropout"] * case.dropout, *[case.w_format] * bool(case.w_format)])


def sm90_key(op: str, case: Case) -> str:
    """Return the key of a plan of the sm_90a kernels, which share the evidence with the Triton kernels."""
    return f"cuda {key(op, case)}"


def find(device: torch.device, entry: str, kind: type[P]) -> P | None:
    """Return the plan of type `kind` that the evidence about a device holds under the key `entry`, or None. Warns
    if this version cannot read the entry."""
    kept = evidence.of(device).plans.get(entry)
    if kept is None:
        return None
    try:
        found = read(kept)
        _check(entry, found)
    except (KeyError, TypeError, ValueError) as error:
        warnings.warn(
            f"the measured plan {entry!r} is ignored: {type(error).__name__}: {error} (python -m lora_kernels verify "
            "--tune measures it again)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return found if isinstance(found, kind) else None


def read(kept: Any) -> Plan | Sm90Plan:
    """Return the plan that `written` has written. Raises KeyError or TypeError for anything else."""
    if "columns" in kept:
        return Sm90Plan(**kept)
    return Plan(kept["redundant"], Tile(**kept["tile"]), kept["split"], kept["within"])


def _check(entry: str, plan: Plan | Sm90Plan) -> None:
    """Raise ValueError for a plan that no launch under the key `entry` can have."""
    if isinstance(plan, Sm90Plan):
        if plan not in (BY_RULE, *PLANS) or any(type(value) is not int for value in plan):
            raise ValueError(f"the kernels are not compiled for {plan}")
        return
    backward = entry.startswith("backward ")
    values: dict[str, Any] = asdict(plan.tile) | plan._asdict()
    powers = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", *["BLOCK_C", "BLOCK_T"] * backward), (16, 1024))
    counts = {"GROUP_M": (1, 1024), "num_stages": (1, 16), "split": (1, 4096)}
    none = {} if backward else {"BLOCK_C": (0, 0), "BLOCK_T": (0, 0)}
    for name, (least, most) in (powers | counts | none | {"num_warps": (1, 32)}).items():
        value = values[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {reprlib.repr(value)}, and must be an integer from {least} to {most}")
        if (name in powers or name == "num_warps") and value & (value - 1):
            raise ValueError(f"{name} is {value}, no power of two")
    for name in ("redundant", "within", "tma"):
        if type(values[name]) is not bool:
            raise ValueError(f"{name} is {reprlib.repr(values[name])}, and must be true or false")
    rank = re.search(r" R(\d+)", entry)
    if plan.redundant and (backward or (rank is not None and int(rank[1]) > plan.tile.BLOCK_R)):
        raise ValueError(f"redundant is true, with BLOCK_R {plan.tile.BLOCK_R}")
    if plan.tile.max_rank is not None and type(plan.tile.max_rank) is not int:
        raise ValueError(f"max_rank is {reprlib.repr(plan.tile.max_rank)}, no integer")


def written(plan: Plan | Sm90Plan) -> dict[str, Any]:
    """Return a plan as plain data."""
    return plan._asdict() | ({"tile": asdict(plan.tile)} if isinstance(plan, Plan) else {})
