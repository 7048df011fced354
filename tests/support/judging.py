"""What a kernel's numbers are judged by: the judge of `lora_kernels.testing.judge`, and what to try it on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import NAMES, Problem, check, evaluate, problem, truth

__all__ = [
    "DTYPES",
    "NAMES",
    "SHAPES",
    "Problem",
    "backend_results",
    "check",
    "evaluate",
    "problem",
    "saved_bytes",
    "truth",
]


def backend_results(module, q: Problem, **needs: bool) -> dict[str, Tensor]:
    """y, h and every gradient of a back-end called directly, as the operators call it."""
    flags = {"need_dx": True, "need_da": True, "need_db": True} | needs
    y, h = one_layer.forward(module, q.x, q.w, q.a, q.b, q.bias, q.scale, q.p, q.seed, True)
    dx, da, db = one_layer.backward(module, q.dy, q.x, q.w, q.a, q.b, h, q.scale, q.p, q.seed, **flags)
    return {"y": y, "dx": dx, "da": da, "db": db}


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes kept for the backward that are no parameter of the problem, each storage once."""
    storages = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(storages.values())


SHAPES = [  # M, N, K, R
    (1, 1, 1, 1),
    (5, 7, 3, 2),
    (3, 40, 24, 8),
    (17, 33, 65, 3),
    (64, 48, 80, 16),
    (33, 129, 31, 17),
    (40, 24, 16, 64),
    (9, 16, 8, 256),
    (0, 16, 24, 4),
    (211, 193, 187, 8),
]
"""The last is large enough for statistics, the others have every element within the bound of rounding. Odd, ragged,
empty; r from 1 to 256, powers of two and not, and above K."""


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
"""(dtype, adapter_dtype): every combination below fp64."""
