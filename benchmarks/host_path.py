"""Time what a call of the Triton back-ends costs the host, without a GPU: on the stand-in driver of the tests.

    python -m benchmarks.host_path

Triton's launcher and everything before it runs as on a GPU; the stand-in accepts the launch and returns. Tensors lie in
the memory of the CPU. The sizes are small, and the vendor's GEMM of `composite` is timed on the CPU and subtracted, so
what is left does not depend on the sizes. The first call of a layout, which compiles, is not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.testing.terminal import terminal

HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"

M, N, K, R = 8, 16, 24, 8
CASES = {"": 0.0, " with dropout": 0.1}
"""The dropout probabilities, by what the table says of them."""


class Row(NamedTuple):
    """The time of a pass."""

    backend: str
    call: str
    microseconds: float


def measure(rounds: int) -> list[Row]:
    """Return the host's time of every pass: the least mean of ten calls, of so many rounds."""
    torch.set_num_threads(1)  # a second thread would take its time for GEMMs as small as these
    sys.path.insert(0, str(HELPERS))
    from support.stand_in import driver

    driver.start()
    driver.use("sm_90")
    from lora_kernels.backends import composite
    from lora_kernels.backends import triton as one_launch

    rows = []
    for backend in (composite, one_launch):
        for text, p in CASES.items():
            forward, backward, gemms = _calls(backend, p)
            gemm = [_time(call, rounds) if backend is composite else 0.0 for call in gemms]
            rows.append(Row(backend.name, f"forward{text}", _time(forward, rounds) - gemm[0]))
            rows.append(Row(backend.name, f"backward{text}", _time(backward, rounds) - gemm[1]))
    return rows


def _calls(backend: Any, p: float) -> tuple[Callable[[], Any], Callable[[], Any], list[Callable[[], Any]]]:
    """Return a forward, a backward with all gradients, and the GEMM of each."""
    dtype = torch.bfloat16
    x, dy, h = (torch.zeros(M, columns, dtype=dtype) for columns in (K, N, R))
    w, a, b = (torch.zeros(*shape, dtype=dtype) for shape in ((N, K), (R, K), (N, R)))
    y, dx = torch.zeros(M, N, dtype=dtype), torch.zeros(M, K, dtype=dtype)
    bases = [Base(w, torch.zeros(N, dtype=dtype))]
    adapters = [Adapter(a, b, 0.5, p, torch.tensor(5) if p else None)]
    needs = Needs(True, (True,), (True,))
    return (
        lambda: backend.forward(x, bases, adapters, [True]),
        lambda: backend.backward([dy], x, bases, adapters, [h], needs),
        [lambda: y.addmm_(x, w.t()), lambda: dx.addmm_(dy, w)],
    )


def _time(call: Callable[[], Any], rounds: int) -> float:
    """Return the time of a call in microseconds."""
    call()
    least = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(10):
            call()
        least = min(least, time.perf_counter() - start)
    return least / 10 * 1e6


def main() -> int:
    """Print the table."""
    import triton

    rows = [(row.backend, row.call, f"{row.microseconds:.1f}") for row in measure(rounds=500)]
    title = (
        f"Host time of a call, Triton {triton.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    )
    terminal().table(title, ("back-end", "pass", "µs"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
