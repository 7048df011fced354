"""The native CPU kernels (csrc/): addresses (0: absent), sizes and row strides. Every operand but w has unit last
stride."""

from collections.abc import Sequence

F32: int
BF16: int
F16: int
openmp: bool

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def forward(
    threads: int, dtype: int, adapter_dtype: int, M: int, K: int, x: int, stride_xm: int,
    branches: list[tuple[float, ...]],  # N R · a and b, each with its stride · bias · y, h · scale threshold seed
    bases: Sequence[tuple[int, ...] | None], /,  # to multiply by x as well: w and its stride, or a quantised w
) -> None: ...  # fmt: skip
def backward(
    threads: int, dtype: int, adapter_dtype: int, M: int, K: int, x: int, stride_xm: int, dx: int, stride_dxm: int,
    branches: list[tuple[float, ...]], /,  # N R · dy, a, b, h, da and db, each with its stride · scale threshold seed
) -> None: ...  # fmt: skip
def gemm(
    threads: int, dtype: int, M: int, N: int, K: int,
    x: int, stride_xm: int, w: int, stride_wn: int, stride_wk: int, y: int, stride_ym: int, add: bool, /,
) -> None: ...  # fmt: skip
def gemm_of(dtype: int, /) -> bool: ...
def gemm_few(M: int, stride_wk: int, /) -> bool: ...
def dequantize(
    threads: int, w: tuple[int, ...], n0: int, rows: int, k0: int, cols: int, dtype: int, out: int, stride_out: int, /
) -> None: ...  # w: format N K codes levels scales scale_rows scale_cols blocksize table absmax offset
def quantized_gemm(
    threads: int, dtype: int, M: int, w: tuple[int, ...], transposed: bool,
    x: int, stride_xm: int, y: int, stride_ym: int, /,
) -> None: ...  # fmt: skip
def quantized_few(M: int, transposed: bool, /) -> bool: ...
def philox(counter: list[int], key: list[int]) -> list[int]: ...
def keep_bits(seed: int, threshold: int, m0: int, rows: int, cols: int) -> bytes: ...
