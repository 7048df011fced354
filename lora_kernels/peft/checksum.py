"""`checksum`: a number of the bits of a tensor, by which a write to it is found out."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 4093
"""A prime, so that the rows of a matrix do not all begin at the same place of a line."""


def checksum(t: Tensor) -> int:
    """Return a number that changes with practically every write to t, also where its elements only change places.

    Σ (2 (i mod 4093) + 1) · wᵢ over the words wᵢ of the memory of t, integers of 64 bits where it consists of such, in
    arithmetic modulo 2⁶⁴. Version counters would not do: a write through ``.data`` leaves them as they are, and a load
    of equal values changes them.
    """
    flat = t.detach().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # a single element may have any stride
    offset, size = flat.storage_offset() * flat.element_size(), flat.nbytes
    for width, dtype in ((8, torch.int64), (4, torch.int32), (2, torch.int16)):
        if size % width == 0 and offset % width == 0 and flat.element_size() <= width:
            flat = flat.view(dtype)
            break
    else:
        flat = flat.view(torch.uint8)
    factors = torch.arange(1, 2 * min(_COLUMNS, flat.numel()) + 1, 2, device=t.device)
    whole = flat.numel() // _COLUMNS * _COLUMNS
    rest = flat[whole:]
    total = (rest * factors[: rest.numel()]).sum()
    if whole:
        total = total + (flat[:whole].view(-1, _COLUMNS).sum(0) * factors).sum()
    return int(total)
