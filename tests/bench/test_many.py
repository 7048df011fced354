"""The suite `many` of the bench: every method computes the layer, a wrong one gets no number, and targets are those of
the cells."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support import measured_pages

from lora_kernels.__main__ import main
from lora_kernels.bench.many import cells as many_cells
from lora_kernels.bench.many import measure, methods, pool, report
from lora_kernels.bench.many.cells import (
    BASE_ONLY,
    DECODE,
    FLOOR,
    FROZEN,
    LOOP,
    ONE,
    OURS,
    OWN,
    PEFT,
    SWITCHED,
    TRAINING,
    Cell,
    Target,
    batch,
    cells,
)
from lora_kernels.bench.many.judged import Judge
from lora_kernels.testing import timing

SMALL = [
    Cell(DECODE, 8, 4, width=64),
    Cell(DECODE, 8, 1, torch.bfloat16, width=64),
    Cell(DECODE, 32, 8, width=64),
    Cell(BASE_ONLY, 8, 8, width=64),
    Cell(TRAINING, 32, 4, p=0.0, width=64),
    Cell(TRAINING, 32, 4, torch.bfloat16, p=0.1, width=64),
    Cell(TRAINING, 16, 1, p=0.1, width=64),
]


def bench(*words: str) -> int:
    return main(["bench", "--device", "cpu", "--suite", "many", *words])


@pytest.fixture
def small(monkeypatch):
    """A suite of two cells."""
    monkeypatch.setattr(many_cells, "cells", lambda: [SMALL[0], SMALL[4]])
    monkeypatch.setattr(pool, "REGISTERED", 16)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """The document of one run."""
    path = tmp_path_factory.mktemp("many") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many_cells, "cells", lambda: SMALL)
        patch.setattr(pool, "REGISTERED", 16)
        assert bench("--rounds", "2", "--out", str(path)) == 0
    return json.loads(path.read_text())


def methods_of(cell: Cell) -> set[str]:
    return {method.name for method in methods.methods(cell, None)[0]}


def test_the_methods_of_each_kind_of_cell():
    own = {OWN} & methods_of(SMALL[0])  # it needs the native kernels
    assert methods_of(Cell(DECODE, 8, 4)) == {FROZEN, PEFT, SWITCHED, LOOP, FLOOR, OURS} | own
    assert methods_of(Cell(DECODE, 32, 4)) == {FROZEN, PEFT, SWITCHED, LOOP, FLOOR, OURS}
    assert methods_of(Cell(TRAINING, 512, 1)) == {FROZEN, PEFT, SWITCHED, FLOOR, ONE, OURS}
    assert methods_of(Cell(BASE_ONLY, 8, 8)) == {FROZEN, PEFT, OURS}


@pytest.mark.filterwarnings("ignore:no kernel is chosen")
@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_every_method_computes_the_equation(cell):
    judge = Judge(batch(cell))
    faults = [fault for method in methods.methods(cell, None)[0] for fault in judge.faults(method)]
    assert faults == []


@pytest.mark.filterwarnings("ignore:no kernel is chosen")
def test_the_judge_finds_an_adapter_with_the_mask_or_the_rows_of_another():
    q = batch(Cell(TRAINING, 32, 4, p=0.1, width=64))
    judge, ours = Judge(q), next(m for m in methods.methods(q.cell, "eager")[0] if m.name == OURS)
    other_mask = dataclasses.replace(q, seeds=(*q.seeds[:3], torch.tensor(5)))
    judge.q = other_mask
    faults = judge.faults(ours)
    assert faults and {fault.split(":")[0] for fault in faults} == {"adapter 3"}
    q = batch(Cell(DECODE, 8, 4, width=64))
    judge = Judge(q)
    assert q.ids[0] != q.ids[1]
    wrong = dataclasses.replace(
        ours, build=lambda q: methods._multi("eager", dataclasses.replace(q, ids=q.ids.roll(1)))
    )
    assert judge.faults(wrong)


def test_the_judge_finds_a_row_without_an_adapter_that_is_not_the_frozen_layers():
    judge = Judge(batch(Cell(BASE_ONLY, 8, 8, width=64)))
    ours = next(m for m in methods.methods(judge.q.cell, "eager")[0] if m.name == OURS)
    nearly = dataclasses.replace(
        ours, build=lambda q: lambda: methods.Results((q.x.double() @ q.w.double().t()).float())
    )
    assert judge.faults(ours) == []
    assert "differs from F.linear" in judge.faults(nearly)[0]


def test_a_wrong_method_gets_no_number(small, monkeypatch, tmp_path, capsys):
    right, out = methods.lora_linear_multi, tmp_path / "run.json"
    monkeypatch.setattr(methods, "lora_linear_multi", lambda *args, **more: 1.5 * right(*args, **more))
    assert bench("--rounds", "1", "--out", str(out)) == 1
    document = json.loads(out.read_text())
    assert {check["method"] for check in document["gate"] if not check["green"]} == {OURS}
    assert OURS not in {entry["method"] for entry in document["timings"]}
    said = capsys.readouterr().out
    assert "red" in said and "judged wrong, no number" in said


def test_the_document_has_every_cell_and_target(document):
    assert document["suite"] == "many" and "--suite many" in document["command"]
    assert list(document["cells"]) == [cell.name for cell in SMALL]
    for cell in SMALL:
        entries = {e["method"]: e for e in document["timings"] if e["cell"] == cell.name}
        assert entries.keys() == methods_of(cell)
        for entry in entries.values():
            low, middle, high = entry["seconds"]
            assert 0 < low <= middle <= high
        assert entries[FROZEN]["ratio"] == [1.0, 1.0, 1.0]
        held = {target["to"]: target["most"] for target in entries[OURS]["targets"]}
        assert held == {target.to: target.most for target in cell.targets if target.to in entries}
        for target in entries[OURS]["targets"]:
            assert target["met"] == (round(target["value"][1], 2) <= target["most"])
    rows, lease, size = document["calls"]
    assert rows["value"] > 0 and rows["most"] is None
    assert lease["value"] > 0 and lease["most"] == 20.0 and "8 adapters in memory, of 16" in lease["what"]
    assert size["value"] == 80 / 64 and size["most"] == 1.05  # 64 columns are stored with a stride of 80


def test_the_targets_are_those_of_the_tables():
    assert len(cells()) == len({cell.name for cell in cells()})
    assert Cell(DECODE, 8, 4).targets[0] == Target(OWN, 0.12, over=True)
    assert Cell(DECODE, 32, 8).targets[0] == Target(FROZEN, 1.15)
    assert Cell(TRAINING, 512, 32, p=0.1).targets[0] == Target(FROZEN, 1.23)
    assert Cell(BASE_ONLY, 8, 8).targets == [Target(FROZEN, 1.01)]
    assert Target(ONE, 1.02) in Cell(DECODE, 64, 1).targets and Target(ONE, 1.02) not in Cell(DECODE, 64, 4).targets
    fp32 = [cell for cell in cells() if cell.dtype == torch.float32 and cell.kind != BASE_ONLY]
    with_target = [cell for cell in fp32 if cell.targets[0].to in (FROZEN, OWN)]
    assert {cell.n for cell in fp32 if cell not in with_target} == {1}, (
        "training of one adapter is held against lora_linear"
    )
    assert all(
        {Target(PEFT, 0.90), Target(FLOOR, 1.00)} <= set(cell.targets) for cell in cells() if cell.kind != BASE_ONLY
    )


def test_a_target_is_held_within_rounds():
    samples = [
        {FROZEN: [1.0, 1.0], OWN: [0.5], OURS: [0.6], PEFT: [1.2]},
        {FROZEN: [10.0, 10.0], OWN: [5.0], OURS: [6.0], PEFT: [12.0]},
    ]
    taken = timing.Rounds(FROZEN, samples, {})
    beyond = measure._held_to(Target(OWN, 0.10, over=True), taken)
    assert beyond["value"] == pytest.approx((0.1, 0.1, 0.1)) and beyond["met"]
    assert measure._held_to(Target(PEFT, 0.49), taken) == {
        "to": PEFT, "most": 0.49, "over": False, "value": pytest.approx((0.5, 0.5, 0.5)), "met": False,
    }  # fmt: skip


def test_the_tables_show_times_and_targets(document):
    tables = {title.partition("; ")[0]: (header, rows) for title, header, rows in report.tables(document)}
    entries = {(e["cell"], e["method"]): e for e in document["timings"]}
    header, (_, row) = tables["Decoding: a forward, rows of all adapters in random order · fp32, 64→64"]
    ours = entries[SMALL[2].name, OURS]
    assert header[:2] == ["rows, adapters", FROZEN] and row[0] == "32, 8"
    assert row[header.index("ours")] == f"×{ours['ratio'][1]:.2f}"
    verdicts = {target["to"]: "met" if target["met"] else "missed" for target in ours["targets"]}
    assert row[header.index("target")] == f"≤ 1.15 {verdicts[FROZEN]}"
    assert row[header.index("of PEFT ≤ 0.90")].split()[1] == verdicts[PEFT]
    header, (row,) = tables["Training: forward + backward, adapters × rows of each · bf16, 64→64"]
    assert row[0] == "4×8 p=0.1" and "of single ≤ 1.02" not in header and row[header.index("target")] == ""
    _, (_, lease, size) = tables["Beside the layers"]
    assert lease[2] == "≤ 20 µs" and size[1:] == ["1.25 ×", "≤ 1.05 ×", "missed"]


def test_a_whole_run_is_written_and_drawn_unasked(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_kernels.bench.options.ROUNDS", 1)
    assert bench("--plot") == 0
    found = sorted(path.suffix for path in (tmp_path / "benchmarks" / "results" / "many").iterdir())
    assert found == [".json", ".png"]
    assert bench("--rounds", "1") == 0
    assert "A partial run: not written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "tiny"], "one of them"),
        (["--seconds", "5", "--stuck", "9"], "does not take --seconds, --stuck"),
        (["--plot", "--rounds", "2"], "--out"),
    ],
)
def test_options_that_the_suite_does_not_have_are_refused(words, said, capsys):
    assert bench(*words) == 2
    assert said in capsys.readouterr().out


def test_the_pages_show_the_document(document, tmp_path):
    root = measured_pages.checkout(tmp_path)
    wide = json.loads(json.dumps(document))
    measured_pages.put(root, "many/a.json", wide, png=True)
    text = measured_pages.page_of_measurements(root)
    ratios = {e["method"]: e["ratio"][1] for e in document["timings"] if e["cell"] == SMALL[2].name}
    assert "(../benchmarks/results/many/a.json)" in text and "](../benchmarks/results/many/a.png)" in text
    assert f"**×{ratios[OURS]:.2f}**" in text
    row = next(line for line in (root / "README.md").read_text().splitlines() if "32 rows with 8 adapters" in line)
    assert f"| **×{ratios[OURS]:.2f}** | ×{ratios[PEFT]:.2f} |" in row
