"""The dropout mask of a convolution's x, drawn from its seed wherever it is needed and never stored.

The mask is that of a matrix (`lora_kernels.core.dropout`): of x [B·C, S] for an x that is contiguous, and of x [B·S, C]
for one that lies by rows, as channels_last does, where S is the number of positions. Dropout acts on x before x is
padded, so a padded element is dropped where its original is.
"""

from __future__ import annotations

import math

from torch import Tensor

from lora_kernels.ops import direct, registered
from lora_kernels.ops.conv_window import Window
from lora_kernels.ops.watched import watched


def keep_mask(x: Tensor, window: Window, by_rows: bool, p: float, seed: Tensor, backend: str | None) -> Tensor:
    """Return the mask of a padded x [B, C, ...] as numbers 0 and 1 in x's dtype. `by_rows` says whether x lies by rows.
    Only the shape, dtype and device of x count."""
    B, C, *sizes = window.sizes_before(x)
    S = math.prod(sizes)
    like = x.new_empty(1).expand((B * S, C) if by_rows else (B * C, S))
    way = registered if watched(x, seed, seed, seed, None) else direct
    mask = way.keep_mask(like, p, seed, backend)
    mask = mask.view(B, *sizes, C).movedim(-1, 1) if by_rows else mask.view(B, C, *sizes)
    return window.padded(mask)
