"""The peak memory of a first training step over an nf4 base, beyond weights, activations and gradients, in MB.

    python -m benchmarks.quantised_memory float32|bfloat16|float16 M N K

Run it from the checkout, on Linux. It needs a process of its own, whose heap is empty.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.weight import QuantizedWeight

R = 16
MOST = 16.0
"""The target: at most this many MB."""


def measure(dtype: str, M: int, N: int, K: int) -> float:
    """Return the peak in MB, measured in a new process. Raises RuntimeError with its output if that process fails."""
    command = [sys.executable, "-m", __name__, dtype, str(M), str(N), str(K)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return float(done.stdout)


def main(argv: list[str] | None = None) -> int:
    """Print the peak in MB. Return 0."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dtype", choices=("float32", "bfloat16", "float16"))
    for name in "MNK":
        parser.add_argument(name, type=int)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    _step(dtype, 128, 128, 128)  # torch imports modules, and its libraries keep memory, in the first step
    print(f"{_step(dtype, args.M, args.N, args.K):.2f}")
    return 0


def _step(dtype: torch.dtype, M: int, N: int, K: int) -> float:
    codes, scales = torch.randint(256, (N, K // 2), dtype=torch.uint8), torch.rand(N * K // 64)
    q = QuantizedWeight("nf4", (N, K), dtype, codes, scales, 64)
    x, a, b = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((M, K), (R, K), (N, R)))
    dy = torch.randn(M, N, dtype=dtype)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak so far
    before = _status("VmRSS")
    y = lora_linear(x, q, a, b, scale=0.5, dropout_p=0.1, backend="cpu")
    grads = torch.autograd.grad(y, (x, a, b), dy)
    return _status("VmHWM") - before - sum(t.nbytes for t in (y, *grads)) / 2**20


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    raise SystemExit(main())
