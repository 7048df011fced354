"""What is timed: the same layer computed in several ways, all over the same x and w.

floor     F.linear(x, w, bias): the frozen layer; backward to x only
peft      PEFT's own lora.Linear over nn.Linear
addmm_    the strongest composite of torch operations: an autograd.Function by hand, the low-rank term added in place
merge     F.linear(x, w + s·b a, bias), formed anew at every step, with autograd through it; has no dropout
<name>    this package, by back-end

and where all peers are asked for, PEFT with its adapters in the other dtype (fp32 is its default), PEFT's layer under
torch.compile on a few shapes, and other projects' layers from their sources (`lora_kernels.bench.peers`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_kernels.backends import dispatch
from lora_kernels.bench import peers
from lora_kernels.bench.shapes import BACKWARD, Shape
from lora_kernels.core.operands import Call
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.testing.judge import Problem
from lora_kernels.testing.names import SHORT


@dataclass(frozen=True)
class Task:
    """A layer ready to run."""

    layer: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...]
    """What gets a gradient beside x."""
    frozen: tuple[Tensor, ...]
    """What is a parameter and gets none."""


@dataclass(frozen=True)
class Variant:
    """A way to compute the layer."""

    name: str
    """In tables and in the JSON."""
    build: Callable[[Problem], Task]
    backend: str | None = None
    """Of ours: its back-end."""
    automatic: bool = False
    """Of ours: whether this is the one that serves where none is asked for."""
    dropout: bool = True
    """Whether it can be built with p above 0."""
    wanted: Callable[[Shape], bool] = lambda shape: True
    """Whether it is measured on a shape."""
    doubted: bool = False
    """Whether it may fail, or compute something else: it is tried first."""
    counted: bool = True
    """Whether its bytes are counted, which builds it twice more."""


def step(task: Task, q: Problem, which: str) -> Callable[[], object]:
    """One forward without gradients, or one forward + backward with gradients of x and everything trained."""
    layer = task.layer
    if which != BACKWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(q.x)

        return forward
    x = q.x.detach().requires_grad_()
    wanted = (x, *task.trained)
    return lambda: torch.autograd.grad(layer(x), wanted, q.dy)


FLOOR = Variant("F.linear", lambda q: Task(lambda x: F.linear(x, q.w, q.bias), (), _frozen(q)))


def baselines() -> tuple[list[Variant], list[str]]:
    """What ours is compared with, and what cannot be, with the reason."""
    found = [Variant("addmm_", _addmm), Variant("merge", _merge, dropout=False)]
    if importlib.util.find_spec("peft") is None:
        return found, ["PEFT is not measured: it is not installed (pip install peft)"]
    return [PEFT, *found], []


def more_baselines(sources: Sequence[tuple[str, Path]]) -> tuple[list[Variant], list[str]]:
    """The further peers, those from `sources` (name, path) among them, and what cannot be compared with, with the
    reason."""
    found, notes = [], []
    if importlib.util.find_spec("peft") is not None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            build = functools.partial(_peft, adapter_dtype=dtype)
            found.append(Variant(f"PEFT, {SHORT[dtype]} adapters", build, wanted=functools.partial(_is_other, dtype)))
        found.append(
            Variant("PEFT compiled", _peft_compiled, wanted=lambda shape: shape.compiled, doubted=True, counted=False)
        )
    for name, path in sources:
        try:
            peer = peers.load(name, path)
        except Exception as error:  # someone else's import may fail in any way
            notes.append(f"{name} is not measured: {type(error).__name__}: {error}")
            continue
        notes += peer.notes
        found.append(Variant(name, functools.partial(_theirs, peer.lora_linear), dropout=peer.dropout, doubted=True))
    return found, notes


def _is_other(dtype: torch.dtype, shape: Shape) -> bool:
    """Whether `dtype` is what the adapters of a 16-bit shape could have, and do not have."""
    return shape.dtype != torch.float32 and shape.adapters != dtype and dtype in (torch.float32, shape.dtype)


def ours(
    shape: Shape, device: torch.device, named: str | None, without: Sequence[str] = ()
) -> tuple[list[Variant], dict[str, list[str]]]:
    """Every back-end that serves `shape` (only the one `named`, if any, and none of `without`), and why the others do
    not."""
    q = shape
    calls = [Call(op, device, q.dtype, q.adapters, q.M, q.N, q.K, q.R, True) for op in ("forward", "backward")]
    found, passed_over = [], {}
    automatic = dispatch.pick(calls[0], None).name
    for name in dispatch.BACKENDS if named is None else (named,):
        if name in without:
            passed_over[name] = [f"left out by --without {name}"]
            continue
        reasons = list(dict.fromkeys(reason for call in calls for reason in dispatch.refusals(name, call)))
        if reasons:
            passed_over[name] = reasons
        else:
            found.append(Variant(f"ours: {name}", _fused(name), name, name == automatic))
    return found, passed_over


def _fused(backend: str | None) -> Callable[[Problem], Task]:
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


def _peft(q: Problem, adapter_dtype: torch.dtype | None = None) -> Task:
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


def _peft_fused(q: Problem) -> Task:
    from lora_kernels.peft.fusing import fuse

    task = _peft(q)
    fuse(cast(nn.Module, task.layer), strict=True)
    return task


def _peft_compiled(q: Problem) -> Task:
    torch.compiler.reset()  # or it would stop to compile after some shapes
    task = _peft(q)
    return Task(torch.compile(task.layer, dynamic=False), task.trained, task.frozen)


def _theirs(lora_linear: peers.LoRALinear, q: Problem) -> Task:
    a, b = q.a.detach().requires_grad_(), q.b.detach().requires_grad_()
    return Task(lambda x: lora_linear(x, q.w, a, b, bias=q.bias, scale=q.scale, p=q.p), (a, b), _frozen(q))


def _addmm(q: Problem) -> Task:
    a, b = q.a.detach().requires_grad_(), q.b.detach().requires_grad_()
    apply: Any = _Addmm.apply
    return Task(lambda x: apply(x, q.w, a, b, q.bias, q.scale, q.p), (a, b), _frozen(q))


def _merge(q: Problem) -> Task:
    a, b = q.a.detach().requires_grad_(), q.b.detach().requires_grad_()
    return Task(lambda x: F.linear(x, q.w + (q.scale * (b @ a)).to(q.w.dtype), q.bias), (a, b), _frozen(q))


class _Addmm(torch.autograd.Function):
    """As few passes as vendor GEMMs and torch's own dropout allow. The layouts of the narrow products are the fastest
    of those tried; adapters of another dtype are converted to x's."""

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


PEFT = Variant("PEFT", _peft)
LAYERS = (Variant("PEFT's, fused", _peft_fused), Variant("FusedLoRALinear", _fused(None)))
"""Ours as layers, the back-end chosen by itself."""


def _linear(q: Problem) -> nn.Linear:
    """An nn.Linear over the problem's own w and bias."""
    linear = nn.Linear(q.w.shape[1], q.w.shape[0], q.bias is not None, device="meta", dtype=q.w.dtype)
    linear.weight = nn.Parameter(q.w, requires_grad=False)
    if q.bias is not None:
        linear.bias = nn.Parameter(q.bias, requires_grad=False)
    return linear


def _frozen(q: Problem) -> tuple[Tensor, ...]:
    return (q.w,) if q.bias is None else (q.w, q.bias)
