"""``python -m lora_kernels verify``: what the command makes of what its processes tell. They are stand-ins here."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.fake_gpu import IDENTITY
from support.paths import SUPPORT

from lora_kernels.__main__ import main
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import Bucket, Evidence, Verdict
from lora_kernels.tools.verify import processes

KEYS = ("composite forward all bfloat16+bfloat16", "triton forward all bfloat16+bfloat16")
SHAPE = ("--shapes", "2048x64x48:16", "--dropout", "0", "--adapters", "x")
PASSES = ("2048x64x48:16 p=0 forward", "2048x64x48:16 p=0 backward")
SETTING = {"dtype": "bfloat16", "adapter_dtype": "bfloat16", "p": 0.0, "quant": None, "double_quant": False}
CLASSES = [
    {"key": key, "backend": key.split()[0], "op": "forward", "setting": SETTING, "cases": [], "plans": []}
    for key in KEYS
]


def gpu(**changes) -> dict:
    """Return what the survey tells about a GPU."""
    known = {"device": "cuda:0", "identity": IDENTITY._asdict(), "verdicts": [], "unmeasured": list(PASSES)}
    return known | {"used": [], "passed": [], "classes": CLASSES, "refusals": {}} | changes


class Script:
    """What the stand-ins tell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self(survey=[[{"survey": gpu()}]])

    def __call__(self, **turns: list) -> None:
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.write_text(json.dumps(known | turns))

    def of_class(self, key: str, *events: object) -> None:
        self(**{f"class {key}": [list(events)]})

    def jobs(self, kind: str) -> list[dict]:
        lines = Path(f"{self.path}.jobs").read_text().splitlines()
        return [job for job, _, _ in map(json.loads, lines) if job["kind"] == kind]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in (find.VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VERIFY_SCRIPT", str(tmp_path / "script"))
    monkeypatch.setattr(processes, "START", (sys.executable, "-S", "-E", str(SUPPORT / "scripted_child.py")))
    return Script(tmp_path / "script")


def kept() -> Evidence:
    return file.read(find.cache_path(IDENTITY))


def results() -> list[str]:
    return [kept().verdicts[key].result for key in KEYS]


def shown(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_verdicts_and_times_are_kept_and_shown(script, capsys) -> None:
    script.of_class(KEYS[1], {"verdict": {"key": KEYS[1], "result": "wrong", "why": "y: other bits"}})
    assert main(["verify", *SHAPE]) == 0
    assert results() == ["right", "wrong"] and kept().identity == IDENTITY
    bucket = Bucket("forward", "bfloat16", "bfloat16", 2048, 48, 64, 16, False, "dense")
    assert kept().timings[bucket].ratios["composite"] == (1.0, 1.1, 1.2) and len(kept().timings) == 2
    text = shown(capsys)
    assert f"not used: {KEYS[1]}: wrong: y: other bits" in text and "1 right, 1 wrong" in text
    assert "2048x64x48:16 forward 100.0 composite 1.10" in text
    assert str(find.cache_path(IDENTITY)) in text and "keep what they have read" in text


def test_the_command_itself_never_touches_a_gpu(script, monkeypatch) -> None:
    def touched(*args, **kwargs):
        raise AssertionError("CUDA was asked")

    for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert main(["verify", *SHAPE, "--tune"]) == 0 and main(["verify", "--check"]) == 1


def test_a_process_waits_for_its_kernel_and_not_for_its_compiler(script, monkeypatch) -> None:
    """Both of these processes are silent for longer than a kernel may take."""
    script.of_class(KEYS[0], {"doing": "compile", "limit": "slow"}, ["sleep", 1.5], "the rest")
    script.of_class(KEYS[1], {"doing": "wait for the tickets", "limit": "run", "blame": True}, ["sleep", 60])
    start = time.monotonic()
    assert main(["verify", *SHAPE, "--timeout", "0.7"]) == 0
    assert time.monotonic() - start < 20
    assert results() == ["right", "stuck"]
    assert kept().verdicts[KEYS[1]].why == "wait for the tickets: no end after 0.7 s"


@pytest.mark.slow
def test_a_compiler_that_never_ends_is_ended_too(script, monkeypatch) -> None:
    monkeypatch.setattr(processes, "SLOW_SECONDS", 4.0)
    script.of_class(KEYS[1], {"doing": "compile", "limit": "slow", "blame": True}, ["sleep", 60])
    assert main(["verify", *SHAPE]) == 0
    assert results() == ["right", "stuck"]


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ([["kill", signal.SIGSEGV]], "the first launch: killed by SIGSEGV"),
        ([["say", "a note"], ["say", "RuntimeError: no luck"], ["exit", 1]], "exit status 1: RuntimeError: no luck"),
        ([["exit", 0]], "the first launch: exit status 0"),
    ],
)
def test_a_process_that_dies_costs_its_class_alone(ends, why, script) -> None:
    script.of_class(KEYS[0], {"doing": "the first launch", "limit": "run", "blame": True}, *ends)
    assert main(["verify", *SHAPE]) == 0
    assert results() == ["broken", "right"] and why in kept().verdicts[KEYS[0]].why


