"""What an `AdapterPool` costs beside the layers: the time of a lease, and the bytes of many adapters."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.serving.pool import AdapterPool
from lora_kernels.testing import timing

LEASED, LEASE_TARGET_US = 8, 20.0
REGISTERED, BYTES_TARGET = 1000, 1.05
RANK = 8
LAYERS = ("q", "v")
_CALLS = 200


def measure_pool(rounds: int, width: int) -> list[dict[str, Any]]:
    """Return two entries: microseconds of a lease of `LEASED` adapters that are in memory, with its end, among
    `REGISTERED` adapters of two layers; and the bytes of all of them over what their A and B take with ranks rounded up
    to 8."""
    model = nn.ModuleDict({name: nn.Linear(width, width, bias=False).requires_grad_(False) for name in LAYERS})
    pool = AdapterPool(model)
    state: dict[str, Tensor] = {}
    for name in LAYERS:
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, width)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(width, RANK)
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": list(LAYERS)}
    for i in range(REGISTERED):
        pool.register(str(i), state, config=config)  # which copies the values
    names = [str(i * REGISTERED // LEASED) for i in range(LEASED)]
    taken = [timing.CpuTimer().sample([lambda: pool.lease(names).close()], _CALLS) for _ in range(rounds)]
    microseconds, stats = 1e6 * statistics.median(taken), pool.stats()
    least = REGISTERED * len(LAYERS) * -(-RANK // 8) * 8 * 2 * width * torch.float32.itemsize
    ratio = stats.device_bytes / least
    return [
        {
            "what": f"a lease of {LEASED} adapters in memory, of {stats.registered}",
            "value": microseconds,
            "unit": "µs",
            "most": LEASE_TARGET_US,
        },
        {
            "what": f"bytes of {stats.resident} adapters, of their ranks rounded up to 8",
            "value": ratio,
            "unit": "×",
            "most": BYTES_TARGET,
        },
    ]
