"""The launches that the back-end `composite` makes for many adapters, recorded on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compile_report import empty

from lora_kernels.backends.composite import multi_pass
from lora_kernels.backends.composite.adapter_table import FIELDS, Facts, Lies, Table
from lora_kernels.backends.triton.device import Frame, Launch
from lora_kernels.core.rows import Rows
from lora_kernels.plans.tiles import Gpu


def launches(
    arch: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    M: int = 4096,
    n: int = 8,
    b: str = "r",
    segments: bool = False,
) -> list[Launch]:
    """Return the launches of a forward and a backward with all gradients and dropout, over w [4096, 4096], with
    adapters up to rank 64. b lies as `Lies.unit` says; with `segments` the adapters are the
    experts of a layer."""
    N, K, R = 4096, 4096, 64
    x, y, h = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype), empty(M * R, dtype=adapter_dtype)
    facts = Facts(n, R, adapter_dtype, True, Lies("c", True), Lies(b, True), segments)
    table = Table(facts, empty(n * FIELDS, dtype=torch.int64))
    rows = Rows(empty(M, dtype=torch.int32), empty(n + 1, dtype=torch.int32))
    gpu, recorded = Gpu(arch, 132), list[Launch]()

    def record(frame: Frame, **others: Any) -> None:
        recorded.append(frame.launch(**others))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Frame, "run", record)
        multi_pass.low_rank(gpu, multi_pass.FORWARD, x, table, rows, h, y)
        multi_pass.low_rank(gpu, multi_pass.BACKWARD, y, table, rows, h, x)
        multi_pass.gradients(gpu, "a", x, table, rows, h)
        multi_pass.gradients(gpu, "b", y, table, rows, h)
    return recorded
