"""The tables of plans for the Triton kernels with a dense w, and the types that every plan is made of.

The entries were chosen by compiling ahead of time, not yet by running on a GPU. The test suite compiles every entry for
its architecture, in both 16-bit dtypes or in both precisions of fp32. Each entry spills no registers (with Triton 3.6.0
and with 3.7.1; other versions may spill in a few), stays within the architecture's shared memory, and uses its tensor
cores (or does not, for fp32 in full precision).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """The block sizes and compiler options of one launch.

    Forward: tiles of y are BLOCK_M x BLOCK_N and step through K by BLOCK_K. Backward: tiles of dx are BLOCK_M x BLOCK_K
    and step through N by BLOCK_N; parts of da and db are BLOCK_C wide and step through M by BLOCK_T.
    """

    max_rank: int | None = None
    """The largest rank that the entry serves. None: any."""
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    """The largest part of the rank that one tile holds. A smaller rank gets a smaller tile, a larger one several."""
    BLOCK_C: int = 0
    BLOCK_T: int = 0
    GROUP_M: int = 8
    """How many rows of tiles are walked together, so that neighbours share operands in L2."""
    num_warps: int
    num_stages: int
    tma: bool = False
    """Whether x, w and dy are read through tensor-map descriptors. They leave index arithmetic and registers to the
    copy engine."""

    def block_r(self, R: int) -> int:
        """Return BLOCK_R for rank R: at least 16, the least that tensor cores take."""
        return min(self.BLOCK_R, max(16, 1 << (R - 1).bit_length()))


class Plan(NamedTuple):
    """How one forward or backward launch of the Triton kernels cuts its work."""

    redundant: bool
    """Forward only. True: every tile of y accumulates its own h. False: tiles of h (of g in a backward) come first and
    publish flags."""
    tile: Tile
    split: int
    """The number of parts into which a sum is split where too few programs would run otherwise: the sum over K in a
    redundant forward, the sums over M in a backward."""
    within: bool = False
    """Whether a quantised w is dequantised within the product, and not once before it. See `quant_tiles`."""


class Gpu(NamedTuple):
    """The facts about the device that the choice of a plan depends on."""

    arch: str
    """The architecture: "sm_90", or AMD's name for it, "gfx942"."""
    multiprocessors: int
    device: torch.device | None = None
    """The device whose measured plans are used. None: the tables alone."""


class Case(NamedTuple):
    """The facts about the call that the choice of a plan depends on."""

    dtypes: tuple[torch.dtype, torch.dtype]
    """The dtype of x and the dtype of the adapters."""
    M: int
    N: int
    K: int
    R: int
    dropout: bool
    aligned: bool = True
    """Whether tensor-map descriptors can be made of w and of x (of dy in a backward)."""
    w_format: str = ""
    """The format of a quantised w: "nf4", or "nf4 nested" with double quantisation. Empty for a dense w."""

    @property
    def itemsize(self) -> int:
        """The bytes of one element of the adapters, or of x where that is wider: beside fp32 adapters,
        products are made on ordinary cores, and take the tiles of fp32."""
        return max(dtype.itemsize for dtype in self.dtypes)


# Kinds of launch:
#   decode16, decode64  redundant forward at M <= 16, <= 64: bound by reading w, so small tiles, and K split
#   tickets             forward by tickets, for all other M and ranks
#   backward            backward by tickets
#   ..._tma             the same kind with descriptors, for aligned operands
#   ..._dropout         the same kind with dropout, where the mask asks for another tile
# In tickets and backward BLOCK_M elements take at least 128 bytes, so that row blocks of h and g share no line of L1.

_DECODE16 = Tile(max_rank=128, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_R=128, num_warps=4, num_stages=3)
_DECODE64 = Tile(max_rank=64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_R=64, num_warps=4, num_stages=3)
_TICKETS = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=64, num_warps=8, num_stages=3)
_BACKWARD = Tile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, BLOCK_C=128, BLOCK_T=64, num_warps=8, num_stages=3)
_BACKWARD_SMALL = replace(_BACKWARD, BLOCK_K=64, BLOCK_C=64, BLOCK_T=32)

# 164 KB of shared memory, and mma.sync with operands in registers: tiles of 128 x 256 spill.
_SM_80: dict[str, Tile] = {
    "decode16": _DECODE16,
    "decode64": replace(_DECODE64, BLOCK_M=32),
    "tickets": _TICKETS,
    "backward": _BACKWARD,
}
# 99 KB of shared memory.
_SM_86 = _SM_80 | {
    "tickets": replace(_TICKETS, num_stages=2),
    "backward": replace(_BACKWARD, BLOCK_N=32, BLOCK_C=64, BLOCK_T=32),
}
# 227 KB of shared memory. wgmma, or tcgen05 of sm_100, reads operands from it, and descriptors fill it without using
# registers.
_SM_90 = _SM_80 | {
    "decode64": _DECODE64,
    "tickets": replace(_TICKETS, num_stages=4),
    "tickets_tma": replace(_TICKETS, BLOCK_N=256, BLOCK_R=32, tma=True),
    "backward": _BACKWARD_SMALL,
    "backward_tma": replace(_BACKWARD, num_stages=4, tma=True),
    "backward_tma_dropout": replace(_BACKWARD_SMALL, num_stages=4, tma=True),
}
_16_BIT: dict[str, dict[str, Tile]] = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_89": _SM_86,
    "sm_90": _SM_90,
    "sm_100": _SM_90,
    "sm_120": _SM_86,
}

# fp32 runs on the ordinary cores where its matmul precision is "highest", with operands in registers: small tiles, the
# same everywhere. There are none for sm_100: before 3.8, Triton puts some products of fp32 onto its tensor cores, in
# tf32 whatever precision was asked for.
_32_BIT: dict[str, Tile] = {
    "decode16": Tile(max_rank=32, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, BLOCK_R=32, num_warps=4, num_stages=2),
    "tickets": Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=32, num_warps=8, num_stages=2),
    "backward": Tile(BLOCK_M=64, BLOCK_N=16, BLOCK_K=64, BLOCK_R=32, BLOCK_C=64, BLOCK_T=16, num_warps=8, num_stages=3),
}

TABLES: dict[tuple[str, int], dict[str, Tile]] = (
    {(arch, 2): table for arch, table in _16_BIT.items()}
    | {(arch, 4): _32_BIT for arch in _16_BIT if arch != "sm_100"}
    | {("sm_120", 4): _32_BIT | {"backward": replace(_32_BIT["backward"], num_stages=2)}}  # a third stage spills
)
"""(architecture, bytes per element of the adapters) → kind of launch → tile. The back-end refuses what is not here."""

_SERVED_BY = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}
"""sm_87 has sm_80's shared memory, sm_103 is an sm_100 and sm_121 an sm_120."""


def resolve(arch: str) -> str | None:
    """Return the architecture whose tables serve `arch`, or None where none does."""
    return arch if (arch, 2) in TABLES else _SERVED_BY.get(arch)


def find(kind: str, case: Case, arch: str) -> Tile | None:
    """Return the most special entry for a kind of launch, or None where no entry serves this rank."""
    table = TABLES[resolve(arch) or arch, case.itemsize]
    for name in (f"{kind}_tma_dropout", f"{kind}_tma", kind):
        if ("_tma" in name and not case.aligned) or ("_dropout" in name and not case.dropout) or name not in table:
            continue
        tile = table[name]
        if tile.max_rank is None or tile.max_rank >= case.R:
            return tile
    return None
