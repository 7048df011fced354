"""The benchmark of quantised layers: it has every number, a wrong kernel gets none, and the documentation shows it."""

from __future__ import annotations

import importlib.util
import json

import pytest
from support import measured_pages
from support.silent import Silent

from benchmarks import quantised, quantised_memory

SIZE = (96, 128, 8)
HAVE_PEER = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "peft"))


@pytest.fixture(scope="module")
def document():
    """The document of one run. Its measurement of memory is faked; tests/backends/cpu/test_cpu_quant.py tests the real
    one."""
    show = Silent()
    with pytest.MonkeyPatch.context() as patch:
        peaks = {"float32": 2.5, "bfloat16": 1.5}
        patch.setattr(
            quantised_memory, "measure", lambda dtype, *sizes: peaks[dtype] if sizes == (160, 96, 128) else 99
        )
        document = quantised.measure(SIZE, (quantised.DECODE, 160), 2, show)
    assert show.left == 0
    return document


def test_every_row_has_its_numbers(document):
    assert json.loads(json.dumps(document))["size"] == {"N": 96, "K": 128, "R": 8}
    assert document["gate"] and not any(entry["faults"] for entry in document["gate"])
    names = {row["name"] for row in document["rows"]}
    assert {
        f"{name} {short}" for name in ("F.linear", "dense", *quantised.FORMATS) for short in ("fp32", "bf16")
    } <= names
    for row in document["rows"]:
        low, middle, high = row["seconds"]
        assert 0 < low <= middle <= high and set(row["targets"]) <= set(row["ratios"])
        assert row["ratios"] or (row["name"] == "F.linear fp32" and not HAVE_PEER), "the others are compared with it"
    assert [(entry["name"], entry["mb"]) for entry in document["memory"]] == [("nf4 fp32", 2.5), ("nf4 bf16", 1.5)]
    assert all(entry["most"] == 16 for entry in document["memory"])
    titles = [title for title, *_ in quantised.tables(document)]
    assert titles == ["decoding: forward, M = 1, 128→96, r8", "training: forward + backward, M = 160, 128→96, r8"]


def test_a_wrong_kernel_gets_no_number(monkeypatch):
    inner = quantised.lora_linear
    monkeypatch.setattr(quantised_memory, "measure", lambda *case: 0.0)
    monkeypatch.setattr(quantised, "lora_linear", lambda x, w, a, b, **more: inner(x, w, a, b, **more) * 1.01)
    red = quantised.measure(SIZE, (160,), 1, Silent())
    assert all(any("y:" in fault for fault in entry["faults"]) for entry in red["gate"]) and not red["rows"]


def test_a_target_is_met_or_missed():
    row = {"ratios": {"F.linear fp32": (0.2, 0.224, 0.3)}, "targets": {"F.linear fp32": 0.22}}
    assert quantised.met_or_missed(row) == "≤ 0.22 of F.linear fp32 met"
    row["ratios"]["F.linear fp32"] = (0.2, 0.226, 0.3)
    assert quantised.met_or_missed(row) == "≤ 0.22 of F.linear fp32 missed"


def test_the_page_of_measurements_shows_the_document(document, tmp_path):
    root = measured_pages.checkout(tmp_path)
    measured_pages.put(root, "quantised/a.json", document)
    text = measured_pages.page_of_measurements(root)
    assert "(nf4 bf16, M = 160; ≤ 16" in text
    assert "**nf4 fp32**" in text and "(../benchmarks/results/quantised/a.json)" in text
