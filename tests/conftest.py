from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The suite shares its cores, with what it compiles at the least: threads that wait for others sleep rather than spin.
# Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

# Poisoned allocations need deterministic algorithms, which cuBLAS has under this setting only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=("cuda", "cpu"), help="what tests/test_gpu.py runs on")
    parser.addoption("--backend", action="append", help="of tests/test_gpu.py: this back-end only")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on an NVIDIA GPU, and is skipped where there is none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no GPU here (torch.cuda.is_available() is False)")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each back-end that runs on this machine's CPU, by name."""
    from lora_kernels.backends import dispatch

    try:
        dispatch.load(request.param)
    except ImportError as error:
        pytest.skip(f"backend {request.param!r} is not built: {error}")
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        from lora_kernels import _C

        metafunc.parametrize("isa", _C.cpu_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the native kernels can use on this machine."""
    from lora_kernels import _C

    best = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(best)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices as small as a test's gain nothing from more threads, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    """Every uninitialised allocation is filled with NaN (integers: with their largest value): what reads it before
    writing shows."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def plan_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory in place of the user's cache, where measured plans are kept."""
    from lora_kernels.plans import choose

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choose.cache_clear()
    yield tmp_path
    choose.cache_clear()
