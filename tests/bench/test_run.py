"""The bench shows no number of a wrong kernel, its arithmetic is right, and its files are complete."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from support import measured_pages
from support.paths import ROOT

from lora_kernels.__main__ import main
from lora_kernels.backends import dispatch, eager
from lora_kernels.bench import layers, memory, overhead, report, run, variants
from lora_kernels.bench.shapes import BACKWARD, DEFAULT, FORWARD, NAMED, TARGETED
from lora_kernels.testing import documents, timing
from lora_kernels.testing.judge import Judge, evaluate, problem


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Leave out three slow things that are not tested here: PEFT's import, hundreds of calls, and timing the import."""
    patch.setitem(sys.modules, "peft", None)
    patch.setattr(overhead, "_CALLS", 10)
    patch.setattr(overhead, "measure_import", lambda times: overhead.ImportCost(1.0, False))


@pytest.fixture
def wrong_backend(monkeypatch):
    """A back-end "wrong" that serves everything and forgets the scale in db."""
    module = types.ModuleType("lora_kernels.backends.wrong")
    module.name, module.why_not, module.forward = "wrong", eager.why_not, eager.forward

    def backward(dys, x, bases, adapters, *rest):
        dx, das, (db,) = eager.backward(dys, x, bases, adapters, *rest)
        return dx, das, [db if db is None else db / adapters[0].scale]

    module.backward = backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "wrong"))
    dispatch.pick.cache_clear()
    dispatch.automatic.cache_clear()
    yield
    dispatch.pick.cache_clear()
    dispatch.automatic.cache_clear()


def bench(*words: str) -> int:
    return main(["bench", "--device", "cpu", "--rounds", "2", "--shapes", "tiny", *words])


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """The document of one run of the bench."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        assert bench("--out", str(path)) == 0
    return json.loads(path.read_text())


def test_a_wrong_kernel_gets_no_number(wrong_backend, tmp_path, monkeypatch, capsys):
    make_quick(monkeypatch)
    out = tmp_path / "run.json"
    assert bench("--out", str(out)) == 1
    document = json.loads(out.read_text())
    red = {entry["backend"] for entry in document["gate"] if not entry["green"]}
    assert red == {"wrong"}
    assert all("db: error" in entry["faults"][0] for entry in document["gate"] if entry["backend"] == "wrong")
    for kind in ("timings", "memory"):
        backends = {entry["backend"] for entry in document[kind]}
        assert "eager" in backends and "wrong" not in backends
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "ours: wrong" in line)
    assert row.split()[2:] == ["red"] * 4
    assert "judged wrong" in text and "db: error" in text


def test_the_judge_finds_a_crash_and_a_missing_gradient(wrong_backend, monkeypatch):
    judge = Judge(problem(6, 8, 8, 2))
    assert judge.faults("eager")[1] == []
    wrong = sys.modules["lora_kernels.backends.wrong"]
    monkeypatch.setattr(wrong, "backward", lambda *args: 1 / 0)
    assert judge.faults("wrong")[1] == ["ZeroDivisionError: division by zero"]
    monkeypatch.setattr(wrong, "forward", lambda *_: ([torch.full((6, 8), float("nan"))], [None]))
    monkeypatch.setattr(wrong, "backward", eager.backward)
    assert judge.faults("wrong")[1]
    monkeypatch.setattr("lora_kernels.testing.judge.lora_linear", lambda x, w, a, b, *, bias, **_: x @ w.mT + bias)
    assert {"da: missing", "db: missing"} <= set(judge.faults("eager")[1])


def test_the_judge_judges_every_gradient():
    verdicts, faults = Judge(problem(6, 8, 8, 2, p=0.3)).faults("eager")
    assert faults == [] and [v.name for v in verdicts] == ["y", "dx", "da", "db", "dbias"]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_every_variant_computes_the_layer(p):
    """All variants compute the same function. At p = 0 the results agree to the last few bits, and with dropout their
    means over many masks agree."""
    q = problem(12, 10, 16, 4, dtype=torch.float64, p=0.0)
    want = evaluate(q)
    found, notes = variants.baselines()
    assert not notes, "PEFT is among the requirements of the tests"
    built = dataclasses.replace(q, p=p)
    for variant in [v for v in found if v.dropout or p == 0]:
        task = variant.build(built)
        x = q.x.clone().requires_grad_()
        repeats = 1 if p == 0 else 4000
        y = sum(task.layer(x) for _ in range(repeats)) / repeats
        gradients = torch.autograd.grad(y, (x, *task.trained), q.dy)
        bound = {"rtol": 1e-9, "atol": 1e-9} if p == 0 else {"rtol": 0.05, "atol": 0.1}
        for value, name in zip((y, *gradients), ("y", "dx", "da", "db"), strict=True):
            torch.testing.assert_close(value, want[name], **bound, msg=lambda text, v=variant: f"{v.name}: {text}")


def test_the_document_has_every_cell_and_no_paths(document):
    assert document["schema"] == 1 and document["rounds"] == 2
    assert document["command"] == "python -m lora_kernels bench --device cpu --shapes tiny --rounds 2"
    assert document["device"]["type"] == "cpu" and {"name", "cores", "threads", "isa"} <= document["device"].keys()
    assert document["versions"]["torch"].startswith("2.") and document["versions"].keys() >= {
        "python",
        "triton",
        "peft",
    }
    assert str(Path.home()) not in json.dumps(document) and str(ROOT) not in json.dumps(document)
    served = {name for name in dispatch.BACKENDS if name not in document["shapes"]["tiny"]["passed_over"]}
    assert "eager" in served
    names = {"F.linear", "addmm_", *(f"ours: {name}" for name in served)}
    for p in (0.0, 0.1):
        for which in (FORWARD, BACKWARD):
            cell = [e for e in document["timings"] if e["p"] == p and e["pass"] == which]
            assert {e["variant"] for e in cell} == names | ({"merge"} if p == 0 else set())
            assert [e["automatic"] for e in cell].count(True) == 1
            for entry in cell:
                low, middle, high = entry["seconds"]
                assert 0 < low <= middle <= high and entry["repeats"] >= 1
                if entry["variant"] == "F.linear":
                    assert entry["ratio"] == [1.0, 1.0, 1.0]
    assert all(m["saved_bytes"] <= m["saved_limit"] for m in document["memory"] if m["backend"])
    assert len(document["gate"]) == 2 * len(served) and all(entry["green"] for entry in document["gate"])
    assert {o["p"] for o in document["overhead"]} == {0.0, 0.1}


def test_the_page_of_measurements_shows_the_document(document, tmp_path):
    root = measured_pages.checkout(tmp_path)
    measured_pages.put(root, "a.json", document)
    text = measured_pages.page_of_measurements(root)
    assert "tiny: fp32 40×64→48 r4" in text and "(../benchmarks/results/a.json)" in text
    mine = next(e for e in document["timings"] if e["automatic"] and e["pass"] == BACKWARD and e["p"] == 0)
    assert f"**×{mine['ratio'][1]:.2f}** (`{mine['backend']}`)" in text


def test_a_partial_run_is_not_written_unasked(document, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_measure", lambda bench, *rest, **more: not bench.document.update(document))
    assert bench() == 0
    assert list(tmp_path.iterdir()) == []
    assert "not written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plot"], "--out"),
        (["--rounds", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
        (["--device", "meta"], "cpu and cuda"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_options_that_cannot_be_served_are_refused(words, said, capsys):
    assert bench(*words) == 2
    assert said in capsys.readouterr().out


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "run.json"
    documents.write({"a": 1}, path)
    with pytest.raises(TypeError):
        documents.write({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_ratios_are_of_the_same_round():
    """A machine that slows down tenfold in round two changes no ratio."""
    rounds = timing.Rounds(
        "floor",
        [{"floor": [1.0, 3.0], "slow": [4.0]}, {"floor": [10.0, 30.0], "slow": [40.0]}],
        {"floor": 1, "slow": 1},
    )
    assert rounds.ratios("slow", "floor") == [2.0, 2.0]
    assert rounds.seconds("floor") == [2.0, 20.0]
    assert rounds.noise() == [3.0, 3.0]
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


class Script:
    """A timer that returns a fixed time for each variant, and records which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sample(self, steps, repeats):
        self.asked.append(steps[0])
        return {"floor": 1e-3, "a": 2e-3, "b": 3e-3, "slow": 1.0}[steps[0]]


