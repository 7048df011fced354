"""Every reason for which `fuse` leaves a layer or a call to PEFT comes with what the user can do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from support.peft_models import make  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import ways_out  # noqa: E402

FOLDER = Path(lora_kernels.__file__).parent / "peft"
FILES = ("around", "attention", "bnb", "by_row", "conv", "embedding", "experts", "folded", "folds", "fused", "hooked",
         "kinds", "known", "linear", "reading", "several", "vera")  # fmt: skip
NO_REASONS = {"base_note", "_name", "_name_of", "_what_is", "_unfused", "of", "innermost", "_served", "refused"}
"""Functions that return other texts, or a part of a reason."""


def texts(file: str) -> Iterator[str]:
    """Yield the reasons that the functions of a module return, with a word in the place of each value."""
    for function in ast.walk(ast.parse((FOLDER / f"{file}.py").read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name in NO_REASONS:
            continue
        for node in ast.walk(function):
            value = node.value if isinstance(node, ast.Return) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value:
                yield value.value
            elif isinstance(value, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "torch.float32"
                              for part in value.values)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_every_reason_has_a_way_out(file):
    without = [why for why in texts(file) if not ways_out.way_out(why) and not ways_out.says_it_itself(why)]
    assert not without


def test_a_report_says_once_what_can_be_done():
    model = make()
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.weight.requires_grad_(True)
    report = str(lora_kernels.fuse(model))
    assert report.count("what can be done: freeze it with requires_grad_(False)") == 1
    model = make()
    report = lora_kernels.fuse(model)
    assert "what can be done" not in str(report)
    model.base_model.model.up.lora_dropout["default"] = torch.nn.Dropout(1.0)
    model(torch.randn(2, 24))
    assert "what can be done: choose lora_dropout below 1" in str(report)
