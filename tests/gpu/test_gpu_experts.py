"""Experts on a GPU: values, gradients, bits, and one CUDA graph for every division of the rows.

``--device cpu`` runs the same tests with `eager`, which checks the tests where there is no GPU.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from support import judging
from support.experts_calls import Experts, check, experts, run_module
from torch import Tensor

from lora_kernels.core.operands import Call, Needs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

COUNTS = (400, 0, 90, 3, 17)


@pytest.fixture(scope="module")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device("cuda", 0) if pytestconfig.getoption("--device") == "cuda" else torch.device("cpu")


@pytest.fixture(scope="module")
def backend(device: torch.device) -> ModuleType:
    """Return `composite`, or `eager` on a CPU. Skip the test, with all reasons, where it does not serve the device."""
    name = "composite" if device.type == "cuda" else "eager"
    try:
        module = importlib.import_module(f"lora_kernels.backends.{name}")
    except ImportError as error:
        pytest.skip(f"{name} could not be loaded: {error}")
    if reasons := module.why_not(Call("forward_experts", device, torch.bfloat16, torch.bfloat16, 64, 64, 64, 16, True)):
        pytest.skip("; ".join(reasons))
    return module


def results(backend: ModuleType, m: Experts) -> dict[str, Tensor | None]:
    """Return what the back-end gives, without h, whose rows without an expert need not be written."""
    return {name: t for name, t in run_module(backend, m).items() if name != "h"}


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "peft"])
def test_results_are_right(backend, device, dtypes, bias: bool, layout: str, poison: None) -> None:
    m = experts(520, 264, 40, COUNTS, rest=9, dtype=dtypes[0], adapter_dtype=dtypes[1], p=0.1, bias=bias, layout=layout)
    check(m.to(device), results(backend, m.to(device)))


def test_results_have_the_same_bits_in_every_run(backend: ModuleType, device: torch.device) -> None:
    m = experts(520, 264, 16, COUNTS, rest=9, dtype=torch.bfloat16, p=0.1, bias=False).to(device)
    first = results(backend, m)
    for _ in range(20):
        again = results(backend, m)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_graph_serves_every_division_of_the_rows(backend: ModuleType, device: torch.device) -> None:
    """torch's grouped GEMM reads the numbers of rows on the GPU, as the kernels do."""
    if device.type != "cuda":
        pytest.skip("a CPU has no graphs")
    m = experts(512, 256, 16, COUNTS, rest=9, dtype=torch.bfloat16, p=0.1, bias=False).to(device)
    rows, needs, kept = m.rows, Needs(True, (True,), (True,)), {}

    def step() -> None:
        kept["y"], h = backend.forward_experts(m.x, m.base, m.adapter, rows, True)
        kept["dx"], kept["da"], kept["db"] = backend.backward_experts(m.dy, m.x, m.base, m.adapter, rows, h, needs)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for counts in (COUNTS, (0, 500, 0, 0, 0), (100, 100, 100, 100, 100), (0, 0, 0, 0, 0)):
        other = replace(m, counts=counts)
        rows.starts.copy_(other.rows.starts)
        graph.replay()
        check(other, kept)
