"""Many adapters over the rows of one x: the operands, how a back-end runs them, and what judges the results."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core.dropout import dropout
from lora_kernels.core.operands import Adapter, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.testing import judge
from lora_kernels.tools.verify.subject import Operands, Run, Setting, Size

PASSES = ("forward_multi", "backward_multi")
CASES: tuple[tuple[Size, float], ...] = (
    (Size(1500, 136, 264, 40), 0.1),
    (Size(70, 1024, 1024, 16), 0.1),
    (Size(1500, 136, 264, 40), 0.0),
    (Size(70, 1024, 1024, 16), 0.0),
)
"""Sizes, where R is the largest rank, and dropout probabilities. The adapter that has most of 1500 rows takes several
parts of its gradients."""
_SHARES = (0.6, 0.2, 0.0, 0.1)
"""The part of the rows that each adapter has. The rest has none."""


class ManyOperands(Operands):
    """One set of operands of a pass of many adapters, whose rows lie in no order."""

    def __init__(self, setting: Setting, size: Size, device: torch.device, seed: int) -> None:
        super().__init__(setting, size, device, seed)
        counts = [int(share * size.M) for share in _SHARES]
        mixed = torch.randperm(size.M, generator=torch.Generator().manual_seed(seed)).to(device)
        self.own = [each.sort().values for each in mixed.split([*counts, size.M - sum(counts)])]
        """The rows of each adapter, and of none."""
        ids = torch.full((size.M,), -1, device=device)
        self.problems: list[judge.Problem] = []
        """Each adapter as a layer over its own rows."""
        for i, R in enumerate((size.R, 3, size.R, max(8, size.R // 2))):
            ids[self.own[i]] = i
            q = judge.problem(
                0, size.N, size.K, R, dtype=setting.dtype, adapter_dtype=setting.adapter_dtype, p=setting.p, bias=False,
                seed=seed + i + 1, device=device,
            )  # fmt: skip
            x, dy = self.q.x[self.own[i]], self.q.dy[self.own[i]]
            self.problems.append(judge.Problem(x, self.q.w, q.a, q.b, None, dy, 0.5 + i, q.p, q.seed))
        self.rows = Rows.by_id(ids, len(self.problems))

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters."""
        return [q.adapter for q in self.problems]

    @property
    def flat_h(self) -> Tensor:
        """The h of every adapter, as a forward saves them for the backward."""
        xs = [q.x.float() if q.seed is None else dropout(q.x.float(), q.p, q.seed) for q in self.problems]
        return _flat([(x @ q.a.float().t()).to(q.a.dtype) for x, q in zip(xs, self.problems, strict=True)])


def run_of(module: ModuleType | Any, op: str) -> Run:
    """Return how a back-end runs a pass. The gradients of all adapters follow each other in one tensor."""

    def forward(operands: Operands, out: dict[str, Tensor]) -> None:
        assert isinstance(operands, ManyOperands)
        size = sum(q.x.shape[0] * q.a.shape[0] for q in operands.problems)
        out["y"], h = module.forward_multi(operands.q.x, operands.base, operands.adapters, operands.rows, True)
        out["h"] = h[:size]  # it may be longer

    def backward(operands: Operands, out: dict[str, Tensor]) -> None:
        assert isinstance(operands, ManyOperands)
        every = (True,) * len(operands.problems)
        h, rows, needs = operands.flat_h, operands.rows, Needs(True, every, every)
        q, adapters = operands.q, operands.adapters
        out["dx"], das, dbs = module.backward_multi(q.dy, q.x, operands.base, adapters, rows, h, needs)
        out["da"] = _flat(
            [torch.zeros_like(own.a) if da is None else da for own, da in zip(adapters, das, strict=True)]
        )
        out["db"] = _flat(
            [torch.zeros_like(own.b) if db is None else db for own, db in zip(adapters, dbs, strict=True)]
        )

    return forward if op == "forward_multi" else backward


class ManyStandard(NamedTuple):
    """What the results of a pass are judged by: each adapter as a layer, and the rows without one as the frozen
    layer."""

    operands: ManyOperands
    layers: Sequence[tuple[judge.Problem, dict[str, Tensor], dict[str, Tensor]]]

    def wrong(self, op: str, got: dict[str, Tensor]) -> str:
        """Return what is wrong with the results of a pass."""
        faults, qs = [], self.operands.problems
        parts = {
            "h": [q.x.shape[0] * q.a.shape[0] for q in qs],
            "da": [q.a.numel() for q in qs],
            "db": [q.b.numel() for q in qs],
        }
        split = {name: got[name].split(sizes) for name, sizes in parts.items() if name in got}
        for i, (own, (q, want, plain)) in enumerate(zip(self.operands.own, self.layers, strict=False)):
            if op == "forward_multi":  # h is judged by the db that it gives
                h = split["h"][i].view(-1, q.a.shape[0])
                mine = {"y": got["y"][own], "db": q.scale * (q.dy.double().t() @ h.double())}
            else:
                mine = {"dx": got["dx"][own], "da": split["da"][i].view_as(q.a), "db": split["db"][i].view_as(q.b)}
            faults += [f"adapter {i}: {each.fault}" for each in judge.judge(mine, q, want, plain) if each.fault]
        nobody, w = self.operands.own[-1], self.operands.w
        if "y" in got and isinstance(w, Tensor):
            frozen = F.linear(self.operands.q.x, w, self.operands.q.bias)
            if not torch.equal(got["y"][nobody], frozen[nobody]):
                faults.append("rows without an adapter differ from the frozen layer's")
        return "; ".join(faults)


def standard(operands: ManyOperands) -> ManyStandard:
    """Return what both passes over some operands are judged by."""
    layers = []
    for q in operands.problems:
        whole, plain = (q, judge.evaluate(q)) if isinstance(operands.w, Tensor) else judge.over_codes(q, operands.w)
        layers.append((whole, judge.truth(whole), plain))
    return ManyStandard(operands, layers)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
