"""Dropout as a function of (seed, row, column): the rule, in plain torch.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is called once for
eight neighbouring elements of a row of x [M,K]:

    key     = (seed mod 2³², seed >> 32)
    counter = (k >> 3, m mod 2³², m >> 32, 0)
    lane    = 16 bits: output word (k & 7) >> 1, its low half where k is even, its high half where k is odd
    keep    = lane >= T,  T = min(round(65536 p), 65535)
    x̂       = c · keep ⊙ x,  c = 65536 / (65536 - T): the inverse of the exact probability of being kept

There is no state and no stored mask. Every back-end draws these same bits, so the mask of one can be checked against
that of any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
_LOW = 0xFFFFFFFF
_SIGNS = 0x8000_8000_8000_8000 - 2**64
_SEED_LIMIT = 2**63 - 1
_GROUPS = 2**16
"""The number of groups of eight elements whose masks are drawn at a time on a CPU: they stay in a core's cache."""
_GROUPS_GPU = 2**20
"""The same number on a GPU: enough to keep it busy."""


def threshold(p: float) -> int:
    """Return T: a 16-bit lane below it drops its element. p below 2⁻¹⁷ gives 0, and then nothing is dropped."""
    return min(round(p * 65536), 65535)


def rescale(p: float) -> float:
    """Return c = 65536 / (65536 - T), the factor on the elements that are kept. fp64 represents it exactly; where it is
    used in fp32 it is rounded once."""
    return 65536 / (65536 - threshold(p))


def draw_seed(device: torch.device) -> Tensor:
    """Return a new seed from torch's generator of `device`: int64, shape (), on `device`, without synchronisation.

    ``torch.manual_seed`` makes it reproducible, activation checkpointing replays it, and a CUDA graph draws a new one
    at every replay.
    """
    return torch.randint(0, _SEED_LIMIT, (), dtype=torch.int64, device=device)


def draw_seeds(count: int, device: torch.device, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """Return `count` new seeds, as `draw_seed` draws one, by one operation. With `generator` they come from that one
    instead of torch's."""
    at = device if generator is None else generator.device
    seeds = torch.randint(0, _SEED_LIMIT, (count,), dtype=torch.int64, device=at, generator=generator)
    return seeds.to(device).unbind()


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 of int64 tensors that hold 32-bit words. Shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2⁶⁴, which leaves all 64 bits right. Only the words that the next round multiplies
        # must be cleared of the other half, and of the sign that the arithmetic shift brings down.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = product1, product0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _LOW, (k1 + PHILOX_WEYL[1]) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def keep_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Return which elements of x [M, K] dropout keeps: bool [M, K], on the seed's device."""
    mask = torch.empty(M, K, dtype=torch.bool, device=seed.device)
    for rows in _blocks(M, K, seed.is_cpu):
        mask[rows] = _keep_rows(seed, rows, K, p)
    return mask


def masked(x: Tensor, p: float, seed: Tensor, first: int = 0) -> Tensor:
    """Return keep ⊙ x for x [M, K], as a new tensor, where row 0 of x has the mask of row `first`. No mask of that size
    is made."""
    (M, K), out, zero = x.shape, torch.empty_like(x), x.new_zeros(())
    for rows in _blocks(M, K, x.is_cpu):
        drawn = slice(first + rows.start, first + rows.stop)
        torch.where(_keep_rows(seed, drawn, K, p), x[rows], zero, out=out[rows])
    return out


def _blocks(M: int, K: int, cpu: bool) -> list[slice]:
    """Return the rows 0 to M as blocks so small that the random words of one take a few megabytes, whatever M is."""
    rows = max(1, (_GROUPS if cpu else _GROUPS_GPU) // max(1, (K + 7) // 8))
    return [slice(m, min(M, m + rows)) for m in range(0, M, rows)]


def _keep_rows(seed: Tensor, rows: slice, K: int, p: float) -> Tensor:
    """Return the part of `keep_mask` for these rows of x."""
    m = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=seed.device)[:, None]
    group = torch.arange((K + 7) // 8, dtype=torch.int64, device=seed.device)[None, :]
    w0, w1, w2, w3 = philox((group, m & _LOW, m >> 32, torch.zeros_like(group)), (seed & _LOW, seed >> 32))
    # Eight 16-bit lanes in order, low half first, as int16. With their uppermost bit flipped they compare as unsigned.
    lanes = torch.stack((w1.bitwise_left_shift_(32).bitwise_or_(w0), w3.bitwise_left_shift_(32).bitwise_or_(w2)), -1)
    lanes = lanes.bitwise_xor_(_SIGNS).view(torch.int16)
    return lanes.flatten(1)[:, :K] >= threshold(p) - 2**15


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return x̂ = c · keep ⊙ x for x [M, K]; differentiable in x."""
    return torch.where(keep_mask(seed, x.shape[0], x.shape[1], p), x, x.new_zeros(())) * rescale(p)
