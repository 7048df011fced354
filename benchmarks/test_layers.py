"""The variants of the bench as rows of pytest-benchmark, in a group for each shape, dropout and pass:

    python -m pytest benchmarks --benchmark-columns=min,median,iqr -k "vit-base-attention-bf16"

The rows of a group run one after the other here. ``python -m lora_kernels bench`` interleaves them; quote its numbers.
"""

from __future__ import annotations

import functools

import pytest
import torch

from lora_kernels.bench.layers import step
from lora_kernels.bench.shapes import NAMED, TARGETED
from lora_kernels.bench.variants import FLOOR, baselines, ours
from lora_kernels.testing.judge import Judge, Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = [
    pytest.param(shape.name, p, which, variant, id=f"{shape.name}-p{p:g}-{which.replace(' + ', '+')}-{variant.name}")
    for shape in TARGETED
    for _, p, which in shape.cells
    for variant in (FLOOR, *baselines()[0], *ours(shape, DEVICE, None)[0])
    if variant.dropout or p == 0
]


@functools.lru_cache(maxsize=1)
def operands(name: str, p: float) -> Problem:
    return NAMED[name].problem(p, DEVICE)


@functools.cache
def faults(name: str, p: float, backend: str) -> list[str]:
    return Judge(operands(name, p)).faults(backend)[1]


@pytest.mark.parametrize(("name", "p", "which", "variant"), ROWS)
def test_bench(benchmark, name, p, which, variant):
    benchmark.group = f"{name} p={p:g} {which}"
    if variant.backend and (wrong := faults(name, p, variant.backend)):
        pytest.fail(f"judged wrong, no number: {wrong}")
    q = operands(name, p)
    run = step(variant.build(q), q, which)

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
