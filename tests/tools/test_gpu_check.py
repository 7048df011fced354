"""scripts/gpu_check.py with its sections, processes and what was built before: order, time, what hangs, the files that
are kept, and a dry run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import llama_run
from support.paths import ROOT

from benchmarks import endurance
from lora_kernels.bench import run as bench
from lora_kernels.bench.shapes import NAMED
from lora_kernels.evidence import file, identity
from lora_kernels.evidence.file import Evidence, Verdict
from lora_kernels.testing.watch import STUCK

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "scripts"))
    gpu_check, gpu_run, gpu_sections, gpu_prebuilt = (
        importlib.import_module(name) for name in ("gpu_check", "gpu_run", "gpu_sections", "gpu_prebuilt")
    )

Command, Section = gpu_run.Command, gpu_sections.Section
NOTHING = Section("build", 1, lambda check, seconds: [])


def says(code: str, **kwargs) -> Command:
    """Return a command that runs Python code."""
    return Command([sys.executable, "-c", code], **kwargs)


def section(name: str, *steps: list[Command], share: float = 20, first: bool = False) -> Section:
    return Section(name, share, lambda check, seconds: list(steps), first)


def check(out: Path, *sections: Section, total: float = 60, build: Section = NOTHING) -> int:
    """Run sections in this order and return the exit status."""
    return gpu_check.main([str(out), *(each.name for each in sections), "--total", str(total)], sections, (), build)


def results(out: Path) -> dict[str, str]:
    """Return the results of the sections, in the order in which they ran, without that of `NOTHING`."""
    rows = json.loads((out / "check.json").read_text())["rows"]
    return {row["section"]: row["result"] for row in rows if row["result"] != "nothing to do"}


def put_evidence(path: Path, verdicts: dict[str, str], sources: str = "abc") -> None:
    """Write a file of evidence with these verdicts, as `verify` does."""
    here = llama_run.IDENTITY._replace(sources=sources)
    file.add(path, Evidence(here, {key: Verdict(result, "", "2026-11-28") for key, result in verdicts.items()}))


def test_a_failing_section_stops_nothing(tmp_path, capsys):
    def broken(check, seconds):
        raise RuntimeError("no such luck")

    sections = (
        section("works", [says("print('fine')")]),
        section("fails", [says("raise SystemExit(3)")]),
        Section("raises", 5, broken),
        section("absent", [Command(["no-such-program-at-all"])]),
        section("slow", [says("import time; time.sleep(60)", seconds=1)]),
        section("either", [says("exit(1)")], [says("print('second way')")], [says("1/0")], first=True),
        section("last", [says("print('the end')")]),
    )
    assert check(tmp_path / "out", *sections) == 1
    assert results(tmp_path / "out") == {
        "works": "ok",
        "fails": "exit status 3",
        "raises": "RuntimeError: no such luck",
        "absent": "cannot be started",
        "slow": "out of time",
        "either": "ok",
        "last": "ok",
    }
    text = capsys.readouterr().out.strip().splitlines()
    assert text[-9].split() == ["section", "seconds", "result"] and text[-1].split()[::2] == ["last", "ok"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "fine" in log and "second way" in log and "the end" in log and str(ROOT) not in log
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["check.json", "log.txt"]


def test_sections_run_in_the_order_given_and_the_build_comes_first(tmp_path):
    sections = (section("one", [says("")]), section("two", [says("")]), section("three", [says("")]))
    build = section("build", [says("")])
    assert gpu_check.main([str(tmp_path / "a"), "three", "one"], sections, (), build) == 0
    assert list(results(tmp_path / "a")) == ["build", "three", "one"]
    assert gpu_check.main([str(tmp_path / "b"), "--total", "60"], sections, ("two", "three"), build) == 0
    assert list(results(tmp_path / "b")) == ["build", "two", "three"]


@pytest.mark.slow
def test_the_total_is_kept_whatever_hangs(tmp_path, monkeypatch):
    """What runs ignores all signals but SIGKILL."""
    grace = [(number, seconds / 4) for number, seconds in gpu_run.GRACE]
    monkeypatch.setattr(gpu_run, "GRACE", grace)  # so that this test is quick
    monkeypatch.setattr(gpu_run, "ENDING", gpu_run.ENDING / 4)
    monkeypatch.setattr(gpu_check, "ENDING", gpu_run.ENDING)
    deaf = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(60)"
    sections = (section("one", [says(deaf)], share=1), section("two", [says(deaf)], share=2))
    start = time.monotonic()
    assert check(tmp_path / "out", *sections, section("last", [says("")], share=0.1), total=gpu_run.ENDING + 3) == 1
    assert time.monotonic() - start < gpu_run.ENDING + 3
    assert results(tmp_path / "out") == {
        "one": "out of time",
        "two": "out of time",
        "last": "not run: the time is over",
    }


def test_a_section_leaves_its_time_to_those_after_it(tmp_path):
    given: dict[str, float] = {}

    def noted(name):
        return Section(name, 50, lambda check, seconds: given.update({name: seconds}) or [])

    check(tmp_path / "out", noted("one"), noted("two"), total=110, build=section("build", share=100))
    assert 40 < given["one"] < 51 and 90 < given["two"] <= 100


def test_a_step_for_which_no_time_is_left_is_not_started(tmp_path):
    slow = says("import time; time.sleep(60)")
    check(tmp_path / "out", section("slow", [slow], [says("1/0", label="next")]), total=gpu_run.ENDING + 1.5)
    assert results(tmp_path / "out")["slow"] == "out of time; no time left for next"


def test_commands_of_a_step_run_at_once(tmp_path):
    step = [says("import time; time.sleep(2)") for _ in range(3)]
    start = time.monotonic()
    assert check(tmp_path / "out", section("tests", step)) == 0
    assert time.monotonic() - start < 5


def test_a_backend_without_a_right_class_is_not_called_again(tmp_path):
    """One class that is right is reason enough to call the rest."""
    out, called = tmp_path / "out", []
    verdicts = {
        "cuda forward tickets bfloat16+bfloat16": "stuck",
        "triton forward tickets bfloat16+bfloat16": "broken",
        "triton backward tickets bfloat16+bfloat16": "right",
    }

    def verify(check, seconds):
        put_evidence(check.evidence, verdicts)
        return []

    def later(check, seconds):
        called.extend(check.backends())
        return [[says("import os; print('reads', os.environ['LORA_KERNELS_EVIDENCE'])")]]

    assert check(out, Section("verify", 1, verify), Section("tests", 9, later)) == 0
    assert called == ["composite", "triton"]
    assert json.loads((out / "check.json").read_text())["verdicts"] == verdicts
    assert f"reads {out / 'evidence.json'}" in (out / "log.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["check.json", "evidence.json", "log.txt"], "no lock is left"


def test_an_earlier_run_counts_with_the_same_kernels_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_EVIDENCE", str(tmp_path / "b.json"))
    check = gpu_run.Check(tmp_path / "out", 300)
    assert check.broken() == set()
    put_evidence(tmp_path / "b.json", {"cuda forward tickets x": "stuck"}, identity.source_hash())
    assert check.broken() == {"cuda"}
    put_evidence(tmp_path / "b.json", {"cuda forward tickets x": "stuck"}, "other kernels")
    assert check.broken() == set()


def test_a_stuck_command_is_run_again(tmp_path):
    """The same command runs while there is time, as often as it ends as stuck or is killed. Its output is one text."""
    marker = tmp_path / "turns"
    code = f"import pathlib; p = pathlib.Path({str(marker)!r}); n = len(p.read_text()) if p.exists() else 0\n"
    code += "p.write_text('x' * (n + 1)); print('turn', n); import os\n"
    code += "exit(3) if n == 0 else os.kill(os.getpid(), 11) if n == 1 else exit(0)"
    assert check(tmp_path / "out", section("numbers", [says(code, again=6)]), section("no", [says("exit(3)")])) == 1
    assert results(tmp_path / "out") == {"numbers": "ok", "no": "exit status 3"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.index("turn 0") < log.index("exit status 3: run again") < log.index("turn 1") < log.index("turn 2")
    assert gpu_run.STUCK == STUCK


def test_output_can_be_read_while_commands_run(tmp_path):
    """A run that is cut off leaves the output of ended commands and the last lines of running ones."""
    code = "print('shape 17', flush=True); import time; time.sleep(60)"
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import gpu_check as g, gpu_run as r\n"
        f"step = [r.Command([sys.executable, '-c', code]) for code in ({code!r}, 'print(1234)')]\n"
        f"build = g.Section('build', 1, lambda *_: [])\n"
        f"g.main([{str(tmp_path / 'out')!r}, 'slow'], (g.Section('slow', 60, lambda *_: [step]),), (), build)\n"
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


def test_without_a_gpu_nothing_is_tried_on_it(tmp_path):
    vital = says("print('none'); exit(1)", vital="torch sees no GPU")
    never = section("verify", [says("1/0")]), section("numbers", [says("1/0")])
    assert check(tmp_path / "out", section("device", [vital]), *never) == 1
    not_run = dict.fromkeys(("verify", "numbers"), "not run: torch sees no GPU")
    assert results(tmp_path / "out") == {"device": "torch sees no GPU"} | not_run


def test_the_last_way_to_build_is_reported(tmp_path):
    """Without the CUDA part the rest can be measured, but the section counts as failed."""
    steps = [says("exit(1)")], [Command(says("").argv, label="without CUDA")]
    assert check(tmp_path / "out", build=section("build", *steps, first=True)) == 1
    assert results(tmp_path / "out")["build"] == "exit status 1; at last without CUDA"


@pytest.mark.slow
def test_a_child_of_a_slow_command_is_ended_too(tmp_path):
    marker = tmp_path / "still-there"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(marker)!r}).touch()"
    slow = says(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", seconds=0.7)
    check(tmp_path / "out", section("slow", [slow]))
    time.sleep(4)
    assert not marker.exists()


def test_the_files_stay_within_the_limits(tmp_path):
    for name in (
        "check.json",
        "log.txt",
        "evidence.json",
        ".evidence.json.lock",
        *(f"extra-{i}.png" for i in range(8)),
    ):
        (tmp_path / name).write_text("x")
    for name in ("sweep.json", "log.txt"):
        with (tmp_path / name).open("ab") as file:
            file.truncate(gpu_check.MAX_BYTES + 1)
    gpu_check.keep_within_limits(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == gpu_check.MAX_FILES and {"check.json", "log.txt", "evidence.json"} <= left
    assert "sweep.json" not in left and ".evidence.json.lock" not in left
    assert (tmp_path / "log.txt").stat().st_size < gpu_check.MAX_BYTES


def test_long_logs_keep_their_beginning_and_their_end():
    text = gpu_run.trimmed(b"begin " + b"x" * 3_000_000 + b" end")
    assert text.startswith("begin ") and text.endswith(" end") and len(text) < gpu_run.LOG_BYTES + 100
    assert 60 * gpu_run.LOG_BYTES < gpu_check.MAX_BYTES, "the log of all commands together is kept"
    assert gpu_run.trimmed(b"short") == "short"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["device", "bonch"], "bonch"),
        (["--total", "5"], "seconds are kept"),
        (["--prebuilt", "nowhere"], "gpu_prepare"),
    ],
)
def test_impossible_options_are_refused(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path / "out"), *words])
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "old.txt").touch()
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err


def checkout(root: Path) -> Path:
    """Make a checkout with native sources, and beside it a folder with a native module that was built from them."""
    for name in ("csrc", "lora_kernels", "made/native", "made/triton"):
        (root / name).mkdir(parents=True)
    (root / "csrc" / "a.cpp").write_text("int a;")
    (root / "made" / "native" / f"_C{gpu_prebuilt.suffix()}").write_text("a module")
    gpu_prebuilt.write_manifest(root / "made", {}, root)
    return root / "made"


def test_what_was_built_before_is_used(tmp_path, monkeypatch):
    """No build is run, the native modules are in the package, and every command finds the cache."""
    made = checkout(tmp_path)
    put = gpu_prebuilt.put_in_place
    monkeypatch.setattr(gpu_prebuilt, "put_in_place", lambda folder: put(folder, tmp_path))
    sections = [section("verify", [says("import os; print('cache', os.environ['TRITON_CACHE_DIR'])")])]
    words = [str(tmp_path / "out"), "--total", "60", "--prebuilt", str(made), "verify"]
    assert gpu_check.main(words, sections, (), section("build", [says("1/0")])) == 0
    assert results(tmp_path / "out") == {"verify": "ok"}
    assert f"cache {made / 'triton'}" in (tmp_path / "out" / "log.txt").read_text()
    assert [path.name for path in (tmp_path / "lora_kernels").iterdir()] == [f"_C{gpu_prebuilt.suffix()}"]


def test_what_was_built_for_something_else_is_refused(tmp_path):
    made = checkout(tmp_path)
    (tmp_path / "csrc" / "a.cpp").write_text("int a = 1;")
    with pytest.raises(gpu_prebuilt.Unusable, match="csrc/ has changed"):
        gpu_prebuilt.put_in_place(made, tmp_path)
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(manifest | {"suffix": ".cpython-399.so"}))
    with pytest.raises(gpu_prebuilt.Unusable, match="cpython-399"):
        gpu_prebuilt.put_in_place(made, tmp_path)
    assert not list((tmp_path / "lora_kernels").iterdir())


def commands(check, seconds: float = 100) -> dict[str, list[str]]:
    """Return the commands of every section as words. Nothing is started."""
    every = (gpu_sections.BUILD, *gpu_sections.SECTIONS)
    return {
        each.name: [" ".join(command.argv) for step in each.commands(check, seconds) for command in step]
        for each in every
    }


def test_the_commands_of_a_gpu_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sections.shutil, "which", lambda name, path=None: f"/opt/cuda/bin/{name}")
    check = gpu_run.Check(tmp_path, 300, peers=["lorafusion=/somewhere"])
    put_evidence(check.evidence, {"cuda forward tickets x": "stuck", "triton forward tickets x": "right"})
    text = commands(check)
    assert "setup.py build_ext --inplace" in text["build"][0] and "LORA_KERNELS_CUDA=1" in text["build"][0]
    assert all((ROOT / word).exists() for words in text["tests"] for word in words.split() if word.startswith("tests/"))
    named = [words.split("--backend ")[1].split()[0] for words in text["tests"] if "--backend" in words]
    assert named == ["composite", "triton"], "cuda is broken"
    tools = {words.split("--tool ")[1].split()[0] for words in text["sanitizer"]}
    assert tools == {"memcheck", "racecheck", "synccheck"} and len(text["sanitizer"]) == 6
    for name in ("verify", "tune"):
        assert f"--out {tmp_path / 'evidence.json'} --seconds 85 --timeout 40" in text[name][0]
    assert "--quick" in text["verify"][0] and "--tune" in text["tune"][0]
    (numbers,), (suite,), (sweep,) = text["numbers"], text["suite"], text["sweep"]
    assert "--suite llama" in suite and "--peer lorafusion=/somewhere" in suite
    assert set(gpu_sections.FIRST_SHAPES) <= NAMED.keys() and "--suite sweep --rounds" in sweep
    for words in (numbers, suite, sweep):
        assert "--without cuda --without eager" in words and "--stuck 40 --resume" in words
        _parse("bench", words)
    for words in text["endurance"]:
        _parse("endurance", words)


def _parse(kind: str, words: str) -> None:
    """Read the words with the command's own parser, which exits if it does not take them."""
    parser = endurance.parser() if kind == "endurance" else argparse.ArgumentParser()
    if kind == "bench":
        bench.add_arguments(parser)
    parser.parse_args(words.split(f"{kind} ", 1)[1].split())


