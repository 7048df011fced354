"""The native CPU kernels, one by one and by every instruction set this machine can run, against the formula in fp64."""

from __future__ import annotations

import functools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_kernels import random

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")

CODES = {torch.float32: _C.F32, torch.bfloat16: _C.BF16, torch.float16: _C.F16}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
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
Bound = tuple[Tensor, Tensor, int]
SEED = 0x0123_4567_89AB_CDEF


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = _C.cpu_isas()[0]
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(best)


class Operands:
    """Operands with their rows apart, and what the base GEMM left in y and dx; other results start as NaN."""

    def __init__(
        self,
        M: int,
        N: int,
        K: int,
        R: int,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        p: float,
        scale: float = 0.75,
    ):
        generator = torch.Generator().manual_seed(M * 7 + N)

        def draw(rows: int, cols: int, dtype: torch.dtype, std: float = 1.0, pad: int = 0) -> Tensor:
            return (torch.randn(rows, cols + pad, generator=generator) * std).to(dtype)[:, :cols]

        self.sizes, self.p, self.scale = (M, N, K, R), p, scale
        self.x, self.dy = draw(M, K, dtype, pad=3), draw(M, N, dtype, pad=5)
        self.a, self.b = draw(R, K, adapter_dtype, K**-0.5, pad=1), draw(N, R, adapter_dtype, R**-0.5, pad=2)
        self.h, self.y, self.dx = draw(M, R, dtype, pad=1), draw(M, N, dtype), draw(M, K, dtype)
        self.bias = torch.randn(N, generator=generator).to(dtype)
        self.seed = torch.tensor(SEED)
        self.nan = lambda rows, cols, dtype: torch.full((rows, cols), math.nan, dtype=dtype)

    def call(self) -> tuple:
        return self.scale, random.threshold(self.p), self.seed.data_ptr()

    def forward(self, threads: int = 2, *, down: bool = True, up: bool = True) -> tuple[Tensor, Tensor]:
        M, N, K, R = self.sizes
        h = self.nan(*self.h.shape, self.x.dtype) if down else self.h
        y = self.y.clone()
        _C.forward(
            threads, CODES[self.x.dtype], CODES[self.a.dtype], M, K, *at(self.x if down else None),
            [(N, R, *at(self.a), *at(self.b), self.bias.data_ptr(), *at(y if up else None), *at(h), *self.call())],
            [],
        )  # fmt: skip
        return y, h

    def backward(self, threads: int = 2, dx: bool = True, da: bool = True, db: bool = True) -> dict[str, Tensor]:
        M, N, K, R = self.sizes
        out = {}
        if dx:
            out["dx"] = self.dx.clone()
        if da:
            out["da"] = self.nan(*self.a.shape, self.a.dtype)
        if db:
            out["db"] = self.nan(*self.b.shape, self.b.dtype)
        _C.backward(
            threads, CODES[self.x.dtype], CODES[self.a.dtype], M, K, *at(self.x if da else None), *at(out.get("dx")),
            [(N, R, *at(self.dy), *at(self.a), *at(self.b), *at(self.h if db else None), *at(out.get("da")),
              *at(out.get("db")), *self.call())],
        )  # fmt: skip
        return out


def at(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))


def masked(q: Operands) -> Tensor:
    """x̂ in fp64."""
    M, _, K, _ = q.sizes
    return q.x.double() * random.keep_mask(q.seed, M, K, q.p) * random.rescale(q.p) if q.p else q.x.double()


