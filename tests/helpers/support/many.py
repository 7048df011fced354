"""Mixed batches for tests, and their judge: every adapter is judged as a layer of its own over its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import Adapter, AdapterStack, Rows, lora_linear_multi
from lora_kernels.quant.weight import QuantizedWeight
from lora_kernels.testing import judge

RANKS = (1, 3, 8, 13, 64, 256)


@dataclass(frozen=True)
class Mixed:
    """The operands of one call over a mixed batch."""

    x: Tensor
    w: Tensor | QuantizedWeight
    bias: Tensor | None
    dy: Tensor
    adapters: list[Adapter | None]
    ids: Tensor

    @property
    def n(self) -> int:
        """The number of adapters."""
        return len(self.adapters)

    @property
    def rows(self) -> Rows:
        """The rows, made anew."""
        return Rows.by_id(self.ids, self.n)

    def of(self, i: int) -> Tensor:
        """The numbers of the rows of adapter i."""
        return (self.ids == i).nonzero()[:, 0]

    def only(self, rows: Tensor) -> Mixed:
        """The batch of these rows alone."""
        return replace(self, x=self.x[rows], dy=self.dy[rows], ids=self.ids[rows])


def mixed(
    M: int,
    N: int,
    K: int,
    ranks: Sequence[int | None] = RANKS,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    p: float = 0.0,
    bias: bool = True,
    strided: bool = False,
    ids: Tensor | None = None,
    seed: int = 0,
) -> Mixed:
    """Return a random batch: adapter i has rank ``ranks[i]``, a scale of its own, and a dropout rate p / (i + 1). Every
    row draws its adapter from -1..n-1 unless `ids` says whose it is."""
    generator = torch.Generator().manual_seed(seed)
    how: dict[str, Any] = {"dtype": dtype, "adapter_dtype": adapter_dtype, "strided": strided}
    q = judge.problem(M, N, K, 1, bias=bias, seed=seed, **how)
    adapters: list[Adapter | None] = []
    for i, R in enumerate(ranks):
        if R is None:
            adapters.append(None)
            continue
        own = judge.problem(0, N, K, R, p=p, seed=seed + i + 1, **how)
        adapters.append(Adapter(own.a, own.b, 0.75 * (-1) ** i / (i % 3 + 1), p / (i + 1), own.seed))
    if ids is None:
        ids = torch.randint(-1, len(ranks), (M,), generator=generator)
    return Mixed(q.x, q.w, q.bias, q.dy, adapters, ids)


@dataclass
class Results:
    """What a call gives: y, and every gradient."""

    y: Tensor
    dx: Tensor | None = None
    dbias: Tensor | None = None
    da: list[Tensor | None] = field(default_factory=list)
    db: list[Tensor | None] = field(default_factory=list)

    def tensors(self) -> list[Tensor | None]:
        """Every result, in one list."""
        return [self.y, self.dx, self.dbias, *self.da, *self.db]


def run(m: Mixed, rows: Rows | None = None, **kwargs: Any) -> Results:
    """Return y and every gradient of a call."""
    x = m.x.detach().requires_grad_()
    bias = None if m.bias is None else m.bias.detach().requires_grad_()
    adapters = [
        None if each is None else each._replace(
            lora_a=each.lora_a.detach().requires_grad_(), lora_b=each.lora_b.detach().requires_grad_())
        for each in m.adapters
    ]  # fmt: skip
    y = lora_linear_multi(x, m.w, adapters, rows or m.rows, bias=bias, **kwargs)
    if y.requires_grad:
        y.backward(m.dy)
    return Results(
        y.detach(),
        x.grad,
        None if bias is None else bias.grad,
        [None if each is None else each.lora_a.grad for each in adapters],
        [None if each is None else each.lora_b.grad for each in adapters],
    )


def served(m: Mixed, **kwargs: Any) -> Tensor:
    """Return y of a call over an `AdapterStack`, without gradients."""
    stack = AdapterStack([None if each is None else each._replace(dropout_p=0.0) for each in m.adapters])
    with torch.no_grad():
        return lora_linear_multi(m.x, m.w, stack, m.rows, bias=m.bias, **kwargs)


def problem_of(m: Mixed, i: int) -> judge.Problem:
    """Return the problem of adapter i over its own rows. Its dropout mask is then drawn at the places of these."""
    own, adapter = m.of(i), m.adapters[i]
    assert adapter is not None
    w = m.w if isinstance(m.w, Tensor) else m.w.dequantize(torch.float32)
    a, b, scale, p, seed, _ = adapter
    return judge.Problem(m.x[own], w, a, b, m.bias, m.dy[own], float(scale), p, seed if p else None)


def check(m: Mixed, got: Results) -> None:
    """Judge every result: each adapter over its own rows, and the rows without one by what the frozen layer gives."""
    own_rows = [m.of(i) for i in range(m.n)]
    for i, adapter in enumerate(m.adapters):
        if adapter is None:
            continue
        if not len(own_rows[i]):
            assert not got.da or (got.da[i] is None and got.db[i] is None), f"adapter {i} has no rows"
            continue
        q = problem_of(m, i)
        plain = None
        if isinstance(m.w, QuantizedWeight):
            plain = judge.evaluate(replace(q, w=m.w.dequantize(q.x.dtype)))
        results: dict[str, Tensor | None] = {"y": got.y[own_rows[i]]}
        if got.dx is not None:
            results["dx"] = got.dx[own_rows[i]]
        if got.da:
            results |= {"da": got.da[i], "db": got.db[i]}
        for verdict in judge.judge({k: v for k, v in results.items() if v is not None}, q, plain=plain):
            assert verdict.fault is None, f"adapter {i}: {verdict.fault}"
    bare = torch.cat([m.of(-1), *(own for own, each in zip(own_rows, m.adapters, strict=True) if each is None)])
    if isinstance(m.w, Tensor):
        assert torch.equal(got.y[bare], F.linear(m.x, m.w, m.bias)[bare])
        if got.dx is not None:
            torch.testing.assert_close(got.dx[bare], (m.dy @ m.w)[bare])
    if got.dbias is not None and m.dy.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(got.dbias, m.dy.sum(0))


def leaves(m: Mixed) -> tuple[Tensor, list[Adapter], list[Tensor]]:
    """Return an x that wants a gradient, such adapters, and all of these tensors."""
    x = m.x.detach().clone().requires_grad_()
    adapters = [
        each._replace(
            lora_a=each.lora_a.detach().clone().requires_grad_(), lora_b=each.lora_b.detach().clone().requires_grad_()
        )
        for each in m.adapters
    ]
    return x, adapters, [x, *(t for each in adapters for t in each[:2])]


def gradients(y: Tensor, wanted: list[Tensor], dy: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(y, wanted, dy, allow_unused=True))


def equal(got: list[Tensor | None], want: list[Tensor | None]) -> bool:
    """Return whether gradients have the same bits; zeros stand for None."""
    pairs = zip(got, want, strict=True)
    return all((u is None or not u.any()) if v is None else u is not None and torch.equal(u, v) for u, v in pairs)
