"""The roofline's floors, the suites, timing in a CUDA graph, and their tables and pictures."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from support import llama_run

from lora_kernels.__main__ import main
from lora_kernels.bench import overhead, plot, report, report_suite, roofline
from lora_kernels.bench.shapes import BACKWARD, FORWARD, GRAPH, NAMED, SUITES, Cell, Shape
from lora_kernels.testing import timing

RATES = {"gemm": {"bf16": 1e12, "fp32": 1e11}, "copy": 1e9}


def test_floors_follow_the_cost_model():
    shape = Shape("s", 100, 200, 300, 10, dtype=torch.bfloat16)
    M, K, N, R = 100, 200, 300, 10
    fast_copy, fast_gemm = RATES | {"copy": 1e15}, RATES | {"gemm": {"bf16": 1e18}}
    flops = 2 * M * K * N + 2 * M * R * (K + N)
    assert roofline.floor(Cell(shape, 0.0, FORWARD), fast_copy) == (pytest.approx(flops / 1e12), "FLOPs")
    both = flops + 2 * M * K * N + 4 * M * R * (K + N)
    assert roofline.floor(Cell(shape, 0.0, BACKWARD), fast_copy) == (pytest.approx(both / 1e12), "FLOPs")
    count = 2 * (M * K + M * N + K * N)
    assert roofline.floor(Cell(shape, 0.0, FORWARD), fast_gemm) == (pytest.approx(count / 1e9), "bytes")
    count += 2 * (2 * M * K + 2 * M * N + K * N)
    assert roofline.floor(Cell(shape, 0.0, BACKWARD), fast_gemm) == (pytest.approx(count / 1e9), "bytes")
    frozen = roofline.floor(Cell(shape, 0.0, BACKWARD), fast_copy, frozen=True)
    assert frozen.seconds == pytest.approx(4 * M * K * N / 1e12)
    assert roofline.floor(Cell(shape, 0.0, GRAPH), RATES) == roofline.floor(Cell(shape, 0.0, FORWARD), RATES)


def test_rates_come_from_the_measured_times(monkeypatch):
    class Clock:
        def sample(self, steps, repeats):
            steps[0]()
            return 0.5

    monkeypatch.setattr(roofline, "timer_for", lambda device: Clock())
    rates = roofline.measure_rates(torch.device("cpu"), [torch.float32, torch.float32, torch.bfloat16])
    assert rates == {"gemm": {"fp32": 2 * 1024**3 / 0.5, "bf16": 2 * 1024**3 / 0.5}, "copy": 2 * 2**25 / 0.5}


def test_the_llama_suite_has_the_projections_of_llama():
    shapes = [shape for shape in SUITES["llama"]["cuda"] if shape.training]
    assert len(shapes) == 48 and {(s.M, s.R) for s in shapes} == {(M, R) for M in (2048, 8192, 16384) for R in (16, 64)}
    assert {(s.K, s.N) for s in shapes} == {
        *((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
        *((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    }
    assert {s.cells[2].p for s in shapes} == {0.05} and {s.dtype for s in shapes} == {torch.bfloat16}
    assert {s.M for s in SUITES["llama"]["cuda"] if not s.training} == {1, 16}
    assert sum(s.compiled for s in shapes) == 1
    assert len({s.name for suite in SUITES.values() for shapes in suite.values() for s in shapes} - NAMED.keys()) == 0


def test_the_llama_tables_have_means_and_verdicts():
    """Each target is met at 2 % below it and missed at 2 % above it, for its subject only."""
    factors = {"F.linear": 1.0, "PEFT": 1.8, "PEFT, fp32 adapters": 2.0, "addmm_": 1.2}
    document = llama_run.document(factors | {"ours: composite": 1.13, "ours: cuda": 1.04})
    tables = {
        title.partition(", ")[2]: {row[0]: row[1:] for row in rows} for title, _, rows in report_suite.tables(document)
    }
    fastest, composite, cuda = (tables[each] for each in (report_suite.FASTEST, report_suite.COMPOSITE, "ours: cuda"))
    forward, both, dropped = (row for row in composite if "over F.linear" in row)
    assert composite[forward] == ["×1.13", "24/24", "≤ 1.15", "met"] * 2
    assert composite[both] == ["×1.13", "24/24", "≤ 1.18", "met"] * 2
    assert composite[dropped][2:4] == ["≤ 1.20", "met"] and fastest[dropped][2:4] == ["", ""]
    assert fastest[forward] == ["×1.04", "24/24", "≤ 1.05", "met", "×1.04", "24/24", "≤ 1.08", "met"]
    assert fastest[both][2::4] == ["≤ 1.10", "≤ 1.15"] and cuda[forward][2] == ""
    peft = composite["PEFT (fp32 adapters, p=0.05) over ours, fwd + bwd"]
    assert peft[:4] == ["×1.77", "24/24", "≥ 1.40", "met"]
    assert composite["LoRAFusion over ours, fwd + bwd, p=0.05"][:4] == ["-", "0/24", "≥ 1.05", ""]
    slow = llama_run.document(factors | {"ours: composite": 1.23})
    rows = {row[0]: row[1:] for row in report_suite.mean_rows(slow, report_suite.COMPOSITE)}
    assert [rows[name][3] for name in (forward, both, dropped)] == ["missed"] * 3
    assert list(report_suite.tables(document | {"suite": None})) == []


def test_one_cell_that_loses_to_addmm_is_counted():
    document = llama_run.document({"F.linear": 1.0, "addmm_": 1.2, "ours: composite": 1.1})
    name = "cells that take less time than addmm_"

    def row():
        return {row[0]: row[1:] for row in report_suite.mean_rows(document, report_suite.COMPOSITE)}[name]

    assert row() == ["96/96", "", "all", "met"] * 2
    entry = next(e for e in document["timings"] if e["shape"].endswith("-r64") and e["variant"] == "ours: composite")
    entry["seconds"][1] *= 1.2
    assert row() == ["96/96", "", "all", "met", "95/96", "", "all", "missed"]


def test_peak_memory_is_held_against_peft_without_its_copy_of_x():
    document = llama_run.document({"F.linear": 1.0, "PEFT": 1.5, "ours: composite": 1.1})
    names = [name for name in document["shapes"] if name.startswith("llama-")]
    for name in names:
        size = document["shapes"][name]
        x = 2 * size["M"] * size["K"]
        for p, variant, peak in ((0.0, "PEFT", 9 * x), (0.05, "PEFT", 10 * x), (0.0, "ours: composite", 9 * x)):
            document["memory"].append({"shape": name, "p": p, "variant": variant, "peak_bytes": peak})
        more = 0 if name.endswith("r16") else 1
        document["memory"].append({"shape": name, "p": 0.05, "variant": "ours: composite", "peak_bytes": 9 * x + more})
    last = report_suite.mean_rows(document, report_suite.COMPOSITE)[-1]
    assert "peak memory" in last[0] and last[1:] == ["48/48", "", "all", "met", "24/48", "", "all", "missed"]


def test_the_fastest_has_the_target_of_decoding():
    document = llama_run.document({"F.linear": 1.0, "ours: composite": 1.4, "ours: triton": 1.11, "ours: cuda": 1.09})
    rows = report_suite.decode_rows(document)
    assert [row[1:] for row in rows[:3]] == [
        ["ours: composite", "×1.40", "", ""],
        ["ours: triton", "×1.11", "", ""],
        ["ours: cuda", "×1.09", "≤ 1.10", "met"],
    ]
    assert len(rows) == 6


class FakeGraph:
    log: ClassVar[list[str]] = []

    def replay(self):
        self.log.append("replay")


class FakeEvent:
    def __init__(self, enable_timing):
        pass

    def record(self):
        FakeGraph.log.append("record")

    synchronize = record

    def elapsed_time(self, other):
        return 640.0  # ms


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stand-ins for the parts of torch.cuda that a graph needs. They record their calls in a log."""
    from contextlib import contextmanager

    @contextmanager
    def inside(name, *args):
        FakeGraph.log.append(f"{name} begins")
        yield
        FakeGraph.log.append(f"{name} ends")

    class Stream:
        def wait_stream(self, other):
            pass

    FakeGraph.log = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside("warm-up"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: inside("capture"))
    return FakeGraph.log