@functools.cache
def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> tuple[Operands, dict[str, Bound]]:
    """The operands, and for every result its fp64 value, the sum of the magnitudes behind it, and their number."""
    q = Operands(*shape, dtype, adapter_dtype, p)
    M, N, K, R = shape
    x, dy, a, b, h, y, dx = masked(q), *(getattr(q, name).double() for name in ("dy", "a", "b", "h", "y", "dx"))
    y = torch.stack([y, q.bias.double().expand_as(y)])  # two terms, each with its own magnitude
    keep = random.keep_mask(q.seed, M, K, p) * random.rescale(p) if p else torch.ones(M, K)
    s = q.scale

    def both(f) -> tuple[Tensor, Tensor]:
        return f(x, dy, a, b, h, y, dx), f(*(t.abs() for t in (x, dy, a, b, h, y, dx)))

    return q, {
        "h": (*both(lambda x, dy, a, b, h, y, dx: x @ a.t()), K),
        "y of h": (*both(lambda x, dy, a, b, h, y, dx: y.sum(0) + s * h @ b.t()), R),
        "y": (*both(lambda x, dy, a, b, h, y, dx: y.sum(0) + s * x @ a.t() @ b.t()), K + R),
        "dx": (*both(lambda x, dy, a, b, h, y, dx: dx + keep * (s * dy @ b @ a)), N + R),
        "da": (*both(lambda x, dy, a, b, h, y, dx: (s * dy @ b).t() @ x), N + M),
        "db": (*both(lambda x, dy, a, b, h, y, dx: s * dy.t() @ h), M),
    }


def close(got: Tensor, bound: Bound, through_bf16: bool = False) -> None:
    """Within one rounding to got's dtype and an fp32 sum's bound for `terms` products: n · 2⁻²⁴ · Σ|products|; where h
    or g passes through bf16, one rounding of them more."""
    want, magnitude, terms = bound
    assert not torch.isnan(got).any()
    fp32 = ((4 + terms) * 2**-24 + (2**-8 if through_bf16 else 0)) * magnitude
    rounding = (
        torch.finfo(got.dtype).eps / 2 * (want.abs() + fp32)
        + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    )
    assert ((got.double() - want).abs() <= fp32 + rounding).all()


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_forward(isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float) -> None:
    """h = x̂ aᵀ alone, y += s h bᵀ alone, and both in one call (where y sees h before it is rounded, if
    it is not multiplied as bf16)."""
    pairs = isa == "avx512_bf16" and dtype == adapter_dtype == torch.bfloat16
    for shape in SHAPES:
        q, want = problem(shape, dtype, adapter_dtype, p)
        close(q.forward(up=False)[1], want["h"])
        close(q.forward(down=False)[0], want["y of h"], pairs)
        y, h = q.forward()
        close(y, want["y"], pairs)
        close(h, want["h"])


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_backward(isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float) -> None:
    pairs = isa == "avx512_bf16" and dtype == adapter_dtype == torch.bfloat16
    for shape in SHAPES:
        q, want = problem(shape, dtype, adapter_dtype, p)
        for name, value in q.backward().items():
            close(value, want[name], pairs and name != "db")


@pytest.mark.parametrize("shape", [(67, 48, 33, 3), (130, 100, 90, 65)])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_backward_computes_what_is_asked(
    isa: str, shape: tuple[int, int, int, int], adapter_dtype: torch.dtype
) -> None:
    """Each result alone has the very bits it has beside the others."""
    q = Operands(*shape, torch.bfloat16, adapter_dtype, 0.1)
    everything = q.backward()
    for name in everything:
        alone = q.backward(**{other: other == name for other in everything})
        assert alone.keys() == {name} and torch.equal(alone[name], everything[name])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [*((dtype, torch.float32) for dtype in CODES), DTYPES[1]])
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


GEMM_SHAPES = [(1, 1, 1), (3, 100, 2100), (16, 97, 1030), (17, 33, 129), (40, 800, 300), (250, 70, 513), (29, 31, 0)]
GEMM_DTYPES = [dtype for dtype in CODES if _C.gemm_of(CODES[dtype])]


def gemm(x: Tensor, w: Tensor, y: Tensor, threads: int = 2, add: bool = False) -> Tensor:
    operands = (*at(x), w.data_ptr(), *w.stride(), *at(y))
    _C.gemm(threads, CODES[x.dtype], y.shape[0], y.shape[1], x.shape[1], *operands, add)
    return y


