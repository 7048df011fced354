"""Which calls over a quantised W dequantise it within the product, and by which tile. All others dequantise it once, in
x's dtype, and go on as with a dense W. Measured plans come first, as in tiles.py; the tables are chosen by estimate and
by compiling ahead of time, not by running on a GPU.

The estimate, for an H100: the K loop with codes of 4 bits takes 13 instructions per element of W and row block of x,
0.45 ps of 132 multiprocessors x 128 lanes x 1.7 GHz. Reading the codes, writing W and reading it moves 4.5 bytes per
element, 1.3 ps at 3.35 TB/s; 0.9 ps where L2 (5.5 TB/s) keeps W. So up to two row blocks, which is M <= 64, are ahead
or level within the product, and need no memory for W; a third is behind. The same holds of a backward's loop over N.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from lora_kernels.plans import tiles
from lora_kernels.plans.tiles import Case, Plan, Tile

ROWS = {"decode16": 16, "decode64": 64, "tickets": 0, "backward": 64}
"""The largest M for which the tables have W dequantised within a product, by kind of launch. Tickets: none, until a
measurement on some GPU says otherwise, as ``tune --quant`` may on yours."""

# Kinds of launch:
#   decode16, decode64, tickets, backward   as in tiles.py
#   ..._wide                                the same for larger ranks
_DECODE16 = Tile(max_rank=64, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3)
_DECODE16_WIDE = Tile(max_rank=128, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_R=128, num_warps=8, num_stages=3)
_DECODE64 = Tile(max_rank=64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3)
_DECODE64_MMA = replace(_DECODE64, BLOCK_M=32)
_TICKETS = Tile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3)
_BACKWARD = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=3)

_16_BIT: dict[str, dict[str, Tile]] = {
    # mma.sync, with operands in registers.
    "sm_80": {
        "decode16": _DECODE16,
        "decode16_wide": _DECODE16_WIDE,
        "decode64": _DECODE64_MMA,
        "tickets": _TICKETS,
        "backward": _BACKWARD,
    },
    "sm_86": {
        "decode16": _DECODE16,
        "decode16_wide": _DECODE16_WIDE,
        "decode64": replace(_DECODE64_MMA, num_stages=2),
        "tickets": _TICKETS,
        "backward": _BACKWARD,
    },
    # wgmma, which reads w from shared memory and wants 64 rows.
    "sm_90": {
        "decode16": _DECODE16,
        "decode16_wide": replace(_DECODE16_WIDE, BLOCK_K=32, num_warps=4),
        "decode64": _DECODE64,
        "tickets": _TICKETS,
        "backward": _BACKWARD,
    },
    # tcgen05, with accumulators in tensor memory.
    "sm_100": {
        "decode16": replace(_DECODE16, num_warps=8),
        "decode16_wide": _DECODE16_WIDE,
        "decode64": replace(_DECODE64, num_warps=4),
        "tickets": _TICKETS,
        "backward": replace(_BACKWARD, BLOCK_C=128),
    },
    "sm_120": {
        "decode16": replace(_DECODE16, num_stages=2),
        "decode16_wide": _DECODE16_WIDE,
        "decode64": replace(_DECODE64_MMA, num_warps=4),
        "tickets": replace(_TICKETS, BLOCK_M=64),
        "backward": _BACKWARD,
    },
    "gfx942": {
        "decode16": replace(_DECODE16, num_stages=2),
        "decode16_wide": replace(_DECODE16_WIDE, num_stages=2),
        "decode64": replace(_DECODE64_MMA, num_warps=4, num_stages=2),
        "tickets": _TICKETS,
        "backward": _BACKWARD,
    },
}
_16_BIT["sm_89"] = _16_BIT["sm_86"]

# fp32: as in tiles.py; on sm_100 codes too would go onto tensor cores in tiles of 64 rows.
_32_BIT = {
    "decode16": Tile(max_rank=32, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, BLOCK_R=32, num_warps=4, num_stages=2),
    "backward": Tile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=64, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, num_warps=8, num_stages=3),
}

TABLES: dict[tuple[str, int], dict[str, Tile]] = {(arch, 2): table for arch, table in _16_BIT.items()} | {
    (arch, 4): _32_BIT for arch in _16_BIT
}
"""(architecture, bytes per element of x) → kind of launch → tile."""

WHOLE = Tile(BLOCK_M=0, BLOCK_N=16, BLOCK_K=256, BLOCK_R=0, num_warps=4, num_stages=1)
"""Of dequantising W once: a tile of W to a program."""


def w_format(format: str, nested: bool) -> str:
    """How `tiles.Case` names a quantised w."""
    return f"{format} nested" if nested else format


def entries(arch: str, itemsize: int, kind: str, R: int) -> Iterator[Tile]:
    """Those of a kind of launch that serve this rank, the first choice first."""
    table = TABLES[tiles.resolve(arch) or arch, itemsize]
    for name in (kind, f"{kind}_wide"):
        if name in table and (table[name].max_rank or R) >= R:
            yield table[name]


@functools.lru_cache(maxsize=4096)
def plan(op: str, case: Case) -> Plan:
    """How to run a forward or a backward with a quantised w: within, or as `tiles.plan` once it is dequantised."""
    if found := tiles.measured(op, case):
        return found
    for kind in ("backward",) if op == "backward" else ("decode16", "decode64", "tickets"):
        if ROWS[kind] >= case.M:
            redundant = kind.startswith("decode")
            for tile in entries(case.arch, case.itemsize, kind, case.R):
                return Plan(redundant, tile, tiles.split(tile, redundant, case), within=True)
    return tiles.plan(op, case._replace(w_format=""))
