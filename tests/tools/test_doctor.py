"""The doctor reports what is installed, what is missing and how to get it, and nothing personal such as paths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

import lora_kernels
from lora_kernels.__main__ import main
from lora_kernels.backends import dispatch
from lora_kernels.tools import doctor


def test_the_report_agrees_with_explain_and_holds_no_paths(capsys):
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert [entry["name"] for entry in report["backends"]] == list(dispatch.BACKENDS)
    for entry in report["backends"]:
        assert entry["ready"] == bool(entry["serves"]) and entry["ready"] == (not entry["reasons"])
    automatic = [entry["name"] for entry in report["backends"] if "cpu" in entry["automatic"]]
    operands = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(4, 2)
    assert automatic == [lora_kernels.explain(*operands).forward]
    assert str(Path.home()) + "/" not in text and str(ROOT) not in text


def test_the_tables_name_versions_and_backends(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "versions" in text and "eager" in text and "the automatic choice" in text
    if not torch.cuda.is_available():
        assert "not ready" in text and "how to get it" in text


def test_a_machine_that_no_backend_serves_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(
        dispatch, "refusals", lambda name, call: [f"{name} is broken: /home/someone/lib/thing.so is missing"]
    )
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "broken: thing.so is missing" in text and "/home" not in text


def test_missing_extensions_are_reported_with_a_way_to_get_them(monkeypatch, capsys):
    for name in ("_C", "_cuda"):
        monkeypatch.setitem(sys.modules, f"lora_kernels.{name}", None)
    report = doctor.examine()
    assert not report["native"]["built"] and not report["cuda"]["built"]
    told = {entry["what"]: entry["how"] for entry in report["missing"]}
    assert "g++" in told["CPU kernels"] and "LORA_KERNELS_CUDA=1" in told["CUDA kernels"]
    main(["doctor"])
    assert "not built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/usr/lib/x86_64/libgomp.so.1: cannot open", "libgomp.so.1: cannot open"),
        ("see https://pytorch.org/get-started/locally", "see https://pytorch.org/get-started/locally"),
        ("no module named 'triton'", "no module named 'triton'"),
    ],
)
def test_absolute_paths_are_cut(text, left):
    assert doctor._without_paths(text) == left
