"""How each variant of the bench builds its layer from the operands of a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_kernels.bench.peers import LoRALinear
from lora_kernels.bench.shapes import BACKWARD
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.testing.judge import Problem


@dataclass(frozen=True)
class Task:
    """A layer that is ready to run."""

    layer: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...]
    """The tensors that get a gradient, beside x."""
    frozen: tuple[Tensor, ...]
    """The parameters that get none."""


def step(task: Task, q: Problem, which: str) -> Callable[[], object]:
    """Return a function that runs one forward without gradients, or one forward + backward with the gradients of x and
    of everything trained."""
    layer = task.layer
    if which != BACKWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(q.x)

        return forward
    x = q.x.detach().requires_grad_()
    wanted = (x, *task.trained)
    return lambda: torch.autograd.grad(layer(x), wanted, q.dy)


def results(task: Task, q: Problem) -> dict[str, Tensor | None]:
    """Return y, dx, da and db of a layer. A gradient is None if autograd does not reach its tensor."""
    x = q.x.detach().requires_grad_()
    y = task.layer(x)
    gradients = torch.autograd.grad(y, (x, *task.trained), q.dy, allow_unused=True)
    return dict(zip(("y", "dx", "da", "db"), (y.detach(), *gradients), strict=True))


def frozen(q: Problem) -> Task:
    """Return the frozen layer F.linear(x, w, bias); its backward goes to x only."""
    return Task(lambda x: F.linear(x, q.w, q.bias), (), _frozen(q))


def fused(backend: str | None) -> Callable[[Problem], Task]:
    """Return a function that builds this package's layer with a back-end; None stands for the automatic choice."""

    def build(q: Problem) -> Task:
        rank = q.a.shape[0]
        layer = FusedLoRALinear.from_linear(
            _linear(q),
            r=rank,
            lora_alpha=q.scale * rank,
            lora_dropout=q.p,
            adapter_dtype=q.a.dtype,
            backend=backend,
        )
        with torch.no_grad():
            layer.lora_A.copy_(q.a)
            layer.lora_B.copy_(q.b)
        return Task(layer, (layer.lora_A, layer.lora_B), _frozen(q))

    return build


def peft(q: Problem, adapter_dtype: torch.dtype | None = None) -> Task:
    """Return PEFT's lora.Linear over nn.Linear. Its adapters have the dtype of the problem's where `adapter_dtype` is
    None."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = q.a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=q.scale * rank, lora_dropout=q.p, target_modules=["proj"])  # type: ignore[arg-type]
    layer: Any = inject_adapter_in_model(config, nn.ModuleDict({"proj": _linear(q)}))["proj"]  # type: ignore[index]
    adapters = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        for module, values in zip(adapters, (q.a, q.b), strict=True):
            module.to(device=values.device, dtype=adapter_dtype or values.dtype)
            module.weight.copy_(values)
    return Task(layer.train(), tuple(module.weight for module in adapters), _frozen(q))


def peft_fused(q: Problem) -> Task:
    """Return PEFT's layer after `lora_kernels.fuse`."""
    from lora_kernels.peft.fusing import fuse

    task = peft(q)
    fuse(cast(nn.Module, task.layer), strict=True)
    return task


def peft_compiled(q: Problem) -> Task:
    """Return PEFT's layer under torch.compile."""
    torch.compiler.reset()  # torch stops compiling after some shapes otherwise
    task = peft(q)
    return Task(torch.compile(task.layer, dynamic=False), task.trained, task.frozen)


def of_peer(lora_linear: LoRALinear) -> Callable[[Problem], Task]:
    """Return a function that builds another project's layer."""

    def build(q: Problem) -> Task:
        a, b = _leaves(q)
        return Task(lambda x: lora_linear(x, q.w, a, b, bias=q.bias, scale=q.scale, p=q.p), (a, b), _frozen(q))

    return build


def addmm(q: Problem) -> Task:
    """Return the layer of `_Addmm`, the strongest composite of torch operations that we know."""
    a, b = _leaves(q)
    apply: Any = _Addmm.apply
    return Task(lambda x: apply(x, q.w, a, b, q.bias, q.scale, q.p), (a, b), _frozen(q))


def merge(q: Problem) -> Task:
    """Return the layer F.linear(x, w + s·b a, bias). The merged weight is formed in every step, and autograd goes
    through it."""
    a, b = _leaves(q)
    return Task(lambda x: F.linear(x, q.w + (q.scale * (b @ a)).to(q.w.dtype), q.bias), (a, b), _frozen(q))


class _Addmm(torch.autograd.Function):
    """LoRA by vendor GEMMs and torch's own dropout, in as few passes as they allow: the low-rank term is added in
    place. The layouts of the narrow products are the fastest of those tried. Adapters of another dtype are converted
    to x's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        x_hat, mask = torch.native_dropout(x, p, True) if p else (x, None)
        h = x_hat @ a.to(x.dtype).t()
        y = F.linear(x, w, bias).addmm_(h, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x_hat, mask, h, w, a, b)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, mask, h, w, a, b = ctx.saved_tensors
        g = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        dx = dy @ w
        if ctx.p:
            dx += torch.ops.aten.native_dropout_backward(g @ a.to(dy.dtype), mask, 1 / (1 - ctx.p))
        else:
            dx.addmm_(g, a.to(dy.dtype))
        da = (g.t() @ x_hat).to(a.dtype)
        db = (h.t() @ dy).mul_(ctx.scale).t().to(b.dtype)
        return dx, None, da, db, None, None, None


def _linear(q: Problem) -> nn.Linear:
    """Return an nn.Linear over the problem's own w and bias."""
    linear = nn.Linear(q.w.shape[1], q.w.shape[0], q.bias is not None, device="meta", dtype=q.w.dtype)
    linear.weight = nn.Parameter(q.w, requires_grad=False)
    if q.bias is not None:
        linear.bias = nn.Parameter(q.bias, requires_grad=False)
    return linear


def _frozen(q: Problem) -> tuple[Tensor, ...]:
    return (q.w,) if q.bias is None else (q.w, q.bias)


def _leaves(q: Problem) -> tuple[Tensor, Tensor]:
    return q.a.detach().requires_grad_(), q.b.detach().requires_grad_()
