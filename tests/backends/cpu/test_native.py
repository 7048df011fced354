"""Each native CPU kernel, with every instruction set that this machine can run, against the formula in fp64."""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fences import fences
from support.judging import DTYPES
from support.philox_vectors import KNOWN_ANSWERS
from torch import Tensor

from lora_kernels.core import dropout

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from support.native_problems import (  # noqa: E402
    SEED,
    X_DTYPES,
    Operands,
    close,
    gemm,
    gemm_operands,
    gemm_serves,
    problem,
)

SHAPES = [  # M, N, K, R
    (1, 1, 1, 1),
    (0, 5, 6, 3),
    (1, 300, 1100, 16),  # deeper than one pass over x
    (2, 31, 17, 256),
    (4, 513, 40, 7),  # b read as it is
    (5, 65, 63, 8),  # b transposed first
    (67, 48, 33, 3),
    (70, 129, 200, 12),
    (135, 640, 130, 16),  # several tiles each way
    (9, 24, 16, 40),  # r above K
    (130, 100, 90, 65),  # two passes over dy
    (1100, 20, 70, 5),  # two slabs of rows
]
P = [0.0, 0.1, 0.9]


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_forward_is_within_the_bound_of_an_fp32_sum(
    isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> None:
    """y is computed from h before h is rounded, unless h is multiplied as bf16."""
    pairs = isa == "avx512_bf16" and dtype == adapter_dtype == torch.bfloat16
    for shape in SHAPES:
        q, want = problem(shape, dtype, adapter_dtype, p)
        y, h = q.forward()
        close(y, want["y"], pairs)
        close(h, want["h"])


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_backward_is_within_the_bound_of_an_fp32_sum(
    isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> None:
    pairs = isa == "avx512_bf16" and dtype == adapter_dtype == torch.bfloat16
    for shape in SHAPES:
        q, want = problem(shape, dtype, adapter_dtype, p)
        for name, value in q.backward().items():
            close(value, want[name], pairs and name != "db")


@pytest.mark.parametrize("shape", [(67, 48, 33, 3), (130, 100, 90, 65)])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_alone_has_the_same_bits_as_beside_the_others(
    isa: str, shape: tuple[int, int, int, int], adapter_dtype: torch.dtype
) -> None:
    q = Operands(*shape, torch.bfloat16, adapter_dtype, 0.1)
    everything = q.backward()
    for name in everything:
        alone = q.backward(**{other: other == name for other in everything})
        assert alone.keys() == {name} and torch.equal(alone[name], everything[name])


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [*((dtype, torch.float32) for dtype in X_DTYPES), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize("shape", [(523, 700, 391, 8), (1100, 130, 300, 16), (260, 400, 300, 70)])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    q = Operands(*shape, dtype, adapter_dtype, 0.1)
    y, h = q.forward(1)
    grads = q.backward(1)
    for threads in (1, 2, 3, 7):
        again_y, again_h = q.forward(threads)
        assert torch.equal(again_y, y) and torch.equal(again_h, h)
        for name, value in q.backward(threads).items():
            assert torch.equal(value, grads[name]), f"{name} at {threads} threads"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_a_call_that_needs_much_memory_gives_it_back_and_leaves_nothing_to_later_calls() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    small, large = (
        Operands(*shape, torch.float32, torch.float32, 0.1) for shape in ((7, 33, 47, 8), (45_000, 4, 4, 256))
    )
    y, h = small.forward(1)
    grads = small.backward(1)
    large.forward(1)  # what it allocates for the first time is not counted
    before = resident()
    large.backward(1)  # its g takes 44 MB, and more than 32 MB are not kept
    assert resident() - before < 16 << 20
    again_y, again_h = small.forward(1)
    assert torch.equal(again_y, y) and torch.equal(again_h, h)
    assert all(torch.equal(value, grads[name]) for name, value in small.backward(1).items())


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_its_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], output: tuple) -> None:
    assert _C.philox(list(counter), list(key)) == list(output)


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
def test_keep_bits_are_those_of_the_rule(isa: str, seed: int, p: float) -> None:
    M, K = 9, 203
    packed = bytearray(_C.keep_bits(seed, dropout.threshold(p), 0, M, K))
    words = torch.frombuffer(packed, dtype=torch.uint8).view(M, -1)
    bits = (words[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, :K].bool()
    assert torch.equal(bits, dropout.keep_mask(torch.tensor(seed), M, K, p))


def test_rows_beyond_32_bits_have_their_own_bits(isa: str) -> None:
    """The counter of Philox holds all 64 bits of the row number m."""
    assert _C.keep_bits(SEED, 30000, 5, 1, 64) != _C.keep_bits(SEED, 30000, 5 + 2**32, 1, 64)
    group, row = 3, 5 + 2**32
    words = _C.philox([group, row & 0xFFFFFFFF, row >> 32, 0], [SEED & 0xFFFFFFFF, SEED >> 32])
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert _C.keep_bits(SEED, 30000, row, 1, 64)[group] == sum((lane >= 30000) << j for j, lane in enumerate(lanes))


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("shape", [(1, 13, 21, 5), (7, 33, 47, 8), (66, 70, 65, 3)])
def test_reads_and_writes_stay_inside_the_operands(
    isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Every operand ends at the last byte before a page that must not be touched."""
    with fences() as fenced:
        check_fenced(fenced, shape, dtype)


def check_fenced(fenced: Callable[[Tensor], Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q = Operands(*shape, dtype, dtype, 0.1)
    want_y, want_h = q.forward(1)
    want = q.backward(1)
    weight = torch.randn(shape[1], shape[2]).to(dtype)
    want_n = row_norm(weight, q.a, q.b, torch.empty(shape[1]))
    assert torch.equal(row_norm(fenced(weight), fenced(q.a), fenced(q.b), fenced(want_n)), want_n)
    for name in ("x", "dy", "a", "b", "bias", "h", "y", "dx"):
        setattr(q, name, fenced(getattr(q, name)))
    q.y.clone = lambda: q.y  # type: ignore[method-assign]
    q.dx.clone = lambda: q.dx  # type: ignore[method-assign]
    q.nan = lambda rows, cols, dtype: fenced(torch.full((rows, cols), math.nan, dtype=dtype))
    y, h = q.forward(1)
    assert torch.equal(y, want_y) and torch.equal(h, want_h)
    for name, value in q.backward(1).items():
        assert torch.equal(value, want[name])
    M, N, K, _ = q.sizes
    for w_is in ("along k", "along n"):
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        if gemm_serves(x, w):
            want_y = gemm(x, w, y).clone()
            w = fenced(w) if w_is == "along k" else fenced(w.t()).t()
            assert torch.equal(gemm(fenced(x), w, fenced(y)), want_y)


def row_norm(w: Tensor, a: Tensor, b: Tensor, n: Tensor) -> Tensor:
    _C.row_norm(1, w, a, b, 0.5, n.fill_(math.nan))
    return n


def test_an_isa_that_the_machine_cannot_run_is_refused() -> None:
    isas = _C.cpu_isas()
    assert isas[-1] == "baseline" and _C.cpu_isa() == isas[0]
    with pytest.raises(ValueError, match=r"cannot run cpu isa 'vax'; it can run: .*baseline"):
        _C.set_cpu_isa("vax")
    assert _C.cpu_isa() == isas[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.skipif(not _C.openmp, reason="built without OpenMP")
def test_one_openmp_runtime_in_the_process() -> None:
    """The module uses the libgomp that torch has loaded. Two runtimes would mean two pools of threads on the same
    cores."""
    code = (
        "import torch, lora_kernels._C\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "print(sum(any(name in file for name in ('libgomp', 'libomp', 'libiomp')) for file in files))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