def test_a_process_that_dies_before_its_kernels_are_called_is_no_verdict(script, capsys) -> None:
    script.of_class(KEYS[0], {"doing": "prepare", "limit": "slow"}, ["say", "CUDA-capable device is busy"], ["exit", 1])
    assert main(["verify", *SHAPE]) == 1
    assert list(kept().verdicts) == [KEYS[1]]
    text = shown(capsys)
    assert f"{KEYS[0]}: not judged: prepare: exit status 1: CUDA-capable device is busy" in text
    assert "1 of 2 classes of kernels were not judged" in text


def test_times_go_on_without_the_class_that_hung(script, capsys) -> None:
    hung = {"doing": "triton: timing", "limit": "run", "at": PASSES[0], "variant": "triton", "key": KEYS[1]}
    script(times=[[hung, ["sleep", 60]], ["the rest"]])
    assert main(["verify", *SHAPE, "--timeout", "0.5"]) == 0
    assert results() == ["right", "stuck"] and len(kept().timings) == 2
    assert [len(job["passes"]) for job in script.jobs("times")] == [2, 2]


def test_times_go_on_without_the_rival_that_died(script, capsys) -> None:
    dead = {"doing": "PEFT: first call", "limit": "run", "at": PASSES[0], "variant": "PEFT", "key": None}
    script(times=[[dead, ["kill", signal.SIGKILL]], ["the rest"]])
    assert main(["verify", *SHAPE]) == 1
    assert [job["without"] for job in script.jobs("times")] == [[], ["PEFT"]]
    assert len(kept().timings) == 2 and "PEFT: first call: killed by SIGKILL" in shown(capsys)


def test_times_go_on_without_the_pass_whose_frozen_layer_died(script, capsys) -> None:
    dead = {"doing": "F.linear", "limit": "run", "at": PASSES[0], "variant": "F.linear", "key": None}
    script(times=[[dead, ["exit", 5]], ["the rest"]])
    assert main(["verify", *SHAPE]) == 1
    assert [len(job["passes"]) for job in script.jobs("times")] == [2, 1] and len(kept().timings) == 1
    assert f"not timed: {PASSES[0]}" in shown(capsys)


def test_times_that_cannot_begin_end_the_run(script, capsys) -> None:
    script(times=[[["exit", 1]]])
    assert main(["verify", *SHAPE]) == 1
    assert len(script.jobs("times")) == 1 and results() == ["right", "right"]


def test_plans_are_kept_unless_their_class_is_not_right(script, capsys) -> None:
    script.of_class(KEYS[1], {"verdict": {"key": KEYS[1], "result": "wrong", "why": "y"}})
    fastest = [
        {
            "fastest": {name: {"columns": 128, "cluster": 1}},
            "key": key,
            "row": ["2048x64x48:16", name, "9", "8", "", ""],
        }
        for name, key in {"kept": KEYS[0], "dropped": KEYS[1], "new": "cuda forward new", "none": None}.items()
    ]
    hung = {"doing": "plan b", "limit": "run", "job": "the job", "plan": "plan b"}
    script(plans=[[fastest[0], {"step": PASSES[0]}, hung, ["sleep", 60]], [*fastest[1:], "the rest"]])
    assert main(["verify", *SHAPE, "--tune", "--timeout", "0.5"]) == 1
    assert set(kept().plans) == {"kept", "new"} and kept().verdicts["cuda forward new"].result == "right"
    assert [job["skipped"] for job in script.jobs("plans")] == [[], [["the job", "plan b"]]]
    assert [len(job["passes"]) for job in script.jobs("plans")] == [2, 1]
    assert "plan b: no end after 0.5 s" in shown(capsys)
    script(plans=[[hung, ["exit", 3]]])
    assert main(["verify", *SHAPE, "--tune"]) == 1, "a plan that is skipped and dies again ends the search"


