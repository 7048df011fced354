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
    "layer_results",
    "problem",
    "saved_bytes",
    "truth",
]


def backend_results(module, q: Problem) -> dict[str, Tensor]:
    """Return y, dx, da and db of a back-end that is called directly, as the operators call it."""
    y, h = one_layer.forward_of(module, q)
    dx, da, db = one_layer.backward_of(module, q, h)
    return {"y": y, "dx": dx, "da": da, "db": db}


def layer_results(layer: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Return y, dx and the gradients of the layer's parameters, with the seed that follows ``torch.manual_seed(5)``."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = (layer if forward is None else forward)(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def saved_bytes(function: Callable[[], object]) -> int:
    """Return the bytes of all storages saved for the backward, each counted once. Parameters are not counted."""
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
"""Every pair (dtype, adapter_dtype) that is served, except those with fp64."""