def gemm_serves(x: Tensor, w: Tensor) -> bool:
    return _C.gemm_of(CODES[x.dtype]) or _C.gemm_few(x.shape[0], w.stride(1))


def gemm_operands(M: int, N: int, K: int, dtype: torch.dtype, w_is: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M + N)
    x = torch.randn(M, K + 3, generator=generator).to(dtype)[:, :K]
    w = torch.randn(N, 2 * K + 1, generator=generator).to(dtype)
    w = {"along k": w[:, :K], "along n": w.t().contiguous().t()[:, :K], "strided": w[:, : 2 * K : 2]}[w_is]
    return x, w, torch.full((M, N), math.nan, dtype=dtype)


@pytest.mark.parametrize("w_is", ["along k", "along n", "strided"])
@pytest.mark.parametrize("dtype", CODES)
def test_gemm(isa: str, dtype: torch.dtype, w_is: str) -> None:
    """y = x wᵀ, in fp32 and, by AVX512_BF16, in bf16 for every M and w, in other 16 bits where there are few rows."""
    served = 0
    for M, N, K in [*GEMM_SHAPES, (2100, 40, 1100)]:
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        if not gemm_serves(x, w):
            continue
        served += 1
        exact, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
        close(gemm(x, w, y), (exact, size, K))
    every = dtype == torch.float32 or (dtype == torch.bfloat16 and isa == "avx512_bf16")
    few = {"along k": 3, "along n": 1, "strided": 0}[w_is]  # a w of one element lies along both
    assert served == (len(GEMM_SHAPES) + 1 if every else few)


def test_a_gemm_that_is_not_there() -> None:
    x, w, y = gemm_operands(17, 8, 8, torch.float16, "along k")
    with pytest.raises(ValueError, match="no GEMM of this dtype: see gemm_of"):
        gemm(x, w, y)


@pytest.mark.parametrize("M", [1, 3, 5, 16])
@pytest.mark.parametrize("dtype", CODES)
def test_a_launch_that_computes_the_base_of_few_rows_too(isa: str, dtype: torch.dtype, M: int) -> None:
    """Bit for bit what the GEMM and then the low-rank half give: two layers at once, the second without a base."""
    K, R, N = 1030, 20, (300, 97)
    x = torch.randn(M, K).to(dtype)
    ws, as_, bs = ([torch.randn(*shape).to(dtype) for shape in shapes] for shapes in (
        [(n, K) for n in N], [(R, K) for _ in N], [(n, R) for n in N]))  # fmt: skip
    want = [gemm(x, w, torch.full((M, w.shape[0]), math.nan, dtype=dtype)) for w in ws]

    def run(threads: int, ys: list[Tensor], bases: list) -> None:
        each = [(n, R, *at(a), *at(b), 0, *at(y), 0, 0, 0.5, 0, 0) for n, a, b, y in zip(N, as_, bs, ys, strict=True)]
        _C.forward(threads, CODES[dtype], CODES[dtype], M, K, *at(x), each, bases)

    ys = [torch.full_like(want[0], math.nan), want[1].clone()]
    run(1, want, [])
    for threads in (1, 2, 7):
        got = [ys[0].clone(), ys[1].clone()]
        run(threads, got, [at(ws[0]), None])
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("w_is", ["along k", "along n"])
@pytest.mark.parametrize("dtype", GEMM_DTYPES)
def test_gemm_adds_with_one_rounding(dtype: torch.dtype, w_is: str) -> None:
    for M, N, K in [(17, 33, 129), (40, 800, 300), (70, 70, 2113), (29, 31, 0)]:
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        y = torch.randn(M, N).to(dtype)
        exact = y.double() + x.double() @ w.double().t()
        size = y.double().abs() + x.double().abs() @ w.double().abs().t()
        close(gemm(x, w, y, add=True), (exact, size, K + 1))


