"""A variant that hangs or fails in the bench or in endurance costs its own numbers only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from support.paths import ROOT

from lora_kernels.__main__ import main
from lora_kernels.backends import dispatch, eager
from lora_kernels.bench import overhead
from lora_kernels.bench.variants import FLOOR
from lora_kernels.testing import watch

pytestmark = pytest.mark.slow

FAKE = """
    import sys, time, types
    from lora_kernels.backends import dispatch
    from lora_kernels.backends import eager

    module = types.ModuleType("lora_kernels.backends.fake")
    module.name, module.why_not, module.backward = "fake", eager.why_not, eager.backward

    def forward(x, *rest):
        if x.shape == SHAPE:
            HANG
        return eager.forward(x, *rest)

    module.forward = forward
    sys.modules[module.__name__] = module
    dispatch.BACKENDS = (*dispatch.BACKENDS, "fake")
    sys.modules["peft"] = sys.modules["triton"] = None  # their imports take long, and nothing here needs them
    """
STUCK_SECONDS = 4
"""Longer than any step takes that does not hang, even on a busy machine."""


def in_a_process(code: str, hang: str, shape: str = "(40, 64)") -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process with a back-end "fake" that is `eager`, but runs `hang` for an x of `shape`."""
    head = textwrap.dedent(FAKE).replace("HANG", hang).replace("SHAPE", shape)
    code = textwrap.dedent(code).replace("SECONDS", str(STUCK_SECONDS))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )


BENCH = """
    from lora_kernels.__main__ import main
    from lora_kernels.bench import overhead, shapes
    from dataclasses import replace

    overhead.measure_import = lambda times: overhead.ImportCost(1.0, False)
    overhead.measure_overhead = lambda *rest: []
    small = shapes.NAMED["tiny"]
    for name, M in (("first", 24), ("last", 32)):
        shapes.NAMED[name] = replace(small, name=name, M=M)
    words = "bench --device cpu --rounds 1 --threads 1 --stuck SECONDS --resume --shapes first tiny last --out".split()
    sys.exit(main([*words, OUT]))
    """


@pytest.mark.parametrize(("hang", "status"), [("time.sleep(99)", 3), ("import os; os.kill(os.getpid(), 11)", -11)])
def test_the_bench_goes_on_without_what_hangs(hang, status, tmp_path):
    out = tmp_path / "run.json"
    code = BENCH.replace("OUT", repr(str(out)))
    done = in_a_process(code, hang)
    assert done.returncode == status, done.stderr
    document = json.loads(out.read_text())
    assert set(document["shapes"]) == {"first"} or document["measuring"] == "tiny"
    assert {entry["shape"] for entry in document["timings"]} == {"first"}, "what was measured before is there"
    if status == 3:
        (failure,) = document["failed"]
        assert failure["shape"] == "tiny" and failure["variant"] == "ours: fake" and "no end" in failure["why"]
        assert "ours: fake" in done.stdout
    done = in_a_process(code, hang)
    assert done.returncode == 1, "a failure is not forgotten"
    document = json.loads(out.read_text())
    variants = {name: {e["variant"] for e in document["timings"] if e["shape"] == name} for name in ("first", "last")}
    assert variants["first"] == variants["last"] and "ours: fake" in variants["last"]
    found = {entry["variant"] for entry in document["timings"] if entry["shape"] == "tiny"}
    # The variant that hung is known, and the rest of its shape is measured. The variant that killed the process is not.
    assert found == (variants["last"] - {"ours: fake"} if status == 3 else set())
    assert "measuring" not in document and any("tiny" in note for note in document["notes"])


def test_endurance_names_the_case_that_hangs():
    code = """
        from benchmarks import endurance
        sys.exit(endurance.main("--device cpu --backend fake --calls 400 --replays 0 --stuck SECONDS".split()))
        """
    done = in_a_process(code, "time.sleep(99)", "x.shape and (20 < x.shape[0] < 60) * x.shape")
    assert done.returncode == 3, done.stderr
    assert f"no end after {STUCK_SECONDS} s" in done.stdout and "again: --backend fake --seed 0 --only" in done.stdout


