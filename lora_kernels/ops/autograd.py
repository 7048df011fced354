"""The parts that the autograd Functions share: the contexts of a backward, and the refusal of second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def device_type(t: Tensor) -> str:
    """Return ``t.device.type``, but without building a new string for a CPU tensor on every call.

    torch 2.6 cannot trace ``is_cpu`` in a backward, so it is not read while compiling.
    """
    return "cpu" if not torch.compiler.is_compiling() and t.is_cpu else t.device.type


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t.to(dtype)``. It is skipped where there is nothing to convert, since even then it takes a
    microsecond."""
    return t if t.dtype == dtype else t.to(dtype)


def as_dense(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dy in `dtype`. A sparse dy is made dense; autograd allows no further layout but torch.strided for the
    gradient of a dense y. torch 2.6 cannot trace the question for the layout, and a compiler traces no sparse dy."""
    return as_dtype(dy.to_dense() if not torch.compiler.is_compiling() and dy.is_sparse else dy, dtype)


def needs_plain_mode(dy: Tensor) -> bool:
    """Return whether a backward has to leave grad mode or autocast. Usually neither is on, and then asking takes less
    time than entering the contexts below."""
    device = device_type(dy)
    return torch.is_grad_enabled() or (device != "meta" and torch.is_autocast_enabled(device))


def no_graph() -> AbstractContextManager[object]:
    """Return a context in which no gradients are recorded, entering ``torch.no_grad`` only where they would be."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def autocast_of(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast converts x. None where autocast is off, for an fp64 x, which it leaves as it
    is, and on the meta device, which has none."""
    device = device_type(x)
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast, entering ``torch.autocast`` only where it is on."""
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def outlived(*operands: Any) -> bool:
    """Return whether one of the operands is a tensor that has outlived a transform of torch.func. Its memory does not
    hold its value, and ``Function.apply`` takes it out of its wrapper. Not to be asked while compiling: a compiler
    traces no such tensor."""
    is_dead = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]
    for each in operands:  # noqa: SIM110 - any() would enter a frame for each operand
        if isinstance(each, Tensor) and is_dead(each):
            return True
    return False


def apply(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Any:
    """Return ``function.apply(x, *rest)``, without the Python that torch before 2.14 wraps around it where that does
    nothing.

    That code serves torch.compile, the transforms of torch.func, and tensors that have outlived such a transform. In
    every other call it only copies the arguments, which takes two microseconds.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or outlived(x, *rest):
        return function.apply(x, *rest)
    return super(torch.autograd.Function, function).apply(x, *rest)  # type: ignore[misc]


_LOSES_HOOKS: bool = torch.__version__ < (2, 13)  # type: ignore[operator]
"""Whether this torch may lose hooks, as `keeps_hooks` tells: 2.6 and 2.8 do, 2.13 does not."""


def keeps_hooks(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward of an autograd Function so that the hooks of its operands (``Tensor.register_hook``) stay.

    A backward that reads ``ctx.saved_tensors`` under activation checkpointing (``use_reentrant=False``) gets new
    tensors in place of the parameters. As they are released, torch before 2.13 takes the hooks off the parameters
    themselves, for good, and none runs any more. They are put back when these tensors are gone, before they are due.
    """
    if not _LOSES_HOOKS:
        return backward

    @functools.wraps(backward)
    def kept(ctx: Any, *dys: Tensor | None) -> Any:
        grads = backward(ctx, *dys)
        if not torch.compiler.is_compiling():
            for node, _ in ctx.next_functions:
                leaf = getattr(node, "variable", None)
                if leaf is not None and leaf._backward_hooks:
                    leaf._backward_hooks = leaf._backward_hooks  # torch sets its own reference to them anew
        return grads

    return kept


def refuse_double_backward(
    name: str, grads: tuple[Tensor | None, ...], *operands: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return `grads`, the results of a backward. With ``create_graph=True`` they raise RuntimeError where they are
    differentiated again. `operands` are the tensors that they were computed from.

    PyTorch's once_differentiable raises only where dy itself requires a gradient. Otherwise its gradients look like
    constants, and a gradient penalty on dx would silently give nothing to A and B. The operands are inputs here,
    because ``torch.autograd.grad`` visits only what leads to the tensors that it is asked for.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        anchor = torch.empty(0, device="cpu", requires_grad=True)
        return _RefuseDoubleBackward.apply(name, len(grads), *grads, anchor, *operands)
    return grads


def gradients_of(
    name: str, ctx: Any, dy: Tensor, gradients: Callable[..., tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """Return ``gradients(ctx, dy, *saved)``, where saved are the tensors of `ctx`: the results of a backward of the
    function `name`. They are computed without a graph and without autocast, and raise RuntimeError where they are
    differentiated again."""
    saved = ctx.saved_tensors  # activation checkpointing lets a backward read this only once
    if not needs_plain_mode(dy):
        return gradients(ctx, dy, *saved)
    with no_graph(), no_autocast(device_type(dy)):
        grads = gradients(ctx, dy, *saved)
    return refuse_double_backward(name, grads, dy, *saved)


class _RefuseDoubleBackward(torch.autograd.Function):
    """The first tensors, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} has no double backward: its gradients cannot be differentiated again. Leave create_graph=True "
            "away. For second derivatives take torch.func.hessian or torch.func.jvp, or compute this layer in plain "
            "torch, x @ W.T + scale * (x @ A.T @ B.T), or with PEFT after lora_kernels.unfuse(model)"
        )