@pytest.mark.parametrize("w_is", ["along k", "along n"])
@pytest.mark.parametrize("dtype", GEMM_DTYPES)
def test_gemm_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, w_is: str) -> None:
    for M, N, K in [*GEMM_SHAPES, (1030, 300, 2113)]:
        x, w, y = gemm_operands(M, N, K, dtype, w_is)
        want = gemm(x, w, y, threads=1).clone()
        for threads in (1, 2, 3, 7):
            assert torch.equal(gemm(x, w, y.fill_(math.nan), threads), want)


@pytest.mark.parametrize(("M", "K"), [(48, 200), (48, 768), (16, 4096), (48, 4096)])
@pytest.mark.parametrize("dtype", GEMM_DTYPES)
def test_gemm_is_as_exact_as_torch(dtype: torch.dtype, M: int, K: int) -> None:
    """No chain of sums is longer than MKL's: oneDNN's, over all of K, has up to 2.2 times this error in fp32."""
    x, w, y = gemm_operands(M, 512, K, dtype, "along k")
    exact = x.double() @ w.double().t()
    error, plain = ((t.double() - exact).square().mean().sqrt() for t in (gemm(x, w, y), x @ w.t()))
    assert error <= 1.25 * plain


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: list[int], key: list[int], want: list[int]) -> None:
    """kat_vectors of Random123 (Salmon et al.), philox4x32-10."""
    assert _C.philox(counter, key) == want


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
def test_keep_bits_are_those_of_the_rule(isa: str, seed: int, p: float) -> None:
    M, K = 9, 203
    words = torch.frombuffer(bytearray(_C.keep_bits(seed, random.threshold(p), 0, M, K)), dtype=torch.uint8).view(M, -1)
    bits = (words[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, :K].bool()
    assert torch.equal(bits, random.keep_mask(torch.tensor(seed), M, K, p))


def test_rows_beyond_32_bits_have_their_own_bits(isa: str) -> None:
    """m enters the counter with 64 bits."""
    assert _C.keep_bits(SEED, 30000, 5, 1, 64) != _C.keep_bits(SEED, 30000, 5 + 2**32, 1, 64)
    group, row = 3, 5 + 2**32
    words = _C.philox([group, row & 0xFFFFFFFF, row >> 32, 0], [SEED & 0xFFFFFFFF, SEED >> 32])
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert _C.keep_bits(SEED, 30000, row, 1, 64)[group] == sum((lane >= 30000) << j for j, lane in enumerate(lanes))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(1, 13, 21, 5), (7, 33, 47, 8), (66, 70, 65, 3)])
def test_reads_and_writes_stay_inside(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Every operand ends at the last byte before a page that may not be touched."""
    q = Operands(*shape, dtype, dtype, 0.1)
    pages = []

    def fenced(t: Tensor) -> Tensor:
        t = t.contiguous()
        size = t.numel() * t.element_size()
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        buffer = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=whole - size).view(t.shape)
        buffer.copy_(t)
        protect(buffer.data_ptr() + size)
        pages.append((memory, buffer.data_ptr() + size))
        return buffer

    want_y, want_h = q.forward(1)
    want = q.backward(1)
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
    for _, page in pages:
        protect(page, read_write=True)


def protect(page: int, read_write: bool = False) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 3 if read_write else 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_isa_is_chosen_and_named() -> None:
    isas = _C.cpu_isas()
    assert isas[-1] == "baseline" and _C.cpu_isa() == isas[0]
    with pytest.raises(ValueError, match=r"cannot run cpu isa 'vax'; it can run: .*baseline"):
        _C.set_cpu_isa("vax")
    assert _C.cpu_isa() == isas[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.skipif(not _C.openmp, reason="built without OpenMP")
def test_one_openmp_runtime_in_the_process() -> None:
    """torch's own libgomp serves the module too: two runtimes would mean two pools of threads on the same cores."""
    code = (
        "import torch, lora_kernels._C\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "print(sum(any(name in file for name in ('libgomp', 'libomp', 'libiomp')) for file in files))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