def test_types_that_are_not_timed_are_judged_last(script) -> None:
    other = {**SETTING, "adapter_dtype": "float32"}
    late = {**CLASSES[0], "key": "late", "setting": other}
    script(survey=[[{"survey": gpu(classes=[late, *CLASSES])}]])
    assert main(["verify", *SHAPE, "--jobs", "1"]) == 0
    order = [json.loads(line)[0] for line in Path(f"{script.path}.jobs").read_text().splitlines()]
    names = [job["class"]["key"] if job["kind"] == "class" else job["kind"] for job in order]
    assert names == ["survey", *KEYS, "times", "late", "chosen"]


def test_nothing_is_begun_once_the_time_is_over(script, capsys) -> None:
    script.of_class(KEYS[0], ["sleep", 2.5], "the rest")
    assert main(["verify", *SHAPE, "--jobs", "1", "--seconds", "2"]) == 1
    assert list(kept().verdicts) == [KEYS[0]]
    text = shown(capsys)
    assert "1 of 2 classes of kernels were not judged" in text and f"not timed: {', '.join(PASSES)}" in text


def test_without_a_gpu_it_says_so(script, capsys) -> None:
    script(survey=[[]])
    for words, there in (([], "no GPU"), (["--device", "cuda:7"], "no cuda:7"), (["--check"], "no GPU")):
        assert main(["verify", *words]) == 2
        text = shown(capsys)
        assert "needs a GPU" in text and there in text and "python -m lora_kernels doctor" in text
    assert not find.cache_path(IDENTITY).parent.exists()


def test_a_survey_that_dies_is_told(script, capsys) -> None:
    script(survey=[[["say", "RuntimeError: the driver is too old"], ["exit", 1]]])
    assert main(["verify"]) == 2
    assert "the driver is too old" in shown(capsys)


def test_other_ranks_do_not_verify(script, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["verify"]) == 2 and "this is rank 3" in shown(capsys)
    monkeypatch.setenv("RANK", "0")
    assert main(["verify", *SHAPE]) == 0


def test_the_file_may_lie_elsewhere(script, tmp_path, capsys) -> None:
    out = tmp_path / "image" / "evidence.json"
    assert main(["verify", *SHAPE, "--out", str(out)]) == 0
    assert file.read(out).identity == IDENTITY and not find.cache_path(IDENTITY).exists()
    assert f"LORA_KERNELS_EVIDENCE={out} lets other processes read it" in shown(capsys)
    told = [json.loads(line)[1] for line in Path(f"{script.path}.jobs").read_text().splitlines()]
    assert set(told) == {str(out)}, "the processes read what was found before"


def test_what_cannot_be_deleted_is_told(script, tmp_path, capsys) -> None:
    assert main(["verify", "--forget", "--out", str(tmp_path)]) == 2
    assert "cannot be deleted (Is a directory)" in shown(capsys)


def test_a_file_that_the_variable_cannot_name_is_refused(script, tmp_path, capsys) -> None:
    assert main(["verify", *SHAPE, "--out", str(tmp_path / "12:30.json")]) == 2
    assert "separates files by colons" in shown(capsys) and not (tmp_path / "12:30.json").exists()


def test_stale_evidence_is_replaced_and_other_evidence_stays(script) -> None:
    place, old = find.cache_path(IDENTITY), {"other": Verdict("right", "", "2026-01-01")}
    for identity, left in ((IDENTITY._replace(driver="535"), 2), (IDENTITY, 3)):
        place.unlink(missing_ok=True)
        file.add(place, Evidence(identity, old))
        assert main(["verify", *SHAPE]) == 0
        assert len(kept().verdicts) == left and kept().identity == IDENTITY


