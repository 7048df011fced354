"""A few small calls of one back-end and nothing else: what compute-sanitizer can watch in reasonable time.

python scripts/gpu_small.py BACKEND [DEVICE]
"""

from __future__ import annotations

import importlib
import sys

import torch

from lora_kernels.bench.endurance import run
from lora_kernels.bench.gate import problem

CASES = [  # M, N, K, R, p
    (200, 264, 136, 16, 0.1),
    (130, 136, 264, 40, 0.0),
    (16, 256, 512, 16, 0.0),
]


def main(name: str, device: str) -> int:
    module = importlib.import_module(f"lora_kernels.backends.{name}")
    for M, N, K, R, p in CASES:
        results = run(module, problem(M, N, K, R, dtype=torch.bfloat16, p=p, device=device))
        wrong = [key for key, value in results.items() if not torch.isfinite(value).all()]
        print(
            f"{name} M={M} N={N} K={K} R={R} p={p}: {'not finite: ' + ', '.join(wrong) if wrong else 'done'}",
            flush=True,
        )
        if wrong:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda"))
