"""Every format of W with every instruction set, many rows and columns, odd sizes and numbers of threads: bit for bit.

The operands are small integers for which every sum is exact, so a row that takes another row's scale, a task that
begins in the middle of a block and a tail that is forgotten change a result, however small the error would be.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels are not built")
from benchmarks.fuzz_draw import FORMATS, Draw, quantised  # noqa: E402
from lora_kernels import lora_linear  # noqa: E402

pytestmark = pytest.mark.slow

SIZES = [(1, 700), (131, 257), (1023, 66), (560, 1153)]
"""N and K."""
ROWS = (1, 3, 16, 17, 33, 200)
THREADS = (1, 2, 3, 5, 8)


@pytest.fixture(autouse=True)
def _own_kernels() -> Iterator[None]:
    """Our own GEMM serves every call that it can serve."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def integers(generator: torch.Generator, rows: int, cols: int, kept: float) -> torch.Tensor:
    values = torch.randint(-2, 3, (rows, cols), generator=generator).float()
    return values * (torch.rand(rows, cols, generator=generator) < kept)


@pytest.mark.parametrize("format", ["dense", *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_exact(dtype, format, isa):
    for count, (N, K) in enumerate(SIZES):
        draw = Draw(N, K, True)
        K -= K % 2 if format in ("nf4", "fp4") else 0
        if format == "dense":
            q, W = None, integers(draw.generator, N, K, 0.5)
        else:
            q = quantised(draw, N, K, format)
            W = q.dequantize(torch.float32)
        a, b = integers(draw.generator, 5, K, 0.3), integers(draw.generator, N, 5, 0.2)
        for M in ROWS:
            x, dy = integers(draw.generator, M, K, 3 / K), integers(draw.generator, M, N, 3 / N)
            base, back = x @ W.t(), dy @ W
            want = base + 2 * (x @ a.t()) @ b.t(), back + 2 * (dy @ b) @ a
            want_da, want_db = 2 * (dy @ b).t() @ x, 2 * dy.t() @ (x @ a.t())
            inner = base, back, x @ a.t(), dy @ b
            assert all(torch.equal(t.to(dtype).float(), t) for t in (*inner, *want, want_da, want_db)), (
                "it is not exact"
            )
            w = q if q is not None else W.to(dtype)
            for threads in THREADS if M == 33 else THREADS[(count + M) % 5 :][:1]:
                torch.set_num_threads(threads)
                leaf, own_a, own_b = (t.to(dtype, copy=True).requires_grad_() for t in (x, a, b))
                y = lora_linear(leaf, w, own_a, own_b, scale=2.0)
                y.backward(dy.to(dtype))
                for got, exact in zip((y, leaf.grad, own_a.grad, own_b.grad), (*want, want_da, want_db), strict=True):
                    assert torch.equal(got.float(), exact), (N, K, M, threads)
