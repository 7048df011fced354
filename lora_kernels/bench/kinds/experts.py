"""Experts of a mixture-of-experts layer: a module of transformers frozen, with PEFT's adapters, and with ours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, Cell, Target, Way

FUSED, EAGER = "PEFT, fused", "PEFT, eager"
"""PEFT's layer after `lora_kernels.fuse`, and PEFT's over the loop that transformers calls eager."""

_RANK, _ALPHA = 8, 16
_STACKS = ("gate_up_proj", "down_proj")
_EXACT, _AS_PEFT = 1e-5, 1e-4
"""The largest error of ours and of PEFT, as a fraction of the largest value in fp64."""


class _Size(NamedTuple):
    E: int
    k: int
    T: int
    H: int = 512
    I: int = 256  # noqa: E741 - the intermediate size

    def __str__(self) -> str:
        return f"{self.E} experts, top-{self.k}, {self.T} tokens, H {self.H} I {self.I}, r {_RANK}"


_SIZES = (
    _Size(16, 2, 256),
    _Size(16, 8, 64),
    _Size(64, 2, 1024),
    _Size(64, 8, 256),
    _Size(16, 2, 512, 1024, 512),
    _Size(16, 8, 256),
)


class _Problem(NamedTuple):
    """The operands of a cell. A [E, r, K] and B [E, N, r] of both stacks follow each other in `adapter`."""

    base: Any
    x: Tensor
    ids: Tensor
    weights: Tensor
    adapter: tuple[Tensor, ...]


def cells() -> list[Cell]:
    """Return the cells of experts."""
    targets = (Target(PEFT, 0.5), Target(FROZEN, 1.6))
    return [Cell("experts", str(size), functools.partial(_ways, size), targets) for size in _SIZES]


def _problem(size: _Size) -> _Problem:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, k, T, H, I = size  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    base = Qwen3MoeExperts(config)
    draw = functools.partial(torch.randn, generator=generator)
    for p in base.parameters():
        p.requires_grad_(False).copy_(draw(*p.shape) / p.shape[-1] ** 0.5)
    ids = torch.rand(T, E, generator=generator).topk(k).indices
    adapter: list[Tensor] = []
    for _, N, K in (base.gate_up_proj.shape, base.down_proj.shape):
        adapter += [draw(E, _RANK, K) / K**0.5, draw(E, N, _RANK) / _RANK**0.5]
    return _Problem(base, draw(T, H), ids, torch.rand(T, k, generator=generator) / k, tuple(adapter))


def _ways(size: _Size) -> Mapping[str, Way]:
    q = _problem(size)
    want = functools.cache(functools.partial(_equation, q))
    layer = lora_kernels.FusedLoRAExperts.from_experts(q.base, r=_RANK, lora_alpha=_ALPHA)
    ours = [getattr(layer, f"lora_{which}_{name}") for name in _STACKS for which in "AB"]
    with torch.no_grad():
        for own, value in zip(ours, q.adapter, strict=True):
            own.copy_(value)
    fused, with_peft = _with_peft(q), _with_peft(q)
    lora_kernels.fuse(fused, strict=True)
    made = {
        FROZEN: _way(q, q.base, [], want, 0.0),
        OURS: _way(q, layer, ours, want, _EXACT),
        FUSED: _way(q, fused, _peft_parameters(fused), want, _EXACT),
        PEFT: _way(q, with_peft, _peft_parameters(with_peft), want, _AS_PEFT),
    }
    if size.E == 16:
        eager = _with_peft(q, "eager")
        made[EAGER] = _way(q, eager, _peft_parameters(eager), want, _AS_PEFT)
    return made


def _way(q: _Problem, module: Any, own: list[Tensor], want: Callable[[], tuple[Tensor, ...]], most: float) -> Way:
    x, weights = (t.clone().requires_grad_() for t in (q.x, q.weights))
    trained = (x, weights, *own)

    def run() -> Tensor:
        return module(x, q.ids, weights)  # type: ignore[no-any-return]

    def faults() -> list[str]:
        y = run()
        grads = torch.autograd.grad(y, trained, torch.ones_like(y))
        names = ("y", "dx", "dweights", "dA gate_up", "dB gate_up", "dA down", "dB down")
        errors = {
            name: float((_as_stack(name, got, value).double() - value).abs().max() / value.abs().max())
            for name, got, value in zip(names, (y, *grads), want(), strict=True)
        }
        return [f"{name} is off by {e:.1e} of its largest value" for name, e in errors.items() if not e <= most]

    return Way(run, trained, tuple(p for p in module.parameters() if not p.requires_grad), faults if own else None)


def _with_peft(q: _Problem, implementation: str = "grouped_mm") -> nn.Module:
    """Return a model of PEFT that holds the experts alone, over the same memory."""
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, *args: Any) -> Any:
            return self.experts(*args)

    experts = copy.copy(q.base)  # PEFT changes these attributes of the module in every forward
    experts.__dict__.update(_parameters=dict(q.base._parameters), config=copy.copy(q.base.config))
    experts.config._experts_implementation = implementation
    settings = LoraConfig(
        r=_RANK, lora_alpha=_ALPHA, target_modules=[], target_parameters=[f"experts.{name}" for name in _STACKS]
    )
    model = get_peft_model(Holder(experts), settings)
    with torch.no_grad():
        for which, own, value in zip("ABAB", _peft_parameters(model), q.adapter, strict=True):
            own.copy_(value.flatten(0, 1) if which == "A" else value.permute(1, 2, 0).flatten(1))
    return model


def _peft_parameters(model: Any) -> list[Tensor]:
    """Return A and B of gate_up_proj, whose wrapper is the inner one, and of down_proj."""
    outer = model.base_model.model.experts
    return [
        getattr(wrapper, f"lora_{which}")["default"].weight for wrapper in (outer.base_layer, outer) for which in "AB"
    ]


def _as_stack(name: str, got: Tensor, like: Tensor) -> Tensor:
    """Return the gradient `name`, which may be of PEFT's A [E·r, K] or B [N, r·E], in the shape of the stacks [E, r, K]
    and [E, N, r]."""
    if got.dim() == like.dim():
        return got
    E, N, r = like.shape
    return got.view(N, r, E).permute(2, 0, 1) if name.startswith("dB") else got.view(like.shape)


def _equation(q: _Problem) -> tuple[Tensor, ...]:
    """Return y and the gradients of its sum for x, the weights of the experts, A and B, in fp64."""
    s = _ALPHA / _RANK
    x, weights, *adapter = leaves = [t.double().requires_grad_() for t in (q.x, q.weights, *q.adapter)]
    y = torch.zeros_like(x)
    for e in range(q.base.num_experts):
        up, down = (
            w[e].double() + s * b[e] @ a[e]
            for w, a, b in ((q.base.gate_up_proj, *adapter[:2]), (q.base.down_proj, *adapter[2:]))
        )
        tokens, place = (q.ids == e).nonzero(as_tuple=True)
        gate, z = F.linear(x[tokens], up).chunk(2, -1)
        y = y.index_add(0, tokens, F.linear(F.silu(gate) * z, down) * weights[tokens, place, None])
    return (y.detach(), *torch.autograd.grad(y.sum(), leaves))
