"""The experts of one layer: the operands, how a back-end runs them, and what judges the results."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.core.dropout import dropout
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.testing import judge
from lora_kernels.testing.experts import judge_expert
from lora_kernels.tools.verify.many import CASES
from lora_kernels.tools.verify.subject import Operands, Run, Setting, Size

PASSES = ("forward_experts", "backward_experts")
__all__ = ["CASES", "PASSES", "ExpertsOperands", "run_of", "standard"]

_SHARES = (0.6, 0.2, 0.0, 0.1)
"""The part of the rows that each expert has. The last rows have none."""


class ExpertsOperands(Operands):
    """One set of operands of a pass of experts, whose B is stored as PEFT stores it, the expert fastest."""

    def __init__(self, setting: Setting, size: Size, device: torch.device, seed: int) -> None:
        super().__init__(setting, size, device, seed)
        counts, q = [int(share * size.M) for share in _SHARES], self.q
        self.used = sum(counts)
        """The number of rows that have an expert."""
        rest = size.M - self.used
        self.rows = Rows.by_length([*counts, rest], [*range(len(counts)), -1], len(counts)).to(device)
        made = [
            judge.problem(
                0, size.N, size.K, size.R, dtype=setting.dtype, adapter_dtype=setting.adapter_dtype, bias=False,
                seed=seed + e + 1, device=device,
            )
            for e in range(len(counts))
        ]  # fmt: skip
        self.stacks = Base(torch.stack([each.w for each in made]))
        b = torch.stack([each.b for each in made], dim=2).permute(2, 0, 1)
        self.experts = Adapter(torch.stack([each.a for each in made]), b, q.scale, q.p, q.seed)
        x = q.x.float() if q.seed is None else dropout(q.x.float(), q.p, q.seed)
        h, self.problems = q.x.new_zeros(size.M, size.R, dtype=setting.adapter_dtype), list[tuple[int, judge.Problem]]()
        for e, first, last in self.rows.spans():
            w, a = made[e].w, made[e].a
            own = judge.Problem(q.x[first:last], w, a, made[e].b, None, q.dy[first:last], q.scale, q.p, q.seed)
            self.problems.append((first, own))
            h[first:last] = x[first:last] @ a.float().t()
        self.h = h


def run_of(module: ModuleType | Any, op: str) -> Run:
    """Return how a back-end runs a pass."""

    def forward(operands: Operands, out: dict[str, Tensor]) -> None:
        assert isinstance(operands, ExpertsOperands)
        x, rows = operands.q.x, operands.rows
        out["y"], h = module.forward_experts(x, operands.stacks, operands.experts, rows, True)
        out["h"] = h[: operands.used]  # the rest need not be written

    def backward(operands: Operands, out: dict[str, Tensor]) -> None:
        assert isinstance(operands, ExpertsOperands)
        q, needs = operands.q, Needs(True, (True,), (True,))
        out["dx"], out["da"], out["db"] = module.backward_experts(
            q.dy, q.x, operands.stacks, operands.experts, operands.rows, operands.h, needs
        )

    return forward if op == "forward_experts" else backward


class ExpertsStandard(NamedTuple):
    """What the results of a pass are judged by: each expert as a layer over its own rows."""

    operands: ExpertsOperands
    problems: Sequence[tuple[int, judge.Problem]]

    def wrong(self, op: str, got: dict[str, Tensor]) -> str:
        """Return what is wrong with the results of a pass."""
        faults, rows, used = [], self.operands.rows, self.operands.used
        for (e, first, last), (_, q) in zip(rows.spans(), self.problems, strict=True):
            if op == "forward_experts":  # h is judged by the db that it gives
                h = got["h"][first:last]
                mine = {"y": got["y"][first:last], "db": q.scale * (q.dy.double().t() @ h.double())}
            else:
                mine = {"dx": got["dx"][first:last], "da": got["da"][e], "db": got["db"][e]}
            faults += [f"expert {e}: {each.fault}" for each in judge_expert(mine, q, first) if each.fault]
        for name in ("y", "dx"):
            if name in got and got[name][used:].any():
                faults.append(f"{name} of rows without an expert is not zero")
        for e, count in enumerate(rows.counts):
            faults += [
                f"{name} of expert {e} without rows is not zero"
                for name in ("da", "db")
                if not count and name in got and got[name][e].any()
            ]
        return "; ".join(faults)


def standard(operands: ExpertsOperands) -> ExpertsStandard:
    """Return what both passes over some operands are judged by."""
    return ExpertsStandard(operands, operands.problems)