def test_check_tells_what_is_missing_and_runs_nothing(script, capsys) -> None:
    judged = {"used": ["a.json"], "verdicts": list(KEYS)}
    stale = ["/somewhere/old.json", ["driver 535 then, 580.65 now"]]
    cases = [
        ({}, 1, "there is no evidence here"),
        ({"passed": [stale]}, 1, "/somewhere/old.json does not hold here: driver 535 then, 580.65 now"),
        ({**judged, "verdicts": [KEYS[0]]}, 1, f"1 of 2 classes of kernels were not judged: {KEYS[1]}"),
        (judged, 1, f"not measured, and nothing near it: {PASSES[0]}"),
        ({**judged, "unmeasured": [], "passed": [stale]}, 0, "cuda:0 (Fake GPU): a.json"),
    ]
    for changes, status, text in cases:
        script(survey=[[{"survey": gpu(**changes)}]])
        assert main(["verify", "--check"]) == status
        assert text in shown(capsys)
    assert not find.cache_path(IDENTITY).exists() and script.jobs("class") == []


def test_forget_deletes_the_file(script, tmp_path, capsys) -> None:
    main(["verify", *SHAPE])
    assert main(["verify", "--forget"]) == 0 and not find.cache_path(IDENTITY).exists()
    assert f"Deleted: {find.cache_path(IDENTITY)}" in shown(capsys)
    assert main(["verify", "--forget"]) == 0 and "nothing to delete" in shown(capsys)


def test_every_kind_of_gpu_gets_a_file_and_out_takes_one(script, tmp_path, capsys) -> None:
    other = IDENTITY._replace(device="Other GPU 3g.40gb", multiprocessors=60)
    script(survey=[[{"survey": gpu()}, {"survey": gpu(device="cuda:2", identity=other._asdict())}]])
    assert main(["verify", *SHAPE, "--out", str(tmp_path / "one.json")]) == 2
    assert "cuda:0 (Fake GPU), cuda:2 (Other GPU 3g.40gb)" in shown(capsys)
    assert main(["verify", *SHAPE]) == 0
    assert file.read(find.cache_path(other)).identity == other and kept().identity == IDENTITY
    assert [job["device"] for job in script.jobs("times")] == ["cuda:0", "cuda:2"]


def test_a_second_verify_says_who_runs_the_first(script, capsys) -> None:
    place = find.cache_path(IDENTITY)
    place.parent.mkdir(parents=True)
    with open(place.with_name(f".{place.name}.verify"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1234 on somewhere, since 12:00:00\n")
        lock.flush()
        assert main(["verify", *SHAPE]) == 2
        assert "another verify is running: process 1234 on somewhere" in shown(capsys)
    assert main(["verify", *SHAPE]) == 0


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_home_that_cannot_be_written_is_told_before_the_work(what, script, tmp_path, monkeypatch, capsys) -> None:
    if what == "folder":
        (tmp_path / "in the way").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in the way"))
    else:
        find.cache_path(IDENTITY).mkdir(parents=True)
    assert main(["verify", *SHAPE]) == 2
    text = shown(capsys)
    assert "cannot be written" in text and "XDG_CACHE_HOME" in text and "--out FILE" in text
    assert "LORA_KERNELS_EVIDENCE=FILE" in text and script.jobs("class") == []


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where this process was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_its_processes_and_keeps_what_is_there(number, script, capsys, heeds_interrupts) -> None:
    script.of_class(KEYS[1], {"doing": "wait", "limit": "run"}, ["sleep", 60])

    def interrupt() -> None:
        for _ in range(200):
            time.sleep(0.05)
            if find.cache_path(IDENTITY).exists() and kept().verdicts:
                break
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["verify", *SHAPE]) == 130
    thread.join()
    assert list(kept().verdicts) == [KEYS[0]] and "is kept" in shown(capsys)
    pids = [json.loads(line)[2] for line in Path(f"{script.path}.jobs").read_text().splitlines()]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_children_of_a_process_end_with_it(script, tmp_path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    left = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    left.wait()
    group = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _group(pid) == left.pid]
    assert group, "a child outlives the process"
    process = processes.Process.__new__(processes.Process)
    process._process, process._listener = left, type("Closed", (), {"close": lambda self: None})()
    process.kill()
    time.sleep(0.2)
    assert not any(_group(pid) == left.pid for pid in group)


def _group(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[2])


def test_an_old_triton_on_hopper_is_told(script, capsys) -> None:
    for version, told in (("3.6.0", True), ("3.7.1", False), ("3.10.0", False)):
        script(survey=[[{"survey": gpu(identity=IDENTITY._replace(triton=version)._asdict())}]])
        assert main(["verify", *SHAPE]) == 0
        assert ("pip install 'triton>=3.7.1'" in shown(capsys)) == told
