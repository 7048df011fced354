"""`add_multi`: the low-rank half of many adapters, added to a y that already holds the base product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import _C
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.core.rows import Rows

_NOTHING = Base(None)  # type: ignore[arg-type]
"""What stands for the base of a y that already holds its product: the kernel reads no w, and adds no bias."""


def add_multi(y: Tensor, x: Tensor, adapters: Sequence[Adapter | None], rows: Rows) -> None:
    if x.stride()[1] != 1:  # the adapters share one copy
        x = x.contiguous()
    threads = torch.get_num_threads()
    for i, adapter in enumerate(adapters):
        if adapter is None or not rows.counts[i]:
            continue
        index = rows.index(i)
        own_y = y[index]  # a view where the rows follow each other
        _C.forward(threads, x[index], [_NOTHING], [adapter], [own_y], [None], [False])
        if isinstance(index, Tensor):
            y[index] = own_y
