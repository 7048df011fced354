"""Which plan and which tile serve a call: what ``python -m lora_kernels tune`` measured on this machine, if it was
asked to, else frozen tables. Those are chosen by compiling ahead of time, not yet by running on a GPU.

The test suite compiles every entry for its architecture, in both types of 16 bits or both precisions of fp32: no
register spills (with Triton 3.6.0 and with 3.7.1; other versions may spill in a few), within the architecture's shared
memory, onto its tensor cores (or, fp32 in full precision, not).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """The constants of one launch.

    Forward: tiles of y are BLOCK_M x BLOCK_N and step through K by BLOCK_K. Backward: tiles of dx are BLOCK_M x BLOCK_K
    and step through N by BLOCK_N; parts of da and db are BLOCK_C wide and step through M by BLOCK_T.
    """

    max_rank: int | None = None
    """The largest rank that the entry serves. None: any."""
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    """How much of the rank one tile holds at most: a smaller rank gets a smaller tile, a larger one several."""
    BLOCK_C: int = 0
    BLOCK_T: int = 0
    GROUP_M: int = 8
    """How many rows of tiles are walked together, for the sake of L2."""
    num_warps: int
    num_stages: int
    tma: bool = False
    """x, w and dy through tensor-map descriptors, which leave index arithmetic and registers to the copy engine."""

    def block_r(self, R: int) -> int:
        """BLOCK_R for rank R: at least 16, the least that tensor cores take."""
        return min(self.BLOCK_R, max(16, 1 << (R - 1).bit_length()))


class Plan(NamedTuple):
    """How to run one forward or one backward."""

    redundant: bool
    """Forward only: every output tile accumulates its own h. Otherwise tiles of h (or g) come first and publish
    flags."""
    tile: Tile
    split: int
    """Into how many parts to split a sum that too few programs would run otherwise: over K in a redundant forward, over
    M in a backward."""
    within: bool = False
    """Of a quantised w: it is dequantised within the product, and not once before it. `quant_tiles` has these."""


# Kinds of launch:
#   decode16, decode64  redundant forward at M <= 16, <= 64: bound by reading w, so small tiles, and K split
#   redundant           redundant forward at larger M, no dropout: worth it while R is small against BLOCK_N
#   tickets             forward by tickets
#   backward            backward by tickets
#   ..._tma             the same through descriptors, where operands are aligned
#   ..._dropout         the same with dropout, where the mask asks for another tile
# In tickets and backward BLOCK_M elements take at least 128 bytes: row blocks of h and g share no line of L1.

_DECODE16 = Tile(max_rank=128, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_R=128, num_warps=4, num_stages=3)
_DECODE16_AMD = Tile(max_rank=128, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_R=128, num_warps=4, num_stages=2)
_DECODE64 = Tile(max_rank=64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3)
_DECODE64_MMA = Tile(max_rank=64, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3)
_DECODE64_AMD = Tile(max_rank=64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=2)
_REDUNDANT = Tile(max_rank=16, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=3)
_REDUNDANT_AMD = Tile(max_rank=16, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=2)
_REDUNDANT_WIDE = Tile(
    max_rank=16, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=3, tma=True
)

_16_BIT: dict[str, dict[str, Tile]] = {
    # 164 KB of shared memory, mma.sync from registers: 128 x 256 spills.
    "sm_80": {
        "decode16": _DECODE16,
        "decode64": _DECODE64_MMA,
        "redundant": _REDUNDANT,
        "tickets": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3),
        "backward": Tile(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, BLOCK_C=128, BLOCK_T=64, num_warps=8, num_stages=3
        ),
    },
    # 99 KB of shared memory.
    "sm_86": {
        "decode16": _DECODE16,
        "decode64": _DECODE64_MMA,
        "redundant": _REDUNDANT,
        "tickets": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2),
        "backward": Tile(
            BLOCK_M=128, BLOCK_N=32, BLOCK_K=128, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=3
        ),
    },
    # 227 KB of shared memory; wgmma reads operands from it, and descriptors fill it without using registers.
    "sm_90": {
        "decode16": _DECODE16,
        "decode64": _DECODE64,
        "redundant": _REDUNDANT,
        "redundant_tma": _REDUNDANT_WIDE,
        "tickets": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=4),
        "tickets_tma": Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, BLOCK_R=32, num_warps=8, num_stages=3, tma=True),
        "backward": Tile(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=3
        ),
        "backward_tma": Tile(
            BLOCK_M=128,
            BLOCK_N=64,
            BLOCK_K=128,
            BLOCK_R=64,
            BLOCK_C=128,
            BLOCK_T=64,
            num_warps=8,
            num_stages=4,
            tma=True,
        ),
        "backward_tma_dropout": Tile(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=4, tma=True
        ),
    },
    # As sm_90, with accumulators in tensor memory.
    "sm_100": {
        "decode16": _DECODE16,
        "decode64": _DECODE64,
        "redundant": _REDUNDANT,
        "redundant_tma": _REDUNDANT_WIDE,
        "tickets": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=4),
        "tickets_tma": Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3, tma=True),
        "backward": Tile(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=3
        ),
        "backward_tma": Tile(
            BLOCK_M=128,
            BLOCK_N=64,
            BLOCK_K=128,
            BLOCK_R=64,
            BLOCK_C=128,
            BLOCK_T=64,
            num_warps=8,
            num_stages=4,
            tma=True,
        ),
        "backward_tma_dropout": Tile(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=4, tma=True
        ),
    },
    # 99 KB of shared memory and mma.sync as sm_86, with descriptors.
    "sm_120": {
        "decode16": _DECODE16,
        "decode64": _DECODE64_MMA,
        "redundant": _REDUNDANT,
        "tickets": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2),
        "tickets_tma": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2, tma=True),
        "backward": Tile(
            BLOCK_M=128, BLOCK_N=32, BLOCK_K=128, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=3
        ),
        "backward_tma": Tile(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=2, tma=True
        ),
    },
    # 64 KB of shared memory, wavefronts of 64.
    "gfx942": {
        "decode16": _DECODE16_AMD,
        "decode64": _DECODE64_AMD,
        "redundant": _REDUNDANT_AMD,
        "tickets": Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=2),
        "backward": Tile(
            BLOCK_M=128, BLOCK_N=32, BLOCK_K=128, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=2
        ),
    },
}
_16_BIT["sm_89"] = _16_BIT["sm_86"]

# fp32 runs on the ordinary cores where its matmul precision is "highest", with operands in registers: small tiles, the
# same everywhere but on sm_100.
_32_BIT: dict[str, Tile] = {
    "decode16": Tile(max_rank=32, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, BLOCK_R=32, num_warps=4, num_stages=2),
    "tickets": Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=4, num_stages=2),
    "backward": Tile(BLOCK_M=64, BLOCK_N=16, BLOCK_K=64, BLOCK_R=32, BLOCK_C=64, BLOCK_T=16, num_warps=8, num_stages=3),
}

# Before 3.8, Triton puts the products with x under dropout onto sm_100's tensor cores, in tf32 whatever precision was
# asked for, unless they have fewer than 64 rows: BLOCK_M of tiles of h, BLOCK_C of parts of da.
_32_BIT_SM_100: dict[str, Tile] = _32_BIT | {
    "tickets_dropout": Tile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=4, num_stages=2),
    "backward": Tile(BLOCK_M=64, BLOCK_N=16, BLOCK_K=64, BLOCK_R=32, BLOCK_C=32, BLOCK_T=32, num_warps=8, num_stages=2),
}

TABLES: dict[tuple[str, int], dict[str, Tile]] = {(arch, 2): table for arch, table in _16_BIT.items()} | {
    (arch, 4): _32_BIT_SM_100 if arch == "sm_100" else _32_BIT for arch in _16_BIT
}
"""(architecture, bytes per element) → kind of launch → tile."""


def resolve(arch: str) -> str | None:
    """The architecture whose tables serve `arch`: itself, or the nearest older one of its family. None: there is
    none."""
    if (arch, 2) in TABLES:
        return arch
    if not arch.startswith("sm_"):
        return None
    # sm_87 has sm_80's shared memory, sm_103 is an sm_100 and sm_121 an sm_120.
    return {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}.get(arch)


def find(arch: str, itemsize: int, kind: str, R: int, dropout: bool, aligned: bool) -> Tile | None:
    """The entry for a kind of launch, the most special first. None where no entry serves this rank."""
    table = TABLES[resolve(arch) or arch, itemsize]
    names = [f"{kind}_tma_dropout", f"{kind}_tma", f"{kind}_dropout", kind]
    for name in names:
        if ("_tma" in name and not aligned) or ("_dropout" in name and not dropout) or name not in table:
            continue
        tile = table[name]
        if tile.max_rank is None or tile.max_rank >= R:
            return tile
    return None


class Case(NamedTuple):
    """What the choice of a plan depends on."""

    arch: str
    itemsize: int
    """Bytes per element of x."""
    M: int
    N: int
    K: int
    R: int
    dropout: bool
    aligned: bool
    """Descriptors can be made of w and of x (of dy in a backward)."""
    multiprocessors: int
    device: str | None = None
    """The device's name, and"""
    dtypes: tuple[torch.dtype, torch.dtype] | None = None
    """those of x and of the adapters: what measured plans are looked up by. Without them the tables alone are asked."""
    w_format: str = ""
    """How w is quantised, if it is: "nf4", or "nf4 nested" with double quantisation."""


