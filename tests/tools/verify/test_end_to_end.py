"""The whole of ``verify`` on a GPU that the CPU plays, in real processes, and the choice that follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from support.fake_gpu import backend, call, fake_gpu
from support.paths import ROOT, SUPPORT

from lora_kernels.backends import dispatch
from lora_kernels.evidence import file, find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VERDICTS = {
    "composite": "right",
    "slower": "right",
    "compiles_slowly": "right",
    "wrong": "wrong",
    "stuck": "stuck",
    "killed": "broken",
    "hangs_when_timed": "stuck",
}
"""The back-ends of support/verify_on_cpu.py, and what is found out about each."""
SHAPE = {"M": 128, "N": 48, "K": 64}


def verify(home: Path, back_ends: str, *words: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XDG_CACHE_HOME": str(home), "BACK_ENDS": back_ends, "COMPILES_FOR": "8", "PYTHONPATH": paths}
    for name in (find.VARIABLE, "RANK"):
        env.pop(name, None)
    argv = [sys.executable, str(SUPPORT / "verify_on_cpu.py"), "verify", "--shapes", "128x64x48:16", "--dropout", "0"]
    argv += ["--adapters", "x"]
    return subprocess.run([*argv, *words], env=env, capture_output=True, text=True, timeout=240)


def chosen(out: Path, *names: str) -> str:
    """Return the choice for the forward that was timed, among some of the back-ends, by the evidence in `out`."""
    with fake_gpu(out.parent, *(backend(name) for name in names)), pytest.MonkeyPatch.context() as patch:
        patch.setenv(find.VARIABLE, str(out))
        for name in names:
            dispatch.load(name).kernel_class = lambda call: "all"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dispatch.automatic(call(**SHAPE))


def test_every_verdict_and_the_choice_that_follows(tmp_path: Path) -> None:
    out = tmp_path / "evidence.json"
    done = verify(tmp_path, " ".join(VERDICTS), "--timeout", "6", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    kept = file.read(out)
    found = {key.split()[0]: verdict.result for key, verdict in kept.verdicts.items()}
    assert found == VERDICTS
    why = {key.split()[0]: verdict.why for key, verdict in kept.verdicts.items()}
    assert "wait for the kernels: no end after 6 s" in why["stuck"] and "killed by SIGSEGV" in why["killed"]
    assert "128x64x48:16 p=0 forward: hangs_when_timed: timing: no end after 6 s" in why["hangs_when_timed"]
    ratios = kept.timings[file.bucket_of(call(**SHAPE))].ratios
    assert {"composite", "slower", "compiles_slowly", "eager", "addmm_"} <= set(ratios)
    assert not {name for name, result in VERDICTS.items() if result != "right"} & set(ratios)
    assert "not used: stuck forward all bfloat16+bfloat16: stuck" in done.stdout
    assert list(tmp_path.glob("lora_kernels/*")) == [], "the user's cache is not touched"
    assert chosen(out, "stuck", "compiles_slowly", "wrong", "killed", "slower") == "compiles_slowly"
    assert chosen(out, "slower") == "eager", "slower is slower than eager"
    assert chosen(tmp_path / "none.json", "compiles_slowly", "composite") == "composite", "without evidence"


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    """Also where that was killed, and nothing could end its processes."""
    events, pid = tmp_path / "events", tmp_path / "pid"
    os.mkfifo(events)  # the process waits here for a reader
    start = (
        "import json, os, subprocess, sys; job = json.dumps({'parent': os.getpid()})\n"
        "argv = [sys.executable, '-m', 'lora_kernels.tools.verify.child', job, sys.argv[1]]\n"
        "child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "open(sys.argv[2], 'w').write(str(child.pid))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", start, str(events), str(pid)], env=env, check=True)
    child = Path("/proc", pid.read_text(), "stat")
    for _ in range(600):
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(int(pid.read_text()), 9)
    pytest.fail("the process goes on alone")