def test_a_graph_holds_many_calls_and_is_captured_once(fake_cuda):
    calls = []
    steps = [lambda i=i: calls.append(i) for i in range(3)]
    timer = timing.GraphTimer()
    seconds = timer.sample(steps, 50)
    held = math.ceil(timing.GraphTimer.CALLS / 3) * 3
    assert calls[6:] == [i % 3 for i in range(held)], "each step is called twice to warm up, then all steps in turn"
    assert fake_cuda.index("warm-up ends") < fake_cuda.index("capture begins")
    assert fake_cuda.count("replay") == math.ceil(50 / held)
    assert seconds == pytest.approx(0.64 / math.ceil(50 / held) / held)
    timer.sample(steps, 1)
    assert fake_cuda.count("capture begins") == 1 and fake_cuda.count("replay") == math.ceil(50 / held) + 1


def test_a_sweep_is_measured_and_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    small = tuple(Shape(f"small-{M}", M, 32, 32, 4, training=M > 8, dropout=0.0, bias=False) for M in (4, 16, 32))
    monkeypatch.setitem(SUITES, "sweep-m", {"cpu": small})
    monkeypatch.setattr(overhead, "_CALLS", 10)
    monkeypatch.setattr(overhead, "measure_layers", lambda device, rounds: [])
    monkeypatch.setattr(overhead, "measure_import", lambda times: overhead.ImportCost(1.0, False))
    out = tmp_path / "sweep.json"
    words = ["bench", "--device", "cpu", "--suite", "sweep-m", "--rounds", "2", "--out", str(out), "--plot"]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep-roofline.png", "sweep.json", "sweep.png"]
    text = capsys.readouterr().out
    assert "Roofline, measured now" in text and "roofline" in text and "%" in text
    assert "sweep-roofline.png" in text
    assert main([*words, "--seconds", "0.000001"]) == 1, "a run that measured nothing does not succeed"
    assert "Not measured, 1e-06 s being spent: small-4, small-16, small-32" in capsys.readouterr().out


