"""The whole of ``verify`` on a GPU that the CPU plays, in real processes, and the choice that follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.fake_gpu import IDENTITY, backend, call, fake_gpu
from support.paths import ROOT, SUPPORT

from lora_kernels.backends import dispatch
from lora_kernels.evidence import file, find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VERDICTS = {
    "composite": "right",
    "fast": "right",
    "slow": "right",
    "slower": "right",
    "compiles_slowly": "right",
    "wrong": "wrong",
    "unsteady": "wrong",
    "untidy": "wrong",
    "stuck": "stuck",
    "broken": "broken",
    "killed": "broken",
    "lost": "broken",
    "hangs_when_timed": "stuck",
}
"""The back-ends of support/verify_on_cpu.py, and what is found out about each."""
SHAPE = {"M": 128, "N": 48, "K": 64}


def verify(home: Path, back_ends: str, *words: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XDG_CACHE_HOME": str(home), "BACK_ENDS": back_ends, "COMPILES_FOR": "5", "PYTHONPATH": paths}
    for name in (find.VARIABLE, "RANK"):
        env.pop(name, None)
    argv = [sys.executable, str(SUPPORT / "verify_on_cpu.py"), "verify", "--shapes", "128x64x48:16", "--dropout", "0"]
    return subprocess.run([*argv, *words], env=env, capture_output=True, text=True, timeout=240)


def chosen(home: Path, *names: str) -> str:
    """Return the choice for the forward that was timed, among some of the back-ends."""
    with fake_gpu(home, *(backend(name) for name in names)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            dispatch.load(name).kernel_class = lambda call: "all"
        return dispatch.automatic(call(**SHAPE))


def test_every_verdict_and_the_choice_that_follows(tmp_path: Path) -> None:
    done = verify(tmp_path, " ".join(VERDICTS), "--timeout", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "lora_kernels").glob("*.json")
    kept = file.read(path)
    found = {key.split()[0]: verdict.result for key, verdict in kept.verdicts.items()}
    assert found == VERDICTS
    why = {key.split()[0]: verdict.why for key, verdict in kept.verdicts.items()}
    assert "wait for the kernels: no end after 3 s" in why["stuck"] and "killed by SIGSEGV" in why["killed"]
    assert "out of resource" in why["broken"] and "no longer answers" in why["lost"]
    assert "128x64x48:16 p=0 forward: hangs_when_timed: timing: no end after 3 s" in why["hangs_when_timed"]
    ratios = kept.timings[file.bucket_of(call(**SHAPE))].ratios
    assert {"composite", "fast", "slow", "slower", "compiles_slowly", "eager", "addmm_"} <= set(ratios)
    assert not {name for name, result in VERDICTS.items() if result != "right"} & set(ratios)
    assert chosen(tmp_path, "fast", "stuck", "slow") == "fast"
    assert chosen(tmp_path, "stuck", "slow", "wrong", "broken") == "slow", "the fastest that is right"
    assert chosen(tmp_path, "slower") == "eager", "slower is slower than eager"
    assert "not used: stuck forward all bfloat16+bfloat16: stuck" in done.stdout


def test_evidence_is_checked_and_goes_stale_with_the_sources(tmp_path: Path) -> None:
    out = tmp_path / "evidence.json"
    assert verify(tmp_path, "composite", "--check", "--out", str(out)).returncode == 1
    assert verify(tmp_path, "composite", "--out", str(out)).returncode == 0
    assert verify(tmp_path, "composite", "--check", "--out", str(out)).returncode == 0
    kept = file.read(out)
    out.unlink()
    file.add(out, kept.__class__(IDENTITY._replace(sources="changed"), kept.verdicts, kept.timings))
    stale = verify(tmp_path, "composite", "--check", "--out", str(out))
    assert stale.returncode == 1 and "sources changed then, abc now" in " ".join(stale.stdout.split())
    assert list(tmp_path.glob("lora_kernels/*.json")) == []
