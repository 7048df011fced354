"""benchmarks/host_path.py times the launches of the Triton back-ends without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)

CALL = "import benchmarks.host_path as h; print(*(row.microseconds for row in h.measure(rounds=100)))"


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc) for the stand-in driver")
def test_every_pass_is_timed_and_takes_the_host_less_than_a_millisecond() -> None:
    done = subprocess.run([sys.executable, "-c", CALL], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    times = [float(word) for word in done.stdout.split()]
    assert len(times) == 8
    assert all(0 < each < 1000 for each in times), times
