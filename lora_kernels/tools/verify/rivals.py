"""What a back-end is timed beside: the frozen layer, and the layers of others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.bench import layers
from lora_kernels.bench.shapes import FORWARD
from lora_kernels.testing.judge import Problem
from lora_kernels.testing.timing import Step
from lora_kernels.tools.verify.subject import Operands

FROZEN = "F.linear"
"""The frozen layer: x Wᵀ in a forward, dy W in a backward."""

Make = Callable[[str, Operands], Step]


def frozen(op: str, operands: Operands) -> Step:
    """Return a pass of the frozen layer. A quantised w is dequantised in every call."""
    q, w = operands.q, operands.w

    def dense() -> Tensor:
        return w if isinstance(w, Tensor) else w.dequantize(q.x.dtype)

    def forward() -> object:
        return F.linear(q.x, dense(), q.bias)

    def backward() -> object:
        return q.dy @ dense()

    return forward if op == "forward" else backward


def others(quantised: bool, in_a_graph: bool, op: str) -> dict[str, Make]:
    """Return the layers of others, by name. They have no quantised w; and a CUDA graph cannot hold a backward of
    autograd whose forward is outside."""
    if quantised or (in_a_graph and op == "backward"):
        return {}
    found: dict[str, Make] = {"addmm_": lambda op, operands: _step(op, layers.addmm, operands)}
    if importlib.util.find_spec("peft") is not None:
        found["PEFT"] = lambda op, operands: _step(op, layers.peft, operands)
    return found


def _step(op: str, build: Callable[[Problem], layers.Task], operands: Operands) -> Step:
    q = operands.q
    task = build(q)
    if op == "forward":
        return layers.step(task, q, FORWARD)
    x = q.x.detach().requires_grad_()
    y, wanted = task.layer(x), (x, *task.trained)
    return lambda: torch.autograd.grad(y, wanted, q.dy, retain_graph=True)
