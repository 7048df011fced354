"""How `verify` judges the kernels of many adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.backends import eager
from lora_kernels.tools.verify import judging, many
from lora_kernels.tools.verify.subject import Setting, Size

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
SIZE = Size(90, 48, 40, 20)


def _fault(backend: Any, op: str, setting: Setting, size: Size = SIZE) -> str:
    operands = many.ManyOperands(setting, size, CPU, 0)
    failed = judging.fault(op, many.run_of(backend, op), operands, many.standard(operands), lambda what, limit: None)
    return failed.why if failed else ""


@pytest.mark.parametrize("op", many.PASSES)
@pytest.mark.parametrize(
    "setting", [Setting(BF16, BF16, 0.1), Setting(BF16, FP32, 0.0), Setting(BF16, BF16, 0.0, "nf4")], ids=str
)
def test_right_results_of_many_adapters_pass(op: str, setting: Setting) -> None:
    assert _fault(eager, op, setting) == ""


@pytest.mark.parametrize("which", ["y", "a row without an adapter", "h", "dx", "da", "db"])
def test_a_wrong_result_names_its_adapter(which: str) -> None:
    def forward_multi(x, base, adapters, rows, save_h) -> Any:
        y, h = eager.forward_multi(x, base, adapters, rows, save_h)
        if which == "y":
            y[rows.index(3)[0], 5] += 4
        elif which == "h":
            h[-1] += 4
        elif which != "dx":
            y[rows.order[-1], 5] *= 1.01
        return y, h

    def backward_multi(dy, x, base, adapters, rows, h, needs) -> Any:
        dx, das, dbs = eager.backward_multi(dy, x, base, adapters, rows, h, needs)
        for name, t in (("dx", dx[rows.index(3)[0]]), ("da", das[3]), ("db", dbs[3])):
            t.flatten()[5] += 4 * (name == which)
        return dx, das, dbs

    backend = SimpleNamespace(forward_multi=forward_multi, backward_multi=backward_multi)
    op = "backward_multi" if which[0] == "d" else "forward_multi"
    why = _fault(backend, op, Setting(BF16, BF16, 0.0))
    assert why.startswith("rows without an adapter" if which[0] == "a" else "adapter 3"), why