def test_rounds_are_interleaved_and_differ_in_their_order():
    timer = Script()
    rounds = timing.interleave("floor", {name: [name] for name in ("floor", "a", "b", "slow")}, 5, timer)
    asked = timer.asked[8:]  # the first two calls of each variant are warm-ups
    first, second = asked[:5], asked[5:10]
    assert sorted(first) == sorted(second) == ["a", "b", "floor", "floor", "slow"] and first != second
    assert abs(first.index("floor") - (len(first) - 1 - first[::-1].index("floor"))) >= 2
    assert rounds.repeats == {"floor": 2, "a": 1, "b": 1, "slow": 1}
    assert rounds.ratios("b", "floor") == pytest.approx([3.0] * 5)
    assert rounds.ratios("slow", "floor") == pytest.approx([1000.0] * timing.SLOW_ROUNDS)


def test_saved_bytes_count_a_storage_once_and_no_parameter():
    q = problem(32, 16, 24, 4)
    x_bytes, h_bytes = 32 * 24 * 4, 32 * 4 * 4
    shared = layers.Task(lambda x: (x * x) @ q.w.mT, (), (q.w,))
    assert memory.saved_bytes(shared, q) == x_bytes
    layer = layers.addmm(q)
    assert memory.saved_bytes(layer, q) == x_bytes + h_bytes
    peak = memory.peak_bytes(layer, q)
    y_and_dx = 32 * 16 * 4 + 32 * 24 * 4
    assert peak is None or y_and_dx < peak < 4 * (y_and_dx + x_bytes)


def test_targets_are_those_of_the_shapes():
    assert next(shape.targets for shape in TARGETED) == {0.0: 1.10, 0.1: 1.18} and all(
        len(s.targets) == 2 for s in TARGETED
    )
    assert report.met_or_missed(1.104, 1.10) == "met" and report.met_or_missed(1.106, 1.10) == "missed"
    assert {s.name for shapes in DEFAULT.values() for s in shapes} <= NAMED.keys()
    assert not any(s.name.startswith("llama-70b") for s in DEFAULT["cpu"])


def test_durations_have_three_digits_and_a_unit():
    assert [report.duration(t) for t in (2.5e-7, 1.234e-5, 9.99e-4, 1.5e-3, 0.123, 1.5)] == [
        "0.25 µs", "12.3 µs", "999 µs", "1.50 ms", "123 ms", "1500 ms",
    ]  # fmt: skip


def test_the_import_loads_no_triton():
    assert not overhead.measure_import(1).loads_triton


def test_a_plain_terminal_and_a_picture_show_the_document(document, tmp_path, capsys):
    from lora_kernels.bench import plot
    from lora_kernels.testing.terminal import Terminal

    Terminal().table(*report.shape_table(document, "tiny"))
    text = capsys.readouterr().out
    assert "ours: eager" in text and "×" in text
    pytest.importorskip("matplotlib")
    plot.draw(document, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
