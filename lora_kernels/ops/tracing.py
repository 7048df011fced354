"""What the autograd Functions of this package share: what autocast asks, and the refusal of a double backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_kernels.ops import check

_PLAIN = frozenset((Tensor, nn.Parameter))
_AUTOCAST = (torch.float32, *check.HALVES)


def as_autocast_asks(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[bool, Tensor, Tensor | None, Tensor, Tensor]:
    """(whether there is autocast, x, bias, a, b): in its dtype, but fp32 a and b as they are, and fp64 x."""
    device = device_type(x)
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and x.dtype in _AUTOCAST:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        a, b = (t.to(dtype) if t.dtype in check.HALVES else t for t in (a, b))
    return autocast, x, bias, a, b


def device_type(t: Tensor) -> str:
    """``t.device.type``, which builds its string anew each time. torch 2.6 cannot trace ``is_cpu`` in a backward."""
    return "cpu" if not torch.compiler.is_compiling() and t.is_cpu else t.device.type


def watched(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether a call has to be seen as the operator that it is: by a compiler, a tracer, a profiler, a mode
    (checkpointing policies and FLOP counters are modes), functorch, forward-mode AD, by a subclass of Tensor or a
    device that has its own way with it, or by PyTorch where memory does not hold what the tensor is: negated lazily,
    or the zeros without memory that torch.sgn gives as its gradient. Else what the operator runs can be called itself:
    the dispatch of two of them took a fifth of a training step of a 128x128 layer."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or not (x.is_cpu or x.is_cuda)
        or type(x) not in _PLAIN
        or type(w) not in _PLAIN
        or type(a) not in _PLAIN
        or type(b) not in _PLAIN
        or (bias is not None and (type(bias) not in _PLAIN or bias.is_neg() or bias._is_zerotensor()))
        or x.is_neg()
        or x._is_zerotensor()
        or w.is_neg()
        or a.is_neg()
        or b.is_neg()
    )


def refuse_transforms(name: str) -> None:
    """Raises RuntimeError inside torch.func's transforms that differentiate. They would find nothing to differentiate
    by in an operator called directly, and under a compiler's tracing not in an autograd Function either: the gradients
    would be zeros without a word."""
    if torch._C._are_functorch_transforms_active() and (torch.is_grad_enabled() or forward_ad._current_level >= 0):
        raise RuntimeError(
            f"{name} does not go with torch.func's grad, vjp, jvp and what is made of them, nor with vmap while "
            "gradients are recorded (under torch.no_grad() it does). Take loss.backward() or torch.autograd.grad, or "
            "compute this layer in plain torch, x @ W.T + scale * (x @ A.T @ B.T)"
        )


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which takes a microsecond where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def no_graph() -> AbstractContextManager[object]:
    """For a backward: mostly gradients are not recorded in it, and entering torch.no_grad takes its time."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


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
        return _RefuseDoubleBackward.apply(torch.empty(0, device="cpu", requires_grad=True), name, *grads)
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
