"""The judge of the suite `many`: whether what a method computes is the equation, adapter by adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import reference
from lora_kernels.bench import peers
from lora_kernels.bench.many.cells import BASE_ONLY, FROZEN, OURS, Batch
from lora_kernels.bench.many.methods import Method, Results, Rowwise
from lora_kernels.testing.judge import Problem, evaluate, judge
from lora_kernels.testing.watch import first_line


@dataclass
class Judge:
    """Judges one method after the other on one batch. The truth is computed once, from each adapter's rows alone."""

    q: Batch
    problems: list[Problem] = field(init=False)
    want: list[dict[str, Tensor]] = field(init=False)
    plain: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        """Compute the equation in fp64, and in plain torch."""
        q, w = self.q, self.q.w.double()
        alone = [] if q.cell.kind == BASE_ONLY else [q.problem(i) for i in range(q.cell.n)]
        self.problems = [replace(each, w=w) for each in alone]  # fp64 does not change its values
        self.want = [_equation(each.to(torch.float64), q.cell.training) for each in self.problems]
        self.plain = [_equation(each, q.cell.training) for each in alone]

    def faults(self, method: Method) -> list[str]:
        """Return everything that is wrong with the results of a method, or the exception that it raised.

        Our method is held to the rule of `judge`. The others must compute the same function up to rounding; those that
        draw dropout masks of their own then only have to run. Where no row has an adapter, ours must give the bits of
        F.linear.
        """
        q = self.q
        try:
            got = method.build(q)()
        except Exception as error:  # a method may fail in any way, and each way is a fault
            return [f"{type(error).__name__}: {first_line(error)}"]
        if method.name == FROZEN:
            return []
        if q.cell.kind == BASE_ONLY or not method.whole:
            return _beside_frozen(q, got.y, exactly=method.name == OURS)
        if method.own_masks and q.cell.p:
            return []
        return [fault for i in range(q.cell.n) for fault in self._faults_of(i, _of_adapter(q, got, i), method)]

    def _faults_of(self, i: int, got: dict[str, Tensor | None], method: Method) -> list[str]:
        missing = [f"{name} is missing" for name, value in got.items() if value is None]
        there = {name: value.detach() for name, value in got.items() if value is not None}
        if method.name == OURS:
            verdicts = judge(there, self.problems[i], self.want[i], self.plain[i])
            found = [verdict.fault for verdict in verdicts if verdict.fault is not None]
        else:
            found = peers.faults(there, self.want[i])
        return [f"adapter {i}: {fault}" for fault in (*missing, *found)]


def _equation(q: Problem, training: bool) -> dict[str, Tensor]:
    """Return y, and in training every gradient, from the reference in the dtypes of `q`."""
    if training:
        return evaluate(q)
    with torch.no_grad():
        y = reference.lora_linear(q.x, q.w, q.a, q.b, scale=q.scale, dropout_p=q.p, seed=q.seed)
    return {"y": y}


def _of_adapter(q: Batch, got: Results, i: int) -> dict[str, Tensor | None]:
    """Return what belongs to adapter i: y, and in training dx, da and db."""
    found: dict[str, Tensor | None] = {"y": _rows(q, got.y, i)}
    if q.cell.training:
        found |= {"dx": _rows(q, got.dx, i), "da": got.da[i], "db": got.db[i]}
    return found


def _rows(q: Batch, value: Rowwise | None, i: int) -> Tensor:
    assert value is not None
    return value[i] if isinstance(value, list) else value[q.numbers[i]]


def _beside_frozen(q: Batch, y: Rowwise, exactly: bool) -> list[str]:
    """Return why y is not x Wᵀ: not its bits with `exactly`, else not up to rounding."""
    assert isinstance(y, Tensor)
    want = F.linear(q.x, q.w)
    if exactly:
        return [] if torch.equal(y, want) else ["y differs from F.linear in a row without an adapter"]
    return peers.faults({"y": y}, {"y": want.double()})
