"""The CPU kernels read and write no wrong memory and do nothing undefined: a build with ASan and UBSan runs tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the build takes minutes on a machine that does other work too
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not in a source tree"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libasan is preloaded as on Linux"),
]
CHILD = ROOT / "tests" / "helpers" / "support" / "sanitized_child.py"


def libraries() -> list[str]:
    """Return what is preloaded: libasan, and libstdc++, whose exceptions libasan looks up when it starts."""
    try:
        found = [
            subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in ("libasan.so", "libstdc++.so.6")
        ]
    except OSError as error:
        pytest.skip(f"there is no g++ here: {error}")
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ has no libasan here")
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a `_C` with ASan and UBSan."""
    libraries()
    folder = tmp_path_factory.mktemp("sanitized")
    more = {"LORA_KERNELS_SANITIZE": "address,undefined", "LORA_KERNELS_CUDA": "0", "CXX": "g++"}
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (module,) = (folder / "lora_kernels").glob("_C.*")
    return module


def run(module: Path, *words: str) -> subprocess.CompletedProcess[str]:
    more = {
        "LD_PRELOAD": " ".join(libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(CHILD), str(module), *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True)


def test_random_calls_do_nothing_undefined(sanitized):
    done = run(sanitized, "calls", "40")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "320 calls with" in done.stdout or "calls with baseline" in done.stdout


def test_tests_of_the_kernels_do_nothing_undefined(sanitized):
    words = "own_block or stay_inside or every_code or any_number_of_threads"
    files = [f"tests/backends/cpu/test_{name}.py" for name in ("native", "cpu_quant", "cpu_multi")]
    done = run(sanitized, "tests", words, *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout or "100%" in done.stdout


def test_a_read_beyond_an_operand_is_found(sanitized):
    done = run(sanitized, "overflow")
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
