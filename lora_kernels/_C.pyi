"""The native CPU kernels (csrc/). Tensors are read in place. One whose last stride is not 1 is copied first, except the
`w` of `gemm`, which may have any strides. Results are written to tensors that the caller has allocated, whose last
stride is 1. Dtypes are float32, bfloat16 and float16. Sizes that do not fit together raise ValueError. The caller has
checked that the dtypes do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.core.operands import Adapter, Base
from lora_kernels.quant.weight import QuantizedWeight

FEW_ROWS: int
dlpack: bool
openmp: bool

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def cpu_paths() -> dict[str, tuple[bool, bool]]: ...
def set_cpu_isa(name: str, /) -> None: ...
def forward(
    threads: int, x: Tensor, bases: Sequence[Base], adapters: Sequence[Adapter],
    ys: Sequence[Tensor], hs: Sequence[Tensor | None], products: Sequence[bool], /,
) -> None: ...  # fmt: skip
def backward(
    threads: int, dys: Sequence[Tensor], x: Tensor | None, bases: Sequence[Base], adapters: Sequence[Adapter],
    hs: Sequence[Tensor | None], dx: Tensor | None, das: Sequence[Tensor | None], dbs: Sequence[Tensor | None],
    products: Sequence[bool], /,
) -> None: ...  # fmt: skip
def forward_multi(
    threads: int, x: Tensor, base: Base, adapters: Sequence[Adapter | None], order: Tensor, starts: Tensor,
    y: Tensor, h: Tensor | None, product: bool, /,
) -> None: ...  # fmt: skip
def backward_multi(
    threads: int, dy: Tensor, x: Tensor | None, base: Base, adapters: Sequence[Adapter | None], order: Tensor,
    starts: Tensor, h: Tensor | None, dx: Tensor | None, das: Sequence[Tensor | None], dbs: Sequence[Tensor | None],
    product: bool, /,
) -> None: ...  # fmt: skip
def forward_experts(
    threads: int, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor | None, order: Tensor,
    starts: Tensor, y: Tensor, h: Tensor | None, bias: Tensor | None, /,
) -> None: ...  # fmt: skip
def backward_experts(
    threads: int, dy: Tensor, x: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor | None,
    order: Tensor, starts: Tensor, h: Tensor | None, dx: Tensor | None, da: Tensor | None, db: Tensor | None, /,
) -> None: ...  # fmt: skip
def gemm_experts(
    threads: int, x: Tensor, w: Tensor, order: Tensor, starts: Tensor, y: Tensor, bias: Tensor | None, /
) -> None: ...  # fmt: skip
def gemm(threads: int, x: Tensor, w: Tensor, y: Tensor, add: bool, bias: Tensor | None, /) -> None: ...
def is_small(M: int, N: int, K: int, /) -> bool: ...
def has_gemm(dtype: torch.dtype, /) -> bool: ...
def quantized_gemm(
    threads: int, x: Tensor, w: QuantizedWeight, transposed: bool, y: Tensor, bias: Tensor | None, /
) -> None: ...  # fmt: skip
def dequantize(threads: int, w: QuantizedWeight, n0: int, k0: int, out: Tensor, /) -> None: ...
def set_levels(format: str, levels: Sequence[float], /) -> None: ...
def keep_mask(threads: int, p: float, seed: Tensor, out: Tensor, /) -> None: ...
def row_norm(threads: int, w: Tensor, a: Tensor, b: Tensor, scale: float, n: Tensor, /) -> None: ...
def column_sums(threads: int, w: Tensor, a_t: Tensor, square: Tensor, low: Tensor, gram: Tensor, /) -> None: ...
def dropout_rule(p: float, /) -> tuple[int, float]: ...
def philox(counter: list[int], key: list[int], /) -> list[int]: ...
def keep_bits(seed: int, threshold: int, m0: int, rows: int, cols: int, /) -> bytes: ...
