"""The endurance run repeats its cases from a seed, finds faults, and prints how to repeat them."""

from __future__ import annotations

import contextlib
import json
import sys
import types

import pytest
import torch

from benchmarks import endurance
from benchmarks.endurance_cases import DTYPES, draw
from lora_kernels.backends import eager


def fake_backend(monkeypatch: pytest.MonkeyPatch, **changes) -> str:
    module = types.ModuleType("lora_kernels.backends.fake")
    vars(module).update(
        {"why_not": eager.why_not, "forward": eager.forward, "backward": eager.backward, "name": "fake"}
    )
    vars(module).update(changes)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "fake"


def endure(*words: str) -> int:
    return endurance.main(["--device", "cpu", "--replays", "0", *words])


def test_a_short_run_has_no_faults(tmp_path, capsys):
    assert endure("--calls", "12", "--out", str(tmp_path / "run.json")) == 0
    records = {record["backend"]: record for record in json.loads((tmp_path / "run.json").read_text())["records"]}
    assert records["eager"]["calls"] == 12 and records["eager"]["stress"] == 50 and records["eager"]["faults"] == []
    assert "no faults" in capsys.readouterr().out


def test_cases_are_functions_of_the_seed(capsys):
    cases = [draw(3, k, 1000, "cuda") for k in range(400)]
    assert cases == [draw(3, k, 1000, "cuda") for k in range(400)] and cases != [
        draw(4, k, 1000, "cuda") for k in range(400)
    ]
    assert {(c.dtype, c.adapter_dtype) for c in cases} == set(DTYPES)
    assert {c.p for c in cases} == {0.0, 0.05, 0.5} and {c.strided for c in cases} == {c.bias for c in cases} == {
        False,
        True,
    }
    assert min(c.R for c in cases) <= 8 and max(c.R for c in cases) > 200 and all(1 <= c.R <= 256 for c in cases)
    assert min(c.M for c in cases) <= 16 and max(c.M for c in cases) > 1000 and {c.stream for c in cases} == {0, 1, 2}
    assert any(c.N % 8 for c in cases) and any(c.N % 64 == 0 and c.K % 64 == 0 for c in cases)
    assert all(1 <= size <= 2048 + 63 for c in cases for size in (c.N, c.K))
    few = [draw(3, k, 2, "cuda") for k in range(50)]
    assert len({(c.dtype, c.adapter_dtype, c.p, c.strided, c.bias) for c in few}) <= 2 and len({c.M for c in few}) > 10


def test_a_wrong_gradient_is_found_and_can_be_repeated(monkeypatch, capsys):
    def backward(dys, *rest):
        dx, das, (db,) = eager.backward(dys, *rest)
        return dx, das, [db * 1.3 if dys[0].shape[0] > 30 else db]

    name = fake_backend(monkeypatch, backward=backward)
    wrong = next(k for k in range(100) if draw(5, k, 1000, "cpu").M > 30)
    assert endure("--backend", name, "--seed", "5", "--only", str(wrong)) == 1
    said = capsys.readouterr().out
    assert "db: RMS error" in said and f"--backend fake --seed 5 --only {wrong}" in said
    right = next(k for k in range(100) if draw(5, k, 1000, "cpu").M <= 30)
    assert endure("--backend", name, "--seed", "5", "--only", str(right)) == 0


def test_results_that_change_from_run_to_run_are_found(monkeypatch, capsys):
    turns = []

    def forward(x, *rest):
        (y,), hs = eager.forward(x, *rest)
        turns.append(1)
        if len(turns) % 2:
            y.view(-1)[0] = torch.nextafter(y.view(-1)[0].float(), torch.tensor(float("inf"))).to(y.dtype) * 1.0001
        return [y], hs

    name = fake_backend(monkeypatch, forward=forward)
    assert endure("--backend", name, "--calls", "6") == 1
    assert "y changes from run to run" in capsys.readouterr().out


def test_a_backend_that_breaks_is_not_called_ten_thousand_times(monkeypatch, capsys):
    def forward(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert endure("--backend", fake_backend(monkeypatch, forward=forward)) == 1
    said = capsys.readouterr().out
    assert said.count("✗ fake, case") == endurance._ENOUGH and "illegal memory access" in said


class FakeGraph:
    """A graph that repeats the captured calls into the same tensors, except in each `off`-th replay."""

    def __init__(self, off: int = 0) -> None:
        self.calls, self.capturing, self.replays, self.off = [], False, 0, off

    def replay(self) -> None:
        self.replays += 1
        if self.off and self.replays % self.off == 0:
            return
        for module, q, results in self.calls:
            for name, value in run(module, q).items():
                results[name].copy_(value)


run = endurance.run


@pytest.mark.parametrize("off", [0, 51])
def test_streams_and_replays_are_compared_on_a_fake_gpu(monkeypatch, off):
    """The test has CPU tensors and a fake torch.cuda. Inputs change between replays, results are compared, and a stale
    replay is found."""
    graph = FakeGraph(off)

    @contextlib.contextmanager
    def capture(_):
        graph.capturing = True
        yield
        graph.capturing = False

    def recording(module, q):
        results = run(module, q)
        if graph.capturing:
            graph.calls.append((module, q, results))
        return results

    used = []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    problem = endurance.problem
    monkeypatch.setattr(endurance, "problem", lambda *sizes, device, **more: problem(*(s // 8 for s in sizes), **more))
    monkeypatch.setattr(endurance, "run", recording)
    monkeypatch.setattr(endurance, "_STRESS", 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: used.append(s) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    one = endurance.Endurance("eager", types.SimpleNamespace(type="cuda"), seed=0, kinds=None)
    one.stress()
    assert len(used) == 6 and one.record.faults == []
    steps = []
    one.replay(100, lambda: steps.append(1))
    if off:
        assert one.record.replays == 51 and "replay 50" in one.record.faults[0]
    else:
        assert one.record.replays == graph.replays == len(steps) == 100 and one.record.faults == []


def test_limits_of_time_and_refusals_are_respected(monkeypatch, capsys, tmp_path):
    def why_not(call):
        return ["odd"] if call.R % 2 else []

    words = ["--backend", fake_backend(monkeypatch, why_not=why_not), "--out", str(tmp_path / "run.json")]
    assert endure(*words, "--calls", "10") == 0
    record = json.loads((tmp_path / "run.json").read_text())["records"][0]
    assert (
        record["refused"] == sum(draw(0, k, 1000, "cpu").R % 2 for k in range(10))
        and record["calls"] + record["refused"] == 10
    )
    assert endure(*words, "--seconds", "-1") == 1, "a run without calls does not succeed"
    monkeypatch.setattr(sys.modules["lora_kernels.backends.fake"], "why_not", lambda call: ["not here"])
    assert endure(*words) == 1
    assert "fake is not called: not here" in capsys.readouterr().out
