"""Problems for convolutions with LoRA, and the equation in fp64 by products of matrices, without torch's convolutions.

P [B, S, C·k] holds the part of the padded x that each position of the kernel sees.
y = P Wᵀ + bias + s·(P̂ Aᵀ) Bᵀ with W [N, C·k] and B [N, R] made dense, whatever their groups are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core import dropout

NAMES = ("y", "dx", "da", "db", "dbias", "dm")


@dataclass(frozen=True)
class Problem:
    """The operands of one call, as `lora_conv` takes them."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    m: Tensor | None = None
    scale: float = 0.75
    p: float = 0.0
    seed: int | None = None
    moves: dict[str, Any] = field(default_factory=dict)
    rows: bool = False
    """Whether the mask is that of the rows of P, as where `lora_linear` serves the call."""

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype, in the same places of memory."""
        changed = {name: t.detach().to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)


def problem(
    x: tuple[int, ...],
    N: int,
    kernel: tuple[int, ...],
    R: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
    groups: int = 1,
    grouped: bool = False,
    channels_last: bool = False,
    dora: bool = False,
    bias: bool = True,
    p: float = 0.0,
    rows: bool = False,
    seed: int = 0,
    **moves: Any,
) -> Problem:
    """Return random operands, scaled such that every term of y has about the same size."""
    g = torch.Generator().manual_seed(seed)
    C, K = x[1], x[1] * math.prod(kernel)
    adapter = adapter_dtype or dtype
    made = torch.randn(x, generator=g).to(dtype)
    if channels_last:
        made = made.movedim(1, -1).contiguous().movedim(-1, 1)
    w = (torch.randn(N, C // groups, *kernel, generator=g) * (K / groups) ** -0.5).to(dtype)
    a = (torch.randn(R, C // (groups if grouped else 1), *kernel, generator=g) * K**-0.5).to(adapter)
    b = (torch.randn(N, R // groups, *(1,) * len(kernel), generator=g) * R**-0.5).to(adapter)
    biases = torch.randn(N, generator=g).to(dtype) if bias else None
    m = (0.5 + torch.rand(1, N, *(1,) * len(kernel), generator=g)).to(adapter) if dora else None
    key = 4711 + (seed << 40) if p else None
    return Problem(made, w, a, b, biases, m, 0.75, p, key, {"groups": groups, **moves}, rows)


def evaluate(q: Problem, function: Callable[..., Tensor], dy: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Return y and every gradient by name, from `function` and autograd. Without `dy` a fixed random one is taken."""
    names = {"x": "dx", "a": "da", "b": "db", "bias": "dbias", "m": "dm"}
    leaves = {name: t.detach().requires_grad_() for name in names if (t := getattr(q, name)) is not None}
    y = function(replace(q, **leaves), **kwargs)
    dy = upstream(y) if dy is None else dy
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {names[name]: t.grad for name, t in leaves.items()}