def test_pictures_need_shapes_that_differ_in_one_thing():
    def document(*sizes):
        keys = ("M", "N", "K", "R", "dtype", "adapter_dtype")
        shapes = {str(i): dict(zip(keys, (*size, "bf16", "bf16"), strict=True)) for i, size in enumerate(sizes)}
        return {"shapes": shapes, "roofline": RATES}

    three = document((1, 8, 8, 2), (2, 8, 8, 2), (4, 8, 8, 2), (4, 8, 8, 4))
    assert plot.sweeps(three) == [("M", ["0", "1", "2"])]
    assert plot.sweeps(document((1, 8, 8, 2), (2, 8, 8, 4), (4, 8, 8, 2))) == []
    assert [axis for axis, _ in plot.sweeps(document((1, 8, 8, 2), (1, 8, 8, 4), (1, 8, 8, 8)))] == ["R"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "llama"], "is for cuda"),
        (["--suite", "decode", "--shapes", "tiny"], "one of them"),
        (["--peer", "lorafusion"], "NAME=PATH"),
    ],
)
def test_options_that_cannot_be_served_are_refused(words, said, capsys):
    assert main(["bench", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().out


def test_a_document_without_a_roofline_still_has_its_table():
    """Runs of earlier versions have none."""
    entry = {"shape": "a", "p": 0.0, "pass": FORWARD, "variant": "ours: cpu", "automatic": True, "seconds": [1, 2, 3]}
    document = {"timings": [entry | {"ratio": [1, 1, 1]}], "gate": [], "shapes": {"a": {"size": "s"}}}
    assert report.shape_table(document, "a")[2] == [["ours: cpu (automatic)", "2000 ms ×1.00 ±0.00"]]


def test_without_the_automatic_choice_a_picture_shows_another_of_ours(tmp_path):
    pytest.importorskip("matplotlib")
    document = llama_run.document({"F.linear": 1.0, "PEFT": 1.8, "addmm_": 1.2, "ours: cuda": 1.1})
    assert plot.ours(document) == {"ours: cuda"}
    plot.draw(document, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    document["timings"][-1]["automatic"] = True
    assert plot.ours(document) == {document["timings"][-1]["variant"]}
