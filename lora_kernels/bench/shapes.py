"""The layers that the bench measures, named by the models they come from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from lora_kernels.testing.judge import Problem, problem
from lora_kernels.testing.names import SHORT

FORWARD, BACKWARD = "forward", "forward + backward"
GRAPH = "forward, CUDA graph"
"""Many forwards in one CUDA graph: the cost of short calls without Python and launches in between."""


@dataclass(frozen=True)
class Shape:
    """The sizes and dtypes of a layer and its input: x [M,K], w [N,K], a [R,K], b [N,R]."""

    name: str
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    """The dtype of a and b; None for x's."""
    bias: bool = True
    targets: dict[float, float] = field(default_factory=dict)
    """By p, the most that forward + backward may take, as a ratio to the frozen layer."""
    training: bool = True
    """False for a decoding step: only its forward without dropout is timed, on a GPU also in a CUDA graph."""
    dropout: float = 0.1
    """The p that is measured beside p = 0; 0 for none."""
    compiled: bool = False
    """Whether PEFT's layer is also measured under torch.compile, which takes long to compile."""

    @property
    def adapters(self) -> torch.dtype:
        """The dtype of a and b."""
        return self.adapter_dtype or self.dtype

    @property
    def size(self) -> str:
        """dtype, sizes and rank, for people to read, and beside 16 bits the dtype of the adapters."""
        adapters = f", {SHORT[self.adapters]} adapters" if self.dtype.itemsize == 2 else ""
        return f"{SHORT[self.dtype]} {self.M}×{self.K}→{self.N} r{self.R}{adapters}"

    @property
    def cells(self) -> list[Cell]:
        """Everything that is timed on any device."""
        if not self.training:
            return [Cell(self, 0.0, FORWARD)]
        return [Cell(self, p, which) for p in dict.fromkeys((0.0, self.dropout)) for which in (FORWARD, BACKWARD)]

    def problem(self, p: float, device: torch.device, seed: int = 0) -> Problem:
        """Return random operands of this shape."""
        return problem(
            self.M,
            self.N,
            self.K,
            self.R,
            dtype=self.dtype,
            adapter_dtype=self.adapters,
            p=p,
            bias=self.bias,
            seed=seed,
            device=device,
        )

    @property
    def saved_limit(self) -> int:
        """The bytes that may be saved for the backward: x, h and 64 more."""
        return self.M * (self.K * self.dtype.itemsize + self.R * self.adapters.itemsize) + 64


class Cell(NamedTuple):
    """One cell of a table: a pass over a shape at a dropout p. All variants are timed in it, interleaved."""

    shape: Shape
    p: float
    which: str
    """The pass: `FORWARD`, `BACKWARD` or `GRAPH`."""

    def entry(self) -> dict[str, Any]:
        """Return the keys that name the cell in a document."""
        return {"shape": self.shape.name, "p": self.p, "pass": self.which}


_BF16 = torch.bfloat16
_VIT = Shape("vit-base-attention", 512, 768, 768, 8, targets={0.0: 1.10, 0.1: 1.18})
_GPT2 = Shape("gpt2-mlp-up", 2048, 768, 3072, 16, targets={0.0: 1.00, 0.1: 1.05})
_LLAMA = Shape("llama-1b-attention", 1024, 2048, 2048, 16, bias=False, targets={0.0: 0.97, 0.1: 1.02})

TARGETED = (
    _VIT,
    _GPT2,
    _LLAMA,
    replace(_VIT, name="vit-base-attention-bf16", dtype=_BF16, targets={0.0: 1.18, 0.1: 1.25}),
    replace(_GPT2, name="gpt2-mlp-up-bf16", dtype=_BF16, targets={0.0: 1.06, 0.1: 1.10}),
)
"""The shapes that have a target."""

_MIXED = tuple(
    replace(shape, name=f"{shape.name}-bf16-fp32-adapters", dtype=_BF16, adapter_dtype=torch.float32, targets={})
    for shape in (_VIT, _GPT2)
)
_DECODE = tuple(
    Shape(f"decode-{M}{suffix}", M, 4096, 4096, 16, dtype=dtype, bias=False, training=False)
    for dtype, suffix in ((torch.float32, ""), (_BF16, "-bf16"))
    for M in (1, 16)
)
_ROWS = (8192, 2048, 16384)
_PROJECTIONS = {
    "8b": {"q": (4096, 4096), "k": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)},
    "70b": {"q": (8192, 8192), "k": (8192, 1024), "up": (8192, 28672), "down": (28672, 8192)},
}
"""(K, N) of the projections of Llama 3.1. o has the sizes of q, v those of k, gate those of up."""
_LLAMA_3_1 = tuple(
    Shape(f"llama-{model}-{name}-{M}", M, K, N, 16, dtype=_BF16, bias=False)
    for M in _ROWS
    for model, projections in _PROJECTIONS.items()
    for name, (K, N) in projections.items()
)
_LLAMA_SUITE = tuple(
    replace(shape, name=f"{shape.name}-r{R}", R=R, dropout=0.05, compiled=shape.name == "llama-8b-q-2048" and R == 16)
    for M in _ROWS
    for R in (16, 64)
    for shape in _LLAMA_3_1
    if shape.M == M
)
_TINY = Shape("tiny", 40, 64, 48, 4)


def _sweep(prefix: str, sizes: list[tuple[int, int]], width: int, dtype: torch.dtype) -> tuple[Shape, ...]:
    """Return square layers without bias and dropout, one for each (M, R)."""
    return tuple(
        Shape(f"{prefix}-{M}x{width}-r{R}", M, width, width, R, dtype=dtype, bias=False, training=M > 16, dropout=0.0)
        for M, R in sizes
    )


DEFAULT = {"cpu": (*TARGETED, *_MIXED, *_DECODE), "cuda": (*TARGETED, *_MIXED, *_DECODE, *_LLAMA_3_1)}
"""The shapes that are measured if none are named, by device type."""

_BY_M = {
    "cpu": _sweep("sweep-m", [(M, 8) for M in (1, 4, 16, 64, 256, 1024)], 1024, torch.float32),
    "cuda": _sweep("sweep-m", [(M, 16) for M in (1, 16, 64, 256, 1024, 4096, 16384)], 4096, _BF16),
}
_BY_R = {
    "cpu": _sweep("sweep-r", [(256, R) for R in (1, 4, 16, 64, 256)], 1024, torch.float32),
    "cuda": _sweep("sweep-r", [(8192, R) for R in (1, 8, 16, 32, 64, 128, 256)], 4096, _BF16),
}
SUITES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "llama": {"cuda": (*(shape for shape in _DECODE if shape.dtype == _BF16), *_LLAMA_SUITE)},
    "decode": {"cpu": _DECODE, "cuda": _DECODE},
    "sweep-m": _BY_M,
    "sweep-r": _BY_R,
    "sweep": {device: (*_BY_M[device], *_BY_R[device]) for device in _BY_M},
}
"""Named sets of shapes, by device type. `llama` has the projections of Llama 3.1 at r 16 and 64 and is shown with
geometric means. The sweeps are drawn as time over the roofline's floor, by M, by R, or both."""

NAMED = {
    shape.name: shape
    for shapes in (DEFAULT["cuda"], (_TINY,), *(shapes for suite in SUITES.values() for shapes in suite.values()))
    for shape in shapes
}
"""Every shape by name. `tiny` is for trying the bench itself."""