def upstream(y: Tensor) -> Tensor:
    """Return a random dy for y, in bf16 numbers, so that it is the same in every dtype."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()


def equation(q: Problem) -> Tensor:
    """Return y by products of matrices."""
    n, groups = q.w.dim() - 2, q.moves.get("groups", 1)
    N, R = q.w.shape[0], q.a.shape[0]
    seen, sizes = _seen(q, q.x)
    seen_hat = seen
    if q.p and q.rows:
        keep = dropout.keep_mask(torch.tensor(q.seed), seen.shape[0] * seen.shape[1], seen.shape[2], q.p)
        seen_hat = seen * keep.view(seen.shape) * dropout.rescale(q.p)
    elif q.p:
        seen_hat, _ = _seen(q, q.x * keep_mask(q) * dropout.rescale(q.p))
    w, a = (_dense(t, q.x.shape[1]).flatten(1) for t in (q.w, q.a))
    b = _dense(q.b, R).flatten(1)
    if q.m is None:
        y = seen @ w.T + q.scale * (seen_hat @ a.T @ b.T)
    else:
        norm = torch.linalg.vector_norm((w + q.scale * b @ a).detach(), dim=1)
        d = q.m.flatten() / norm
        y = seen @ w.T + (d - 1) * (seen_hat @ w.T) + d * q.scale * (seen_hat @ a.T @ b.T)
    if q.bias is not None:
        y = y + q.bias
    assert n == len(sizes) and groups >= 1
    return y.movedim(-1, 1).reshape(q.x.shape[0], N, *sizes)


def plain_torch(q: Problem) -> Tensor:
    """Return y as torch's convolutions give it, in the dtypes of the operands, as PEFT computes it."""
    n, moves = q.w.dim() - 2, dict(q.moves)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    groups = moves.pop("groups", 1)
    of_a = groups if q.a.shape[1] != q.x.shape[1] else 1
    x_hat = q.x * (keep_mask(q).to(q.x.dtype)) * dropout.rescale(q.p) if q.p else q.x
    y = convolve(q.x, q.w, q.bias, groups=groups, **moves)
    low = convolve(convolve(x_hat.to(q.a.dtype), q.a, groups=of_a, **moves), q.b, groups=groups) * q.scale
    if q.m is None:
        return (y + low).to(y.dtype)
    whole = q.w.to(q.a.dtype) + q.scale * (q.b.flatten(1) @ q.a.flatten(1)).view(q.w.shape)
    d = q.m / torch.linalg.vector_norm(whole.detach(), dim=tuple(range(1, n + 2))).view(q.m.shape)
    if q.p:
        u = convolve(x_hat, q.w, groups=groups, **moves)
    else:
        u = y if q.bias is None else y - q.bias.view(q.m.shape)
    return (y + (d - 1) * u + d * low).to(y.dtype)


def keep_mask(q: Problem) -> Tensor:
    """Return the mask of x where its convolution is one of torch: by the order in which x lies in memory."""
    B, C, *sizes = q.x.shape
    S, seed = math.prod(sizes), torch.tensor(q.seed)
    if q.x.is_contiguous():
        return dropout.keep_mask(seed, B * C, S, q.p).view(q.x.shape)
    return dropout.keep_mask(seed, B * S, C, q.p).view(B, *sizes, C).movedim(-1, 1)


def _seen(q: Problem, x: Tensor) -> tuple[Tensor, list[int]]:
    """Return P [B, S, C·k], and the sizes of y."""
    kernel, n = q.w.shape[2:], q.w.dim() - 2
    stride, dilation = (_each(q.moves.get(name, 1), n) for name in ("stride", "dilation"))
    padding = q.moves.get("padding", 0)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(each, each) for each in _each(0 if padding == "valid" else padding, n)]
    for i, (left, right) in enumerate(sides):
        x = _pad(x, 2 + i, left, right, q.moves.get("padding_mode", "zeros"))
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    sizes = list(x.shape[2 : 2 + n])
    return x.movedim(1, 1 + n).flatten(1 + n).reshape(x.shape[0], math.prod(sizes), -1), sizes


def _pad(x: Tensor, dim: int, left: int, right: int, mode: str) -> Tensor:
    size = x.shape[dim]
    at = torch.arange(-left, size + right)
    inside = (at >= 0) & (at < size)
    if mode == "circular":
        at = at % size
    elif mode == "reflect":
        at = at.abs()
        at = torch.where(at >= size, 2 * (size - 1) - at, at)
    x = x.index_select(dim, at.clamp(0, size - 1))
    if mode != "zeros":
        return x
    return x * inside.view(-1, *(1,) * (x.dim() - dim - 1)).to(x.dtype)


def _dense(w: Tensor, C: int) -> Tensor:
    """Return w [N, C, k], with zeros where it does not see a channel."""
    own = w.shape[1]
    blocks = [F.pad(t.movedim(1, -1), (i * own, C - (i + 1) * own)) for i, t in enumerate(w.chunk(C // own))]
    return torch.cat(blocks).movedim(-1, 1)


def _each(given: Any, n: int) -> tuple[int, ...]:
    return (given,) * n if isinstance(given, int) else tuple(given)
