"""scripts/gpu_check.py: sections, their time, what is kept, the table; and a dry run of what it calls."""

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

from lora_kernels.bench import endurance, run

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu_check  # dataclasses look their module up
spec.loader.exec_module(gpu_check)

Command, Section = gpu_check.Command, gpu_check.Section


def says(code: str, **kwargs) -> Command:
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
        section("either", [says("raise SystemExit(1)")], [says("print('second way')")], [says("1/0")], first=True),
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


def test_commands_of_a_step_run_at_once_and_a_broken_backend_is_not_called_again(tmp_path):
    called = []

    def later(check, seconds):
        called.extend(check.backends())
        return []

    step = [
        says("import time; time.sleep(2)"),
        says(
            "import time; time.sleep(2); print('CUDA error: an illegal memory access was encountered'); exit(1)",
            backend="triton",
        ),
    ]
    start = time.monotonic()
    assert gpu_check.main([str(tmp_path / "out")], (section("tests", step), Section("bench", 9, later))) == 1
    assert time.monotonic() - start < 3.9
    assert called == ["cuda"]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["broken"] == ["triton"]
    assert "triton exit status 1 (triton is not called again)" in rows(tmp_path / "out")["tests"]["result"]


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
    with (tmp_path / "sweep.json").open("wb") as file:
        file.truncate(gpu_check.MAX_BYTES + 1)
    gpu_check.keep_within_limits(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == gpu_check.MAX_FILES and {"check.json", "log.txt", "hopper.json"} <= left
    assert "sweep.json" not in left


def test_long_logs_keep_their_beginning_and_their_end():
    text = gpu_check.trimmed(b"begin " + b"x" * 3_000_000 + b" end")
    assert text.startswith("begin ") and text.endswith(" end") and len(text) < gpu_check.LOG_BYTES + 100
    assert gpu_check.trimmed(b"short") == "short"


def test_the_budgets_fit_nine_minutes():
    """Whatever takes all its time: what is promised to the later sections, and the whole."""
    spent = 0.0
    for i, each in enumerate(gpu_check.SECTIONS):
        reserve = 0.5 * sum(later.seconds for later in gpu_check.SECTIONS[i + 1 :])
        left = gpu_check.TOTAL_SECONDS - spent
        given = min(each.seconds, left - reserve) if reserve else left
        assert given >= 0.4 * each.seconds, each.name
        spent += given
    assert spent <= gpu_check.TOTAL_SECONDS <= 530
    assert sum(each.seconds for each in gpu_check.SECTIONS[:-1]) <= gpu_check.TOTAL_SECONDS - 110, (
        "the bench gets two minutes"
    )


@pytest.mark.parametrize(("words", "said"), [(["--only", "build,bonch"], "bonch"), ([], "is not empty")])
def test_options_that_cannot_be(words, said, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").touch()
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path / "out"), *words])
    assert said in capsys.readouterr().err


def test_what_a_gpu_run_calls(tmp_path, monkeypatch):
    """Every command of every section, as words: nothing is started."""
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/opt/cuda/bin/{name}")
    check = gpu_check.Check(tmp_path, peers=["lorafusion=/somewhere"], broken={"triton"})
    text = {
        each.name: [" ".join(command.argv) for step in each.commands(check, 100) for command in step]
        for each in gpu_check.SECTIONS
    }
    assert "setup.py build_ext --inplace" in text["build"][0] and "LORA_KERNELS_CUDA=1" in text["build"][0]
    assert any("-m pytest tests -m not gpu" in words for words in text["tests"])
    assert [words for words in text["tests"] if "--backend" in words] == [text["tests"][0]], "triton is broken"
    assert {words.split("--tool ")[1].split()[0] for words in text["sanitizer"]} == {
        "memcheck",
        "racecheck",
        "synccheck",
    }
    hopper, sweep = text["bench"]
    assert "--suite hopper" in hopper and "--peer lorafusion=/somewhere" in hopper and "--without triton" in hopper
    assert "--suite sweep" in sweep and "--device cuda" in sweep
    for words in (*text["bench"], *text["endurance"]):
        kind = "bench" if " bench " in words else "endurance"
        assert _parses(kind, words), words


def _parses(kind: str, words: str) -> bool:
    """Whether the command's own parser takes the words."""
    if kind == "bench":
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        parser.parse_args(words.split(" bench ")[1].split())
    else:
        endurance.parser().parse_args(words.split("lora_kernels.bench.endurance ")[1].split())
    return True


def test_dry_run_on_the_cpu(tmp_path):
    """The shell script, with the sections that are quick on a CPU."""
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out"), "--device", "cpu"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [*command, "--only", "device,endurance,bench"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: row["result"] for name, row in rows(tmp_path / "out").items()} == dict.fromkeys(
        ("device", "endurance", "bench"), "ok"
    )
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert document["timings"] and all(entry["green"] for entry in document["gate"])
    assert "no faults" in (tmp_path / "out" / "log.txt").read_text()
