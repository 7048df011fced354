"""Importing the package is quick. It loads no Triton, asks nothing of CUDA or the environment, and warns of nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPT = """
import os, sys, time, warnings
warnings.simplefilter("error")
import torch
reads = []
class Watch(dict):
    def get(self, key, default=None): reads.append(key); return os.environ.get(key, default)
    def __getitem__(self, key): reads.append(key); return os.environ[key]
environ = os.environ
torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(AssertionError("CUDA was initialised"))
before = set(sys.modules)
os.environ = Watch(environ)
start = time.process_time()  # processor time: what other processes do does not count
import lora_kernels
seconds = time.process_time() - start
os.environ = environ
assert "triton" not in sys.modules, "triton was imported"
assert not torch.cuda.is_initialized()
assert not reads, f"environment read: {reads}"
heavy = {m.split(".")[0] for m in set(sys.modules) - before} - {"lora_kernels"} - set(sys.stdlib_module_names)
assert heavy <= {"torch"}, f"imported beside torch: {heavy}"
print(seconds)
"""


def test_import_is_quick_and_does_nothing():
    for _ in range(3):  # on a busy machine the processor time of this process grows too
        run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        if float(run.stdout) <= 0.05:
            return
    pytest.fail(f"the import took {float(run.stdout):.3f} s, three times more than 0.05 s")


def test_no_folder_of_tests_can_be_imported_as_a_library():
    """Where PEFT is not installed, `import peft` would otherwise find the folder tests/peft and no test would be
    skipped."""
    assert ROOT / "tests" not in [Path(entry).resolve() for entry in sys.path]


@pytest.mark.parametrize("name", ["group", "initialise", "parallel", "quant"])
def test_a_public_module_is_an_attribute_of_the_package(name):
    """``import lora_kernels`` is enough for ``lora_kernels.initialise.pissa``, in a process that imports no more."""
    script = f"import lora_kernels; print(lora_kernels.{name}.__name__)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == f"lora_kernels.{name}", run.stderr
