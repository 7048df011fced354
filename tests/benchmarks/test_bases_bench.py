"""The benchmark of other packages' bases: each base that is installed has its numbers, and a wrong layer gets none."""

from __future__ import annotations

import json

import pytest
from support.silent import Silent

from benchmarks import bases

pytestmark = pytest.mark.slow


@pytest.fixture
def one_base(monkeypatch):
    pytest.importorskip("peft", reason="PEFT is not installed")
    pytest.importorskip("hqq", reason="hqq is not installed")
    monkeypatch.setattr(bases, "BASES", {name: bases.BASES[name] for name in ("HQQ, 4 bits",)})


def test_every_row_has_its_numbers(one_base):
    show = Silent()
    document = bases.measure((64, 64, 4), (bases.DECODE, 32), 2, show)
    assert show.left == 0 and json.loads(json.dumps(document))["size"] == {"N": 64, "K": 64, "R": 4}
    assert [(row["base"], row["dtype"], row["M"]) for row in document["rows"]] == [
        ("HQQ, 4 bits", short, M) for short in ("fp32", "bf16") for M in (1, 32)
    ]
    for row in document["rows"]:
        assert all(0 < low <= middle <= high for low, middle, high in [*row["seconds"].values(), row["over"]])
    assert document["gate"] and not any(entry["faults"] for entry in document["gate"])
    assert len(bases.table(document)[2]) == 4


def test_a_wrong_layer_gets_no_numbers(one_base, monkeypatch):
    monkeypatch.setattr(bases, "_fault", lambda models, x: "over the codes differs from PEFT by 1 of its norm")
    document = bases.measure((64, 64, 4), (bases.DECODE,), 1, Silent())
    assert document["rows"] == [] and all(entry["faults"] for entry in document["gate"])


def test_the_page_shows_the_newest_run():
    assert bases.rendered(page := bases.PAGE.read_text(encoding="utf-8"), bases.newest()) == page
