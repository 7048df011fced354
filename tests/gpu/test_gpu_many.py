"""Many adapters on a GPU: values, gradients, bits, and one CUDA graph for every division of the rows.

``--device cpu`` runs the same tests with `eager`, which checks the tests where there is no GPU.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import judging
from support.mixed_rows import RANKS, Batch, batch, check, run

from lora_kernels.core.many import Adapter, AdapterStack
from lora_kernels.core.operands import Base, Call
from lora_kernels.core.rows import Rows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


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
    if reasons := module.why_not(Call("forward_multi", device, torch.bfloat16, torch.bfloat16, 64, 64, 64, 16, True)):
        pytest.skip("; ".join(reasons))
    return module


def made(device: torch.device, M: int, ids: torch.Tensor | None = None, **how: Any) -> Batch:
    q = batch(M, 520, 1032, [*RANKS, None, (200, 0.0), (16, 0.1)], device=device, **how)
    return replace(q, ids=(q.ids if ids is None else ids).to(device))


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 40, 1300])
def test_results_are_right(backend: ModuleType, device: torch.device, dtypes, M: int, poison: None) -> None:
    q = made(device, M, dtype=dtypes[0], adapter_dtype=dtypes[1], strided=M == 40)
    check(q, run(backend, q))


def test_results_have_the_same_bits_in_every_run(backend: ModuleType, device: torch.device) -> None:
    q = made(device, 1300, dtype=torch.bfloat16)
    first = run(backend, q)
    for _ in range(20):
        again = run(backend, q)
        for got, wanted in zip((again.y, again.dx, *again.da, *again.db), (first.y, first.dx, *first.da, *first.db),
                               strict=True):  # fmt: skip
            assert (got is None and wanted is None) or torch.equal(got, wanted)


def test_one_graph_serves_every_division_of_the_rows(backend: ModuleType, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU has no CUDA graphs")
    q = made(device, 64, dtype=torch.bfloat16)
    stack = AdapterStack([each and Adapter(each.a, each.b, each.scale) for each in q.adapters])
    rows, base = q.rows, Base(q.w, q.bias)
    backend.forward_multi(q.x, base, stack, rows, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = backend.forward_multi(q.x, base, stack, rows, False)
    for count in (1, 8, 2, 0):
        ids = (torch.arange(64, device=device) * count // 64) % 8 if count else torch.full((64,), -1, device=device)
        new = Rows.by_id(ids, rows.n)
        rows.order.copy_(new.order)
        rows.starts.copy_(new.starts)
        graph.replay()
        wanted, _ = backend.forward_multi(q.x, base, stack, new, False)
        assert torch.equal(y, wanted)
    assert torch.equal(y, F.linear(q.x, q.w, q.bias))
