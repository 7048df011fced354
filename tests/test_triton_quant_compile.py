"""The kernels over a quantised weight, compiled for every architecture with no GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import assembly
import compile_report
from compile_report import REGISTERS, SHARED_MEMORY, TENSOR_MEMORY, Report

from lora_kernels.backends import _triton_launch as launching
from lora_kernels.backends import _triton_quant as quantised
from lora_kernels.kernels import quant_tiles, tiles
from lora_kernels.quant import CODES, Nested, QuantizedWeight
from lora_kernels.quant_encode import FP8_BLOCK

pytestmark = pytest.mark.timeout(90)

N = K = 4096
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
"""Each with every format. The others have the one that asks most of the compiler."""
FORMATS = ("nf4", "fp4", "int8", "fp8")


class Entry(NamedTuple):
    """A tile of the tables, or "dequantise", with a format. `most`: the variant that asks most of the compiler, with
    double quantisation in 4 bits, dropout and, beside 16 bits, adapters in fp32."""

    arch: str
    kind: str
    format: str
    dtype: torch.dtype
    most: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.arch, self.kind, self.format, dtype, *["most"] * self.most])


def _entries() -> Iterator[Entry]:
    for (arch, itemsize), table in quant_tiles.TABLES.items():
        for kind in table:
            # sm_86 and sm_89 are the same to the compiler, and fp32 has one table for all.
            if itemsize == 2 and arch != "sm_86":
                yield Entry(arch, kind, "nf4", torch.bfloat16, True)
            elif itemsize == 4 and arch in ("sm_80", "sm_100"):
                yield Entry(arch, kind, "nf4", torch.float32, True)
    for arch in ARCHITECTURES:
        yield Entry(arch, "decode64", "fp8", torch.float16, True)
        yield from (Entry(arch, "decode16", format, torch.bfloat16, False) for format in FORMATS)
        yield from (Entry(arch, "dequantise", format, torch.bfloat16, format == "nf4") for format in FORMATS)


ENTRIES = list(_entries())


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight_of(entry: Entry) -> QuantizedWeight:
    """With no memory. fp8 is in blocks of 128 x 128."""
    fp32, blocks = torch.float32, N * K // 64
    if entry.format in ("int8", "fp8"):
        scales = (N,) if entry.format == "int8" else (N // FP8_BLOCK, K // FP8_BLOCK)
        codes = _empty(N, K, dtype=CODES[entry.format])
        return QuantizedWeight(entry.format, (N, K), entry.dtype, codes, _empty(*scales, dtype=fp32))
    codes = _empty(N, K // 2, dtype=torch.uint8)
    if not entry.most:
        return QuantizedWeight(entry.format, (N, K), entry.dtype, codes, _empty(blocks, dtype=fp32), 64)
    nested = Nested(_empty(256, dtype=fp32), _empty(blocks // 256, dtype=fp32), _empty(dtype=fp32))
    return QuantizedWeight(entry.format, (N, K), entry.dtype, codes, _empty(blocks, dtype=torch.uint8), 64, nested)


def launch_of(entry: Entry) -> launching.Launch:
    """What the back-end would launch for the entry's largest rank, with K split."""
    w, dtype = weight_of(entry), entry.dtype
    if entry.kind == "dequantise":
        return quantised.dequantise_launch(w, _empty(N, K, dtype=dtype))
    target = launching.Target(entry.arch, 132, contextlib.nullcontext, lambda: 0, lambda: False)
    tile = quant_tiles.TABLES[entry.arch, dtype.itemsize][entry.kind]
    M, R, p = tile.BLOCK_M, tile.BLOCK_R, 0.1 if entry.most else 0.0
    adapter_dtype = torch.float32 if entry.most and dtype == torch.bfloat16 else dtype
    a, b = _empty(R, K, dtype=adapter_dtype), _empty(N, R, dtype=adapter_dtype)
    x, y, h, bias = (_empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (M, R), (N,)))
    seed = _empty(dtype=torch.int64) if p else None
    return quantised.forward_launch(target, tiles.Plan(True, tile, 8), x, w, a, b, bias, y, h, 0.75, p, seed, True)


def _compile(number: int) -> Report:
    return compile_report.compile_report(launch_of(ENTRIES[number]), ENTRIES[number].arch)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[int, Future[Report]]]:
    """Reports on the entries whose tests were selected, from two processes."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    selected = {item.callspec.params["number"] for item in tests if item.originalname == "test_quantised_entry"}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {number: pool.submit(_compile, number) for number in sorted(selected)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda number: str(ENTRIES[number]))
def test_quantised_entry(number: int, compiled: dict[int, Future[Report]]) -> None:
    entry, report = ENTRIES[number], compiled[number].result()
    cuda = entry.arch.startswith("sm_")
    assert report.spills == 0, f"{report.spills} bytes of registers spilled"
    assert report.shared <= SHARED_MEMORY[entry.arch], f"{report.shared} bytes of shared memory"
    assert report.registers <= (REGISTERS if cuda else 512)
    assert report.tensor_memory <= TENSOR_MEMORY
    assert not report.trap, "the kernel is a trap"
    if entry.kind == "dequantise" or (entry.dtype == torch.float32 and cuda):
        assert not report.tensor_core, "rounds fp32 operands"
    elif entry.arch in ("sm_90", "sm_100") and entry.kind == "decode64":
        wanted = "wgmma.mma_async" if entry.arch == "sm_90" else "tcgen05.mma"
        assert list(report.tensor_core) == [wanted], f"falls back to {list(report.tensor_core)}"
    else:
        assert report.tensor_core, "no tensor-core instructions"
    if entry.dtype != torch.float32:
        # In fp32 the product itself is made of these.
        assert "fma.rn.f32" not in report.assembly and "v_fma_f32" not in report.assembly, "a weight is contracted"
    if entry.kind != "dequantise":
        publication = assembly.check_publication if cuda else assembly.check_publication_amd
        publication(report.assembly)
        if cuda:
            assembly.check_consumption(report.assembly)


def test_no_tile_is_left_out() -> None:
    tested = {quant_tiles.TABLES[e.arch, e.dtype.itemsize][e.kind] for e in ENTRIES if e.kind != "dequantise"}
    assert tested == {tile for table in quant_tiles.TABLES.values() for tile in table.values()}
    assert {(e.arch, e.format) for e in ENTRIES} >= {(arch, format) for arch in ARCHITECTURES for format in FORMATS}
    assert set(FORMATS) == set(CODES)


def test_contraction_is_found() -> None:
    """With it the compiler does turn absmax of double quantisation into one operation."""
    (number,) = (i for i, e in enumerate(ENTRIES) if (e.arch, e.kind, e.format) == ("sm_90", "dequantise", "nf4"))
    launch = launch_of(ENTRIES[number])
    contracted = launch._replace(options=launch.options | {"enable_fp_fusion": True})
    assert "fma.rn.f32" in compile_report.compile_report(contracted, "sm_90").assembly
