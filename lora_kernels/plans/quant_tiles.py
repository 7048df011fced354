"""The tables of plans for the Triton kernels with a quantised w: for which calls the product itself dequantises it, and
by which tile. All other calls dequantise w once, in x's dtype, and go on as with a dense w.

The entries were chosen by estimate and by compiling ahead of time, not by running on a GPU.

The estimate, for an H100: the K loop with codes of 4 bits takes 13 instructions per element of W and row block of x,
0.45 ps of 132 multiprocessors x 128 lanes x 1.7 GHz. Reading the codes, writing W and reading it moves 4.5 bytes per
element, which takes 1.3 ps at 3.35 TB/s, or 0.9 ps where L2 (5.5 TB/s) keeps W. So up to two row blocks, which is
M <= 64, the product that dequantises is faster or as fast, and needs no memory for W; with a third it is slower. The
same holds of a backward's loop over N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lora_kernels.plans import tiles
from lora_kernels.plans.tiles import Case, Tile

ROWS = {"decode16": 16, "decode64": 64, "backward": 64}
"""The largest M for which a product dequantises W, by kind of launch."""

# Kinds of launch:
#   decode16, decode64, backward   as in tiles.py
#   ..._wide                       the same kind for larger ranks
_DECODE16 = Tile(max_rank=64, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3)
_DECODE16_WIDE = replace(_DECODE16, max_rank=128, BLOCK_R=128, num_warps=8)
_DECODE64 = Tile(max_rank=64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3)
_BACKWARD = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, BLOCK_C=64, BLOCK_T=32, num_warps=8, num_stages=3)

# mma.sync, with operands in registers.
_SM_80: dict[str, Tile] = {
    "decode16": _DECODE16,
    "decode16_wide": _DECODE16_WIDE,
    "decode64": replace(_DECODE64, BLOCK_M=32),
    "backward": _BACKWARD,
}
_SM_86 = _SM_80 | {"decode64": replace(_DECODE64, BLOCK_M=32, num_stages=2)}
# wgmma and tcgen05, which read w from shared memory and want 64 rows.
_SM_90 = _SM_80 | {"decode16_wide": replace(_DECODE16_WIDE, BLOCK_K=32, num_warps=4), "decode64": _DECODE64}
_16_BIT: dict[str, dict[str, Tile]] = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_89": _SM_86,
    "sm_90": _SM_90,
    # Narrower parts of da and db spill, and so does a third stage.
    "sm_100": _SM_90
    | {
        "decode16_wide": replace(_SM_90["decode16_wide"], num_stages=2),
        "backward": replace(_BACKWARD, BLOCK_C=128),
    },
    "sm_120": _SM_86,
}

# fp32: small tiles as in tiles.py, and for the same architectures.
_32_BIT: dict[str, Tile] = {
    "decode16": Tile(max_rank=32, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, BLOCK_R=32, num_warps=4, num_stages=2),
    "backward": Tile(BLOCK_M=32, BLOCK_N=16, BLOCK_K=64, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, num_warps=8, num_stages=3),
}

TABLES: dict[tuple[str, int], dict[str, Tile]] = {
    (arch, itemsize): _16_BIT[arch] if itemsize == 2 else _32_BIT for arch, itemsize in tiles.TABLES
}
"""(architecture, bytes per element of x) → kind of launch → tile."""

WHOLE = Tile(BLOCK_M=0, BLOCK_N=16, BLOCK_K=256, BLOCK_R=0, num_warps=4, num_stages=1)
"""The tile of the kernel that dequantises all of W: each program writes one BLOCK_N x BLOCK_K tile."""


def w_format(format: str, nested: bool) -> str:
    """Return the name of a quantised w's format in `tiles.Case`."""
    return f"{format} nested" if nested else format


def find(kind: str, case: Case, arch: str) -> Iterator[Tile]:
    """Yield the entries of a kind of launch that serve this rank, the first choice first."""
    table = TABLES[tiles.resolve(arch) or arch, case.itemsize]
    for name in (kind, f"{kind}_wide"):
        if name in table and (table[name].max_rank or case.R) >= case.R:
            yield table[name]
