"""The launches that the back-end `composite` makes for a call, recorded on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compile_report import empty

from lora_kernels.backends.composite import backward_pass, forward_pass
from lora_kernels.backends.triton.device import Frame, Launch
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans.tiles import Gpu


def launches(
    arch: str, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float, M: int, R: int, layers: int = 1
) -> dict[str, Launch]:
    """Return the launches of a forward and a backward with all gradients, over w [4096, 4096], by kernel."""
    N, K = 4096, 4096
    x, y = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    a, b, h = (empty(*shape, dtype=adapter_dtype) for shape in ((R, K), (N, R), (M, R)))
    seed = empty(dtype=torch.int64) if p else None
    base, adapter = [Base(x, empty(N, dtype=dtype))] * layers, [Adapter(a, b, 0.75, p, seed)] * layers
    gpu, recorded = Gpu(arch, 132), dict[str, Launch]()

    def record(frame: Frame, **others: Any) -> None:
        recorded[frame.kernel.__name__] = frame.launch(**others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Frame, "run", record)
        forward_pass.low_rank(gpu, x, base, adapter, [y] * layers, [h] * layers, dtype == torch.float16)
        backward_pass.low_rank(gpu, [y] * layers, x, adapter, [h] * layers, x, [a] * layers, [b] * layers)
    return recorded
