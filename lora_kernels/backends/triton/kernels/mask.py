"""The kernel that writes a dropout mask. Not yet run on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from lora_kernels.backends.triton.kernels.blocks import store_tile
from lora_kernels.backends.triton.kernels.philox import keep_tile


@triton.jit(do_not_specialize=["M", "T"])
def dropout_mask(out, seed, M, K, T, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [M, K] = keep, as 0 and 1 in out's dtype, for the threshold T.

    Grid: one program to each tile [BLOCK_M, BLOCK_K]. Reads the seed; writes out, contiguous.
    """
    cols = tl.cdiv(K, BLOCK_K)
    m, k = tl.program_id(0) // cols * BLOCK_M, tl.program_id(0) % cols * BLOCK_K
    keep = keep_tile(tl.load(seed), m, k, T, BLOCK_M, BLOCK_K)
    store_tile(out, K, 1, tl.where(keep, 1.0, 0.0), m, k, M, K, BLOCK_M, BLOCK_K)