def test_verify_takes_its_words(tmp_path):
    options = pytest.importorskip("lora_kernels.tools.verify.options", reason="this checkout has no verify")
    for name in ("verify", "tune"):
        (words,) = commands(gpu_run.Check(tmp_path, 300))[name]
        options.add_arguments(parser := argparse.ArgumentParser())
        args = parser.parse_args(words.split("verify ", 1)[1].split())
        assert not isinstance(options.wanted(args), str)


@pytest.mark.parametrize(
    ("total", "names"), [(230, ["verify", "numbers", "tests"]), (290, ["verify", "tune"]), (300, ["suite"])]
)
def test_the_three_runs_of_docs_leave_each_section_time(total, names):
    """docs/measuring.md names them. No section gets much less than it usually wants."""
    shares = {each.name: each.share for each in gpu_sections.SECTIONS}
    scale = (total - gpu_run.ENDING) / sum(shares[name] for name in names)
    assert scale > 0.9
    line = f"{' '.join(names)} --total {total} --prebuilt"
    assert line in (ROOT / "docs" / "measuring.md").read_text()


@pytest.mark.slow
def test_dry_run_on_the_cpu(tmp_path):
    """The shell script, with the sections that are quick on a CPU."""
    (made := tmp_path / "made").mkdir()
    (made / "native").mkdir()
    gpu_prebuilt.write_manifest(made, {})
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "device", "verify", "numbers", "endurance", "--prebuilt", str(made), "--total", "200"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "out") == dict.fromkeys(("device", "numbers", "endurance"), "ok")
    document = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert document["timings"] and all(entry["green"] for entry in document["gate"])
    assert "no faults" in (tmp_path / "out" / "log.txt").read_text()
