"""scripts/gpu_check.py and gpu_run.py: the sections, their time, the files that are kept, the table, and a dry run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from benchmarks import endurance
from lora_kernels.bench import run

spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu_check  # dataclasses look up the module that defines them
spec.loader.exec_module(gpu_check)

gpu_run = sys.modules["gpu_run"]  # gpu_check.py imports it from its own folder

Command, Section = gpu_run.Command, gpu_check.Section


def says(code: str, **kwargs) -> Command:
    """Return a command that runs Python code."""
    return Command([sys.executable, "-c", code], **kwargs)


def section(name: str, *steps: list[Command], seconds: float = 20, first: bool = False) -> Section:
    return Section(name, seconds, lambda check, left: list(steps), first)


def rows(out: Path) -> dict[str, dict]:
    return {row["section"]: row for row in json.loads((out / "check.json").read_text())["rows"]}


def test_a_failing_section_stops_nothing(tmp_path, capsys):
    def broken(check, seconds):
        raise RuntimeError("no such luck")

    sections = (
        section("works", [says("print('fine')")]),
        section("fails", [says("raise SystemExit(3)")]),
        Section("raises", 5, broken),
        section("absent", [Command(["no-such-program-at-all"])]),
        section("slow", [says("import time; time.sleep(60)")], seconds=1.5),
        section("idle"),
        section("either", [says("exit(1)")], [says("print('second way')")], [says("1/0")], first=True),
        section("last", [says("print('the end')")]),
    )
    start = time.monotonic()
    assert gpu_check.main([str(tmp_path / "out")], sections) == 1
    assert time.monotonic() - start < 30
    result = {name: row["result"] for name, row in rows(tmp_path / "out").items()}
    assert result == {
        "works": "ok",
        "fails": "exit status 3",
        "raises": "RuntimeError: no such luck",
        "absent": "cannot be started",
        "slow": "out of time",
        "idle": "nothing to do",
        "either": "ok",
        "last": "ok",
    }
    text = capsys.readouterr().out.strip().splitlines()
    assert text[-9].split() == ["section", "seconds", "result"] and text[-1].split()[::2] == ["last", "ok"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "fine" in log and "second way" in log and "the end" in log and str(ROOT) not in log
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["check.json", "log.txt"]


def test_all_well_is_exit_status_0(tmp_path):
    sections = (section("one", [says("")]), section("two", [says("")]))
    assert gpu_check.main([str(tmp_path / "out"), "--only", "two"], sections) == 0
    assert list(rows(tmp_path / "out")) == ["two"]


def test_commands_of_a_step_run_at_once_and_a_hopeless_backend_is_not_called_again(tmp_path):
    """A back-end is hopeless if each of its smoke tests hangs or breaks the context. One that works, or is only wrong,
    is reason enough to call the rest."""
    called = []

    def later(check, seconds):
        called.extend(check.backends())
        return []

    broken = "import time; time.sleep(2); print('CUDA error: an illegal memory access was encountered'); exit(1)"
    step = [
        says("import time; time.sleep(2)", backend="cuda", decides=True),
        says(broken, backend="cuda", label="cuda other", decides=True),
        says(broken, backend="triton", label="triton one", decides=True),
        says("import os; os.kill(os.getpid(), 11)", backend="triton", label="triton two", decides=True),
    ]
    start = time.monotonic()
    assert gpu_check.main([str(tmp_path / "out")], (section("smoke", step), Section("bench", 9, later))) == 1
    assert time.monotonic() - start < 5.5
    assert called == ["cuda"]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["broken"] == ["triton"]
    assert rows(tmp_path / "out")["smoke"]["result"] == (
        "cuda other exit status 1; triton one exit status 1; triton two killed by SIGSEGV; triton is not called again"
    )


def test_a_stuck_command_is_run_again(tmp_path):
    """The same command runs while there is time, as often as it ends as stuck or is killed. Its output is one text."""
    marker = tmp_path / "turns"
    code = f"import pathlib; p = pathlib.Path({str(marker)!r}); n = len(p.read_text()) if p.exists() else 0\n"
    code += "p.write_text('x' * (n + 1)); print('turn', n); import os\n"
    code += "exit(3) if n == 0 else os.kill(os.getpid(), 11) if n == 1 else exit(0)"
    sections = (section("bench", [says(code, again=6)], seconds=60), section("no", [says("exit(3)")]))
    assert gpu_check.main([str(tmp_path / "out")], sections) == 1
    result = rows(tmp_path / "out")
    assert result["bench"]["result"] == "ok" and result["no"]["result"] == "exit status 3"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.index("turn 0") < log.index("exit status 3: run again") < log.index("turn 1") < log.index("turn 2")


def test_output_can_be_read_while_commands_run(tmp_path):
    """A run that is cut off leaves the output of ended commands and the last lines of running ones."""
    code = "print('shape 17', flush=True); import time; time.sleep(60)"
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('gpu_check', {str(ROOT / 'scripts' / 'gpu_check.py')!r})\n"
        "g = importlib.util.module_from_spec(spec); sys.modules['gpu_check'] = g; spec.loader.exec_module(g)\n"
        f"step = [g.Command([sys.executable, '-c', {code!r}]), g.Command([sys.executable, '-c', 'print(1234)'])]\n"
        f"g.main([{str(tmp_path / 'out')!r}], (g.Section('slow', 60, lambda *_: [step]),))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.DEVNULL)
    running = tmp_path / "out" / "running.txt"
    try:
        for _ in range(300):
            said = [path.read_text() if path.exists() else "" for path in (running, tmp_path / "out" / "log.txt")]
            if "shape 17" in said[0] and "1234" in said[1]:
                break
            time.sleep(0.1)
        assert "shape 17" in said[0] and "1234" in said[1]
    finally:
        group = [
            int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _child(path, process.pid)
        ]
        for pid in (process.pid, *group):
            os.kill(pid, 9)
        process.wait()


def _child(path: Path, parent: int) -> bool:
    try:
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
    except OSError:
        return False


def test_without_a_gpu_nothing_is_tried_on_it(tmp_path, capsys):
    vital = says("print('none'); exit(1)", vital="torch sees no GPU")
    sections = (section("device", [vital]), section("smoke", [says("1/0")]), section("bench", [says("1/0")]))
    assert gpu_check.main([str(tmp_path / "out")], sections) == 1
    result = {name: row["result"] for name, row in rows(tmp_path / "out").items()}
    assert result == {"device": "torch sees no GPU"} | dict.fromkeys(("smoke", "bench"), "not run: torch sees no GPU")


def test_the_last_way_to_build_is_reported(tmp_path):
    """Without the CUDA part the rest can be measured, but the section counts as failed."""
    steps = [says("exit(1)")], [Command(says("").argv, label="without CUDA")]
    assert gpu_check.main([str(tmp_path / "out")], (section("build", *steps, first=True),)) == 1
    assert rows(tmp_path / "out")["build"]["result"] == "exit status 1; at last without CUDA"


def test_a_child_of_a_slow_command_is_ended_too(tmp_path):
    marker = tmp_path / "still-there"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(marker)!r}).touch()"
    slow = says(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    gpu_check.main([str(tmp_path / "out")], (section("slow", [slow], seconds=1), section("next", [says("")])))
    time.sleep(4.5)
    assert not marker.exists()


def test_the_files_stay_within_the_limits(tmp_path):
    for name in ("check.json", "log.txt", "hopper.json", *(f"extra-{i}.png" for i in range(8))):
        (tmp_path / name).write_text("x")
    for name in ("sweep.json", "log.txt"):
        with (tmp_path / name).open("ab") as file:
            file.truncate(gpu_check.MAX_BYTES + 1)
    gpu_check.keep_within_limits(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == gpu_check.MAX_FILES and {"check.json", "log.txt", "hopper.json"} <= left
    assert "sweep.json" not in left
    assert (tmp_path / "log.txt").stat().st_size < gpu_check.MAX_BYTES


def test_long_logs_keep_their_beginning_and_their_end():
    text = gpu_run.trimmed(b"begin " + b"x" * 3_000_000 + b" end")
    assert text.startswith("begin ") and text.endswith(" end") and len(text) < gpu_run.LOG_BYTES + 100
    assert 60 * gpu_run.LOG_BYTES < gpu_check.MAX_BYTES, "the log of all commands together is kept"
    assert gpu_run.trimmed(b"short") == "short"


def test_the_budgets_fit_nine_minutes():
    """Sections that use all their time leave later sections at least 40 % of theirs, and the total is kept."""
    spent = 0.0
    for i, each in enumerate(gpu_check.SECTIONS):
        reserve = 0.5 * sum(later.seconds for later in gpu_check.SECTIONS[i + 1 :])
        left = gpu_run.TOTAL_SECONDS - spent
        given = min(each.seconds, left - reserve) if reserve else left
        assert given >= 0.4 * each.seconds, each.name
        spent += given
    assert spent <= gpu_run.TOTAL_SECONDS <= 530
    assert sum(each.seconds for each in gpu_check.SECTIONS[:-1]) <= gpu_run.TOTAL_SECONDS - 110, (
        "the bench gets two minutes"
    )


@pytest.mark.parametrize(("words", "said"), [(["--only", "build,bonch"], "bonch"), ([], "is not empty")])
def test_impossible_options_are_refused(words, said, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").touch()
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path / "out"), *words])
    assert said in capsys.readouterr().err


def test_the_commands_of_a_gpu_run(tmp_path, monkeypatch):
    """Nothing is started: the commands of every section are read as words."""
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/opt/cuda/bin/{name}")
    check = gpu_run.Check(tmp_path, peers=["lorafusion=/somewhere"], broken={"triton"})
    text = {
        each.name: [" ".join(command.argv) for step in each.commands(check, 100) for command in step]
        for each in gpu_check.SECTIONS
    }
    assert "setup.py build_ext --inplace" in text["build"][0] and "LORA_KERNELS_CUDA=1" in text["build"][0]
    assert all((ROOT / word).exists() for words in text["tests"] for word in words.split() if word.startswith("tests/"))
    assert [words for words in text["tests"] if "--backend" in words] == [text["tests"][0]], "triton is broken"
    assert {words.split("gpu_smoke.py ")[1].split()[0] for words in text["smoke"]} == {"cuda"} and len(
        text["smoke"]
    ) > 9
    assert {words.split("--tool ")[1].split()[0] for words in text["sanitizer"]} == {
        "memcheck",
        "racecheck",
        "synccheck",
    }
    assert [words.split()[-1] for words in text["sanitizer"] if "memcheck" in words] == ["cuda", "triton"]
    hopper, sweep = text["bench"]
    assert "--suite hopper" in hopper and "--peer lorafusion=/somewhere" in hopper and "--without triton" in hopper
    assert "--suite sweep" in sweep and "--device cuda" in sweep
    for words in (*text["bench"], *text["endurance"]):
        kind = "bench" if " bench " in words else "endurance"
        assert _parses(kind, words), words


def _parses(kind: str, words: str) -> bool:
    """Return whether the command's own parser takes the words."""
    if kind == "bench":
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        parser.parse_args(words.split(" bench ")[1].split())
    else:
        endurance.parser().parse_args(words.split("benchmarks.endurance ")[1].split())
    return True


@pytest.mark.slow
def test_dry_run_on_the_cpu(tmp_path):
    """The shell script, with the sections that are quick on a CPU."""
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out"), "--device", "cpu"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", "device,smoke,endurance,bench"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: row["result"] for name, row in rows(tmp_path / "out").items()} == dict.fromkeys(
        ("device", "smoke", "endurance", "bench"), "ok"
    )
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert document["timings"] and all(entry["green"] for entry in document["gate"])
    assert "no faults" in (tmp_path / "out" / "log.txt").read_text()
