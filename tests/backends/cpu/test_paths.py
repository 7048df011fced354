"""An instruction set that the processor has and the installation lacks is told; one OpenMP runtime serves all."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lora_kernels
from lora_kernels import _C
from lora_kernels.backends import dispatch
from lora_kernels.backends.cpu import openmp, paths
from lora_kernels.core import built

X, W, A, B = (torch.ones(shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))


@pytest.fixture
def built_by_old_gcc(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        cpu_paths = staticmethod(lambda: {"avx512_bf16": (False, True), "avx512": (False, False), "avx2": (True, True)})
        cpu_isas = staticmethod(lambda: ["avx2"])

    monkeypatch.setattr(paths, "_C", Old)
    monkeypatch.setattr(built, "left_out", lambda path: f"g++ 9 knows no -m{path.replace('_', '')}")


def test_what_is_here_and_what_is_compiled_agree_with_what_can_be_used() -> None:
    assert [name for name, state in _C.cpu_paths().items() if state == (True, True)] == _C.cpu_isas()
    assert _C.cpu_paths()["baseline"] == (True, True)


def test_explain_tells_that_a_better_instruction_set_was_not_compiled(built_by_old_gcc: None) -> None:
    assert paths.lacking() == {"avx512_bf16": "g++ 9 knows no -mavx512bf16"}
    said = str(lora_kernels.explain(X, W, A, B))
    assert "cpu: runs avx2; this processor also has avx512_bf16" in said and "g++ 9 knows no -mavx512bf16" in said
    assert built.reinstall() in said


def test_a_complete_build_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "cpu_paths", lambda: {"avx2": (True, False), "baseline": (True, True)})
    monkeypatch.setattr(_C, "cpu_isas", lambda: ["baseline"])
    assert paths.told() == "" and lora_kernels.explain(X, W, A, B).evidence == {}


def test_the_first_call_without_kernels_tells_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if name == "cpu":
            raise ImportError("the native CPU kernels are missing (no compiler)")
        return loaded(name)

    loaded = dispatch.load
    monkeypatch.setattr(dispatch, "load", load)
    dispatch.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"plain torch operations here, because .* missing \(no compiler\)"):
            y = lora_kernels.lora_linear(X, W, A, B, scale=1.0)
    finally:
        dispatch.cache_clear()
    assert torch.equal(y, X @ W.T + X @ A.T @ B.T)


CHILD = """
import ctypes, importlib.util, pathlib, sys, types
sys.modules["torch"] = stand_in = types.ModuleType("torch")
stand_in.__file__ = sys.argv[1]
spec = importlib.util.spec_from_file_location("openmp", sys.argv[2])
openmp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(openmp)
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel") and openmp.runtimes() == []
openmp.provide()
assert hasattr(ctypes.CDLL(None), "GOMP_parallel"), "no runtime was loaded for all"
print(*openmp.runtimes(), sep="\\n")
openmp.provide()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_a_runtime_that_torch_keeps_to_itself_is_lent_to_the_kernels() -> None:
    """Without it `_C` could not be imported, since it is linked to no runtime."""
    used = openmp.runtimes()  # of this process, in which other packages may have one of their own
    command = [
        sys.executable,
        "-c",
        CHILD,
        torch.__file__,
        openmp.__file__,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (lent,) = done.stdout.split()
    assert lent in used
