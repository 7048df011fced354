"""The native CPU kernels (csrc/): addresses (0: absent), sizes and row strides. Every operand but w has unit last
stride."""

F32: int
BF16: int
F16: int
openmp: bool

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def forward(
    threads: int, dtype: int, adapter_dtype: int, M: int, N: int, K: int, R: int,
    x: int, stride_xm: int, a: int, stride_ar: int, b: int, stride_bn: int, bias: int,
    y: int, stride_ym: int, h: int, stride_hm: int,
    scale: float, threshold: int, seed: int, /,
) -> None: ...  # fmt: skip
def backward(
    threads: int, dtype: int, adapter_dtype: int, M: int, N: int, K: int, R: int,
    dy: int, stride_dym: int, x: int, stride_xm: int,
    a: int, stride_ar: int, b: int, stride_bn: int, h: int, stride_hm: int,
    dx: int, stride_dxm: int, da: int, stride_dar: int, db: int, stride_dbn: int,
    scale: float, threshold: int, seed: int, /,
) -> None: ...  # fmt: skip
def gemm(
    threads: int, dtype: int, M: int, N: int, K: int,
    x: int, stride_xm: int, w: int, stride_wn: int, stride_wk: int, y: int, stride_ym: int, /,
) -> None: ...  # fmt: skip
def gemm_few(M: int, stride_wk: int, /) -> bool: ...
def philox(counter: list[int], key: list[int]) -> list[int]: ...
def keep_bits(seed: int, threshold: int, m0: int, rows: int, cols: int) -> bytes: ...
