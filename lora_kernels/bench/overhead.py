"""The cost of a call beside its kernels, of a small layer's call beside PEFT's own, and of the import."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import lora_kernels
from lora_kernels.backends import dispatch
from lora_kernels.bench import layers
from lora_kernels.bench.layers import Task
from lora_kernels.bench.shapes import BACKWARD, FORWARD
from lora_kernels.bench.variants import LAYERS, PEFT
from lora_kernels.ops.linear import lora_linear
from lora_kernels.testing import timing
from lora_kernels.testing.judge import Problem, judge, problem
from lora_kernels.testing.names import SHORT

CALL_TARGET_US = 15.0
IMPORT_TARGET_MS = 50.0
LAYER_TARGET = 1.0
"""The most that a call of a small layer may take, as a ratio to PEFT's own."""
LAYER_SIZE = 128
_CALLS = 300


@dataclass(frozen=True)
class Overhead:
    """The microseconds that `lora_linear` takes beyond the forward of its back-end on the same operands."""

    backend: str
    p: float
    grad: bool
    call_us: float
    backend_us: float
    overhead_us: float
    """The median over rounds of the difference within a round."""


def measure_overhead(device: torch.device, backend: str, rounds: int) -> list[Overhead]:
    """Return the overhead for each p, with and without gradients, on a problem so small that kernels take next to no
    time."""
    module, timer = dispatch.load(backend), timing.timer_for(device)
    results = []
    for p in (0.0, 0.1):
        q = problem(4, 64, 64, 8, p=p, bias=False, device=device)
        for grad in (False, True):
            a, b = (t.detach().requires_grad_(grad) for t in (q.a, q.b))

            def call(a=a, b=b, q=q):  # type: ignore[no-untyped-def]
                return lora_linear(q.x, q.w, a, b, scale=q.scale, dropout_p=q.p, backend=backend)

            def kernels(q=q, grad=grad):  # type: ignore[no-untyped-def]
                return module.forward(q.x, [q.base], [q.adapter], [grad])

            with nullcontext() if grad else torch.no_grad():
                for function in (call, kernels):
                    timer.sample([function], _CALLS)
                pairs = [(timer.sample([call], _CALLS), timer.sample([kernels], _CALLS)) for _ in range(rounds)]
            calls, backends = ([1e6 * value for value in column] for column in zip(*pairs, strict=True))
            difference = statistics.median(u - v for u, v in zip(calls, backends, strict=True))
            results.append(
                Overhead(backend, p, grad, statistics.median(calls), statistics.median(backends), difference)
            )
    return results


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer so small that Python takes most of the time, beside PEFT's own layer. The adapters are fp32, as
    PEFT makes them."""

    layer: str
    which: str
    """The pass: `FORWARD`, without gradients, or `BACKWARD`."""
    M: int
    dtype: str
    faults: list[str]
    """What is wrong with its values or gradients. If anything is, there are no numbers."""
    call_us: float | None = None
    peft_us: float | None = None
    over_peft: tuple[float, float, float] | None = None
    """Quartiles over rounds of time / PEFT's time in the same round."""


def measure_layers(device: torch.device, rounds: int) -> list[LayerCall]:
    """Return the times of small layers, 128x128 of rank 8: a forward with one row of x, and a forward + backward with
    eight. Needs PEFT."""
    results = []
    for which, M in ((FORWARD, 1), (BACKWARD, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            q = problem(M, LAYER_SIZE, LAYER_SIZE, 8, dtype=dtype, adapter_dtype=torch.float32, device=device)
            faults = {v.name: _faults(v.build(q), q) for v in LAYERS}
            timed = [v for v in (PEFT, *LAYERS) if not faults.get(v.name)]
            steps = {v.name: [layers.step(v.build(q), q, which)] for v in timed}
            taken = timing.interleave(PEFT.name, steps, rounds, timing.timer_for(device))
            times = {name: 1e6 * statistics.median(taken.seconds(name)) for name in steps}
            for name, wrong in faults.items():
                row = LayerCall(name, which, M, SHORT[dtype], wrong)
                if not wrong:
                    ratios = timing.quartiles(taken.ratios(name, PEFT.name))
                    row = replace(row, call_us=times[name], peft_us=times[PEFT.name], over_peft=ratios)
                results.append(row)
    return results


def _faults(task: Task, q: Problem) -> list[str]:
    results = layers.results(task, q)
    missing = [f"{name}: missing" for name, value in results.items() if value is None]
    got = {name: value for name, value in results.items() if value is not None}
    with torch.no_grad():  # a call without gradients takes another path
        again = {"y": task.layer(q.x)}
    return missing + [verdict.fault for each in (got, again) for verdict in judge(each, q) if verdict.fault]


@dataclass(frozen=True)
class ImportCost:
    """The cost of ``import lora_kernels`` after ``import torch``, in a fresh interpreter."""

    milliseconds: float
    """The median over several interpreters."""
    loads_triton: bool


def measure_import(times: int) -> ImportCost:
    """Return the cost of the import, measured in `times` interpreters."""
    code = (
        "import sys, time, torch; before = 'triton' in sys.modules; start = time.perf_counter(); import lora_kernels; "
        "print(time.perf_counter() - start, 'triton' in sys.modules and not before)"
    )
    package = str(Path(lora_kernels.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    runs = []
    for _ in range(times):
        output = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        runs.append((float(output[-2]), output[-1] == "True"))
    return ImportCost(1000 * statistics.median(t for t, _ in runs), any(triton for _, triton in runs))
