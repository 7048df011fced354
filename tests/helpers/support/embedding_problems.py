"""Problems for embeddings with an adapter: the equation in fp64, plain torch in the same dtypes, and the judge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core import accuracy
from lora_kernels.ops.embedding import lora_embedding


@dataclass(frozen=True)
class Problem:
    """The operands of one call: ids [...], w [V, D], a_t [V, R], b [D, R], m [D] or None, dy [..., D]."""

    ids: Tensor
    w: Tensor
    a_t: Tensor
    b: Tensor
    m: Tensor | None
    dy: Tensor
    scale: float = 0.75
    embed_scale: float | Tensor = 1.0
    padding_idx: int | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype."""
        w, a_t, b, dy = (t.detach().to(dtype) for t in (self.w, self.a_t, self.b, self.dy))
        e = self.embed_scale
        if isinstance(e, Tensor):  # it is rounded to the dtype of the table
            e = e.to(self.w.dtype).to(dtype)
        return replace(self, w=w, a_t=a_t, b=b, dy=dy, m=None if self.m is None else self.m.to(dtype), embed_scale=e)


def problem(
    V: int,
    D: int,
    R: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    dora: bool = False,
    turned: bool = False,
    strided: bool = False,
    **settings,
) -> Problem:
    """Return random operands. With `turned` a_t is the transposed view of an A [R, V], as PEFT's is; with `strided` no
    operand is contiguous."""
    generator = torch.Generator().manual_seed(V + D)

    def draw(rows: int, cols: int, std: float, dtype: torch.dtype) -> Tensor:
        t = torch.randn(rows, 2 * cols, generator=generator).to(dtype) * std
        return t[:, ::2] if strided else t[:, :cols].contiguous()

    adapter_dtype = adapter_dtype or dtype
    a_t, b, w = draw(V, R, 1.0, adapter_dtype), draw(D, R, R**-0.5, adapter_dtype), draw(V, D, 1.0, dtype)
    ids = torch.randint(0, V, shape, generator=generator)
    m = None
    if dora:
        norm = torch.linalg.vector_norm(w.double() + 0.75 * a_t.double() @ b.double().t(), dim=0)
        m = (norm * (0.5 + torch.rand(D, generator=generator))).to(torch.promote_types(adapter_dtype, torch.float32))
    if turned:
        a_t = a_t.t().contiguous().t()
    dy = draw(ids.numel(), D, 1.0, dtype).view(*shape, D) if not strided else draw(D, ids.numel(), 1.0, dtype).t()
    return Problem(ids, w, a_t, b, m, dy.view(*shape, D) if len(shape) == 1 else dy, **settings)


def plain(ids, w, a_t, b, *, scale, embed_scale=1.0, padding_idx=None, magnitude=None) -> Tensor:
    """Return y as PEFT computes it, but with the row of padding_idx of Aᵀ as zeros."""
    if padding_idx is not None:
        keep = torch.arange(w.shape[0]) != padding_idx
        a_t = a_t * keep[:, None].to(a_t.dtype)
    e = embed_scale.to(w.dtype) if isinstance(embed_scale, Tensor) else embed_scale
    y, low = F.embedding(ids, w) * e, (F.embedding(ids, a_t) @ b.t()) * scale * e
    if magnitude is not None:
        whole = w + scale * (a_t @ b.t()).detach()
        d = magnitude / torch.linalg.vector_norm(whole, dim=0).to(magnitude.dtype)
        y, low = d * y, d * low
    return (y + low).to(w.dtype)


def evaluate(q: Problem, function=lora_embedding) -> dict[str, Tensor]:
    """Return y and every gradient by name, from `function` and autograd."""
    leaves = {"a_t": q.a_t, "b": q.b} | ({} if q.m is None else {"m": q.m})
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = function(
        q.ids,
        q.w,
        leaves["a_t"],
        leaves["b"],
        scale=q.scale,
        embed_scale=q.embed_scale,
        padding_idx=q.padding_idx,
        magnitude=leaves.get("m"),
    )
    grads = torch.autograd.grad(y, list(leaves.values()), q.dy)
    return {"y": y.detach()} | dict(zip((f"d{name}" for name in leaves), grads, strict=True))


def truth(q: Problem) -> dict[str, Tensor]:
    """Return y and every gradient of the equation in fp64, from the operands as they are stored."""
    return evaluate(q.to(torch.float64), plain)


def check(got: dict[str, Tensor], q: Problem) -> None:
    """Raise AssertionError where a result is farther from the truth than plain torch in the same dtypes allows."""
    want, eager = truth(q), evaluate(q, plain)
    for name, value in got.items():
        assert value.shape == want[name].shape, name
        assert value.dtype == eager[name].dtype, name
        fault = accuracy.errors_beside(value, want[name], eager[name]).fault
        assert fault is None, f"{name}: {fault}"