def measured(op: str, case: Case) -> Plan | None:
    """What was measured to be fastest. None where nothing was, or where operands are not aligned, as those measured
    were."""
    if case.device is None or case.dtypes is None or not case.aligned:
        return None
    from lora_kernels.plans import store as tuned  # which reads a file: not before a plan is asked for

    _, _, M, N, K, R, dropout, *_ = case
    return tuned.find(case.device, tuned.key(op, *case.dtypes, M, N, K, R, dropout, case.w_format), Plan)


@functools.lru_cache(maxsize=4096)
def plan(op: str, case: Case) -> Plan:
    """How to run a forward or a backward with a dense w."""
    if found := measured(op, case):
        return found
    arch, itemsize, M, _, _, R, dropout, aligned, *_ = case
    kind = "decode16" if M <= 16 else "decode64" if M <= 64 else "redundant" if M <= 512 and not dropout else "tickets"
    if op == "backward":
        kind = "backward"
    tile = find(arch, itemsize, kind, R, dropout, aligned)
    redundant = tile is not None and kind not in ("tickets", "backward")
    if tile is None:
        tile = find(arch, itemsize, "tickets", R, dropout, aligned)
    assert tile is not None, "an entry for any rank ends every table"
    return Plan(redundant, tile, split(tile, redundant, case))


def split(tile: Tile, redundant: bool, case: Case) -> int:
    """By the rules below."""
    _, _, M, N, K, R, _, _, multiprocessors, *_ = case
    if tile.BLOCK_C:
        return backward_split(tile, M, N, K, R, multiprocessors)
    return forward_split(tile, M, N, K, multiprocessors) if redundant else 1


def forward_split(tile: Tile, M: int, N: int, K: int, multiprocessors: int) -> int:
    """Of a redundant forward: two programs to a multiprocessor, each with at least eight steps of K."""
    tiles = max(1, -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N))
    return max(1, min(2 * multiprocessors // tiles, K // (8 * tile.BLOCK_K)))


def backward_split(tile: Tile, M: int, N: int, K: int, R: int, multiprocessors: int) -> int:
    """Two programs to a multiprocessor, each with at least four row blocks, and no more than 16 partial sums to add
    up."""
    tiles = max(1, -(-max(N, K) // tile.BLOCK_C) * -(-R // tile.block_r(R)))
    return max(1, min(2 * multiprocessors // tiles, M // (4 * tile.BLOCK_M), 16))
