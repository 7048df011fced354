"""The judge of `lora_kernels.testing.judge` for tests, and the shapes and dtypes on which kernels are tested."""

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


def backend_results(module, q: Problem) -> dict[str, Tensor]:
    """y, dx, da and db of a back-end that is called directly, as the operators call it."""
    y, h = one_layer.forward_of(module, q)
    dx, da, db = one_layer.backward_of(module, q, h)
    return {"y": y, "dx": dx, "da": da, "db": db}


def saved_bytes(function: Callable[[], object]) -> int:
    """The bytes of all storages saved for the backward, each counted once. Parameters are not counted."""
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
"""Odd, ragged and empty shapes; r from 1 to 256, powers of two and others, and above K. The last shape is large enough
for statistics. On the others each element must be within the bound of rounding."""


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
"""(dtype, adapter_dtype): every combination that is served, without fp64."""
