"""How `verify` and the check at the first use judge the kernels of experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.backends import eager, first_use
from lora_kernels.core.operands import Call
from lora_kernels.evidence.file import RIGHT, WRONG
from lora_kernels.tools.verify import experts, judging
from lora_kernels.tools.verify.subject import Setting, Size

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32


def _fault(backend: Any, op: str, setting: Setting) -> str:
    operands = experts.ExpertsOperands(setting, Size(90, 48, 40, 20), CPU, 0)
    run, by = experts.run_of(backend, op), experts.standard(operands)
    failed = judging.fault(op, run, operands, by, lambda what, limit: None)
    return failed.why if failed else ""


def _spoilt(which: str) -> Any:
    """Return a back-end one of whose results is wrong."""

    def forward_experts(x, base, adapter, rows, save_h) -> Any:
        y, h = eager.forward_experts(x, base, adapter, rows, save_h)
        first = rows.spans()[-1][1]
        if which == "y":
            y[first, 5] += 4
        elif which == "h":
            h[first, 1] += 4
        elif which == "rest":
            y[-1, 5] = 1
        return y, h

    def backward_experts(*args: Any) -> Any:
        dx, da, db = eager.backward_experts(*args)
        rows = args[4]
        for name, t in (("dx", dx[rows.spans()[-1][1]]), ("da", da[3]), ("db", db[3])):
            t.view(-1)[5] += 4 * (name == which)
        return dx, da, db

    return SimpleNamespace(
        name="spoilt", kernel_class=lambda call: "any", forward_experts=forward_experts,
        backward_experts=backward_experts,
    )  # fmt: skip


@pytest.mark.parametrize("op", experts.PASSES)
@pytest.mark.parametrize("setting", [Setting(BF16, BF16, 0.1), Setting(BF16, FP32, 0.0)], ids=str)
def test_right_results_of_experts_pass(op: str, setting: Setting) -> None:
    assert _fault(eager, op, setting) == ""


@pytest.mark.parametrize("which", ["y", "rest", "h", "dx", "da", "db"])
def test_a_wrong_result_names_its_expert(which: str) -> None:
    op = "backward_experts" if which[0] == "d" else "forward_experts"
    why = _fault(_spoilt(which), op, Setting(BF16, BF16, 0.0))
    assert why.startswith("y of rows without" if which == "rest" else "expert 3"), why


@pytest.mark.parametrize("which", ["", "y", "h", "da"])
def test_the_check_at_the_first_use_finds_what_is_wrong(which: str) -> None:
    for op in experts.PASSES:
        call = Call(op, CPU, BF16, FP32, 64, 48, 40, 8, True)
        found = first_use._check(_spoilt(which), call)
        seen = {"": (), "y": experts.PASSES[:1], "h": experts.PASSES}.get(which, experts.PASSES[1:])
        assert found.result == (WRONG if op in seen else RIGHT), (op, found)
