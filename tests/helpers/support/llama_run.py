"""A made-up document of the suite `llama`, as the bench writes it on a GPU."""

from __future__ import annotations

from typing import Any

from lora_kernels.bench.shapes import GRAPH, SUITES, Cell
from lora_kernels.evidence.identity import Identity

IDENTITY = Identity("Fake GPU", "sm_90", 132, "580.65", "2.13.0", "3.7.1", "12.8", "abc", None)


def document(factors: dict[str, float], identity: Identity = IDENTITY) -> dict[str, Any]:
    """Return a document in which each variant takes its factor times as long as F.linear, whose factor is 1."""
    found: dict[str, Any] = {
        "suite": "llama",
        "date": "2030-01-01T00:00:00+00:00",
        "command": "python -m lora_kernels bench --suite llama",
        "rounds": 7,
        "versions": {"torch": identity.torch, "triton": identity.triton, "peft": "0.19.1"},
        "device": {"type": "cuda", "name": identity.device, "arch": identity.arch, "driver": identity.driver},
        "identity": identity._asdict(),
        "shapes": {},
        "gate": [],
        "timings": [],
        "memory": [],
    }
    for shape in SUITES["llama"]["cuda"]:
        size = {"M": shape.M, "K": shape.K, "N": shape.N, "R": shape.R, "size": shape.size}
        found["shapes"][shape.name] = size
        for _, p, which in [*shape.cells, *([] if shape.training else [Cell(shape, 0.0, GRAPH)])]:
            for name, factor in factors.items():
                seconds = 1e-6 * shape.M * factor
                entry = {"shape": shape.name, "p": p, "pass": which, "variant": name, "seconds": [0, seconds, 0]}
                backend = name.removeprefix("ours: ") if name.startswith("ours") else None
                found["timings"].append(entry | {"backend": backend, "automatic": False, "ratio": [factor] * 3})
    return found
