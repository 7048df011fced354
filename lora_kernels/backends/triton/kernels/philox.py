"""The dropout mask of one tile, drawn from a counter: the rule of `lora_kernels.core.dropout`, on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, m, k, T, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return keep[m : m + BLOCK_M, k : k + BLOCK_K], bool: the elements that dropout with threshold T keeps.
    k and BLOCK_K are multiples of 8, m is a multiple of BLOCK_M.

    Philox4x32-10 (Salmon et al., SC 2011) is called once for eight neighbouring elements of a row.
    """
    # counter = (k >> 3, m mod 2^32, m >> 32, 0), key = (seed mod 2^32, seed >> 32). A tile does not straddle a multiple
    # of 2^32 rows.
    m = tl.cast(m, tl.uint64)
    row = ((m & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, BLOCK_M).to(tl.uint32))[:, None]
    group = (k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    group, row = tl.broadcast(group, row)
    word0, word1, word2, word3 = tl.philox(seed, group, row, (m >> 32).to(tl.uint32), 0)
    # A join adds an innermost axis, so the element's number within its group of eight reads, from its highest bit down:
    # word >> 1, word & 1, half.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    threshold = T.to(tl.uint32)
    # keep iff lane >= T
    lanes = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.reshape(lanes, (BLOCK_M, BLOCK_K))
