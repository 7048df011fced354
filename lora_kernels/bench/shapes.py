"""The layers that are benched: named by the model they come from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from lora_kernels.testing.names import SHORT

FORWARD, BACKWARD = "forward", "forward + backward"
GRAPH = "forward, CUDA graph"
"""Many forwards in one CUDA graph: what short calls cost without Python and launches in between."""


@dataclass(frozen=True)
class Shape:
    """x [M,K], w [N,K], a [R,K], b [N,R]."""

    name: str
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    """x's where None."""
    bias: bool = True
    targets: dict[float, float] = field(default_factory=dict)
    """By p: what forward + backward may cost, as a ratio to the frozen layer's."""
    training: bool = True
    """False: a decoding step, of which only the forward without dropout is asked, on a GPU in a CUDA graph too."""
    dropout: float = 0.1
    """The p that is measured beside p = 0; 0: none."""
    compiled: bool = False
    """Whether PEFT's layer is measured under torch.compile too, which takes its time to compile."""

    @property
    def adapters(self) -> torch.dtype:
        """The dtype of a and b."""
        return self.adapter_dtype or self.dtype

    @property
    def size(self) -> str:
        """dtypes and sizes, for people."""
        adapters = "" if self.adapters == self.dtype else f", {SHORT[self.adapters]} adapters"
        return f"{SHORT[self.dtype]} {self.M}×{self.K}→{self.N} r{self.R}{adapters}"

    @property
    def cells(self) -> list[tuple[float, str]]:
        """(p, pass) of everything that is timed."""
        if not self.training:
            return [(0.0, FORWARD)]
        return [(p, which) for p in dict.fromkeys((0.0, self.dropout)) for which in (FORWARD, BACKWARD)]

    @property
    def saved_limit(self) -> int:
        """Bytes that may be saved for the backward: x, h and 64."""
        return (self.M * self.K + self.M * self.R) * self.dtype.itemsize + 64


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
"""The rows for which there is a target."""

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
"""K, N of Llama 3.1's. q is o too, k is v, up is gate."""
_LLAMA_3_1 = tuple(
    Shape(f"llama-{model}-{name}-{M}", M, K, N, 16, dtype=_BF16, bias=False)
    for M in _ROWS
    for model, projections in _PROJECTIONS.items()
    for name, (K, N) in projections.items()
)
_HOPPER = tuple(
    replace(shape, name=f"{shape.name}-r{R}", R=R, dropout=0.05, compiled=shape.name == "llama-8b-q-2048" and R == 16)
    for M in _ROWS
    for R in (16, 64)
    for shape in _LLAMA_3_1
    if shape.M == M
)
_TINY = Shape("tiny", 40, 64, 48, 4)


def _sweep(prefix: str, sizes: list[tuple[int, int]], width: int, dtype: torch.dtype) -> tuple[Shape, ...]:
    """Square layers without bias and dropout, by (M, R)."""
    return tuple(
        Shape(f"{prefix}-{M}x{width}-r{R}", M, width, width, R, dtype=dtype, bias=False, training=M > 16, dropout=0.0)
        for M, R in sizes
    )


DEFAULT = {"cpu": (*TARGETED, *_MIXED, *_DECODE), "cuda": (*TARGETED, *_MIXED, *_DECODE, *_LLAMA_3_1)}
"""What is benched where no shapes are named, by device type."""

_BY_M = {
    "cpu": _sweep("sweep-m", [(M, 8) for M in (1, 4, 16, 64, 256, 1024)], 1024, torch.float32),
    "cuda": _sweep("sweep-m", [(M, 16) for M in (1, 16, 64, 256, 1024, 4096, 16384)], 4096, _BF16),
}
_BY_R = {
    "cpu": _sweep("sweep-r", [(256, R) for R in (1, 4, 16, 64, 256)], 1024, torch.float32),
    "cuda": _sweep("sweep-r", [(8192, R) for R in (1, 8, 16, 32, 64, 128, 256)], 4096, _BF16),
}
SUITES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "hopper": {"cuda": (*(shape for shape in _DECODE if shape.dtype == _BF16), *_HOPPER)},
    "decode": {"cpu": _DECODE, "cuda": _DECODE},
    "sweep-m": _BY_M,
    "sweep-r": _BY_R,
    "sweep": {device: (*_BY_M[device], *_BY_R[device]) for device in _BY_M},
}
"""By name, what is benched on a device type: `hopper` is the projections of Llama 3.1 at r 16 and 64, with geometric
means; the sweeps make the pictures of time over floor, by M, by R, or both."""

NAMED = {
    shape.name: shape
    for shapes in (DEFAULT["cuda"], (_TINY,), *(shapes for suite in SUITES.values() for shapes in suite.values()))
    for shape in shapes
}
"""Every shape there is; `tiny` is for trying the bench itself."""