@pytest.fixture
def fake(monkeypatch):
    """A copy of `eager` under another name, for a test to break."""
    module = types.ModuleType("lora_kernels.backends.fake")
    module.name, module.why_not = "fake", eager.why_not
    module.forward, module.backward = eager.forward, eager.backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "fake"))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(overhead, "measure_import", lambda times: overhead.ImportCost(1.0, False))
    dispatch.pick.cache_clear()
    yield module
    dispatch.pick.cache_clear()


def test_a_variant_that_fails_while_timed_leaves_the_others(fake, monkeypatch, tmp_path, capsys):
    """The variant runs out of memory after it was judged, while it is timed."""
    calls = []

    def forward(x, *rest):
        calls.append(1)
        if len(calls) == 2:  # the judge made the first call
            raise torch.OutOfMemoryError("none left")
        return eager.forward(x, *rest)

    monkeypatch.setattr(fake, "forward", forward)
    out = tmp_path / "run.json"
    assert main(["bench", "--device", "cpu", "--rounds", "2", "--shapes", "tiny", "--out", str(out)]) == 1
    document = json.loads(out.read_text())
    (failure,) = document["failed"]
    assert (failure["variant"], failure["pass"]) == ("ours: fake", "forward") and "none left" in failure["why"]
    found = {entry["variant"] for entry in document["timings"]}
    assert {"F.linear", "addmm_", "ours: eager"} <= found and "ours: fake" not in found
    assert "none left" in capsys.readouterr().out


def test_where_the_floor_fails_the_shape_is_left_out(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: 1 / 0)
    out = tmp_path / "run.json"
    with pytest.raises(ZeroDivisionError):  # the rates are measured before any shape
        main(["bench", "--device", "cpu", "--rounds", "2", "--shapes", "tiny", "--out", str(out)])
    monkeypatch.setattr("lora_kernels.bench.roofline.measure_rates", lambda *_: {"gemm": {"fp32": 1e12}, "copy": 1e9})
    assert main(["bench", "--device", "cpu", "--rounds", "2", "--shapes", "tiny", "--out", str(out)]) == 1
    document = json.loads(out.read_text())
    assert [failure["variant"] for failure in document["failed"]] == [FLOOR.name] and not document["shapes"]


def test_a_device_that_no_longer_answers_ends_the_process(fake, monkeypatch, tmp_path, capsys):
    """Another process can go on: the exit status is 3, and the failure is on record."""
    monkeypatch.setattr(fake, "backward", lambda *_: 1 / 0)
    monkeypatch.setattr("lora_kernels.bench.measure.answers", lambda device: False)
    monkeypatch.setattr("lora_kernels.bench.run.answers", lambda device: False)
    out = tmp_path / "run.json"
    words = ["bench", "--device", "cpu", "--rounds", "2", "--shapes", "tiny", "--resume", "--out", str(out)]
    assert main(words) == watch.STUCK
    assert "no longer answers" in capsys.readouterr().out
    (failure,) = json.loads(out.read_text())["failed"]
    assert failure["variant"] == "ours: fake" and "division by zero" in failure["why"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(overhead, "measure_import", lambda times: overhead.ImportCost(1.0, False))
    assert main(words) == 1
    document = json.loads(out.read_text())
    assert document["timings"] and document["shapes"].keys() == {"tiny"}


def test_a_watch_is_quiet_where_nothing_hangs():
    with watch.Watch(0.05, lambda what: pytest.fail(what)) as doing:
        doing("a thing")
        doing("")
        torch.ones(1).item()
    assert watch.answers(torch.device("cpu"))


def test_resume_needs_a_file(capsys):
    assert main(["bench", "--device", "cpu", "--resume", "--shapes", "tiny"]) == 2
    assert "--out" in capsys.readouterr().out
