"""Options, markers and fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The suite shares its cores with the compilers that it starts. Threads that wait should sleep, not spin. OpenMP reads
# this variable when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

# The `poison` fixture needs deterministic algorithms, and cuBLAS has them under this setting only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=("cuda", "cpu"), help="the device that tests/gpu runs on")
    parser.addoption("--backend", action="append", help="run tests/gpu for this back-end only")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and is skipped where there is none")
    config.addinivalue_line(
        "markers", "slow: emulated or interpreted GPU kernels, ahead-of-time compiles, long runs (make test-slow)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no GPU here (torch.cuda.is_available() is False)")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        from lora_kernels import _C

        metafunc.parametrize("isa", _C.cpu_isas(), indirect=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each back-end that runs on this machine's CPU."""
    from lora_kernels.backends import dispatch

    try:
        dispatch.load(request.param)
    except ImportError as error:
        pytest.skip(f"backend {request.param!r} is not built: {error}")
    return request.param


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that the native kernels can use on this machine. They use it during the test."""
    from lora_kernels import _C

    best = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(best)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch uses one thread. A test's small matrices gain nothing from more, and on a busy machine the threads wait for
    each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    """torch fills every new allocation with NaN (integers with their largest value), so that a read before the first
    write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def plan_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that stands in for the user's cache, where the evidence is kept with the measured plans."""
    from lora_kernels.evidence import find
    from lora_kernels.plans import choose

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(find.VARIABLE, raising=False)
    for clear in (find.forget, choose.cache_clear):
        clear()
    yield tmp_path
    for clear in (find.forget, choose.cache_clear):
        clear()
