"""What the autograd Functions of this package share: what autocast asks, and the refusal of a double backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lora_kernels import check

_AUTOCAST = (torch.float32, *check.HALVES)


def as_autocast_asks(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[bool, Tensor, Tensor | None, Tensor, Tensor]:
    """(whether there is autocast, x, bias, a, b): in its dtype, but fp32 a and b as they are, and fp64 x."""
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype in _AUTOCAST:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        a, b = (t.to(dtype) if t.dtype in check.HALVES else t for t in (a, b))
    return autocast, x, bias, a, b


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Mostly there is none, and entering torch.autocast takes its time."""
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def refuse_double_backward(name: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients that a backward returns, tied to an error where ``create_graph=True`` asks for their own gradients.

    PyTorch's once_differentiable does so only where dy itself requires a gradient, and otherwise hands out gradients
    that look constant: a gradient penalty on dx would then silently lose its part in A and B.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RefuseDoubleBackward.apply(torch.empty(0, requires_grad=True), name, *grads)
    return grads


class _RefuseDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, name: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return grads

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} has no double backward: its gradients cannot be differentiated again. Leave create_graph=True "
            "away, or compute this layer in plain torch, x @ W.T + scale * (x @ A.T @ B.T), for second derivatives"
        )
