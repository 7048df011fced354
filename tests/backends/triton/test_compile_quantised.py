"""The kernels over a quantised weight, compiled for every architecture with no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support import assembly, compile_report
from support.compile_report import ONE_CODE, Report, Reports, empty
from support.launches import changed
from triton.backends.compiler import GPUTarget
from triton.language import constexpr
from triton.runtime import driver

from lora_kernels.backends.triton import launch as launching
from lora_kernels.backends.triton import quant as quantised
from lora_kernels.backends.triton.device import Launch, Target
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans import quant_tiles, tiles
from lora_kernels.quant.encode import FP8_BLOCK
from lora_kernels.quant.weight import CODES, FORMATS, Nested, QuantizedWeight, quantize_weight

pytestmark = pytest.mark.slow

N = K = 4096
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
"""The architectures that are compiled with every format. The others get the format that asks most of the compiler."""


class Entry(NamedTuple):
    """An entry of the tables, or the kernel "dequantise", with a format. `most` is the variant that asks most of the
    compiler: double quantisation in 4 bits, and dropout."""

    arch: str
    kind: str
    format: str
    dtype: torch.dtype
    most: bool
    adapter_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtypes = (str(t).removeprefix("torch.") for t in (self.dtype, self.adapter_dtype))
        return "-".join([self.arch, self.kind, self.format, *dtypes, *["most"] * self.most])


def _entries() -> Iterator[Entry]:
    for (arch, itemsize), table in quant_tiles.TABLES.items():
        for kind in table:
            # sm_86 and sm_89 are the same to the compiler.
            if arch == "sm_86":
                continue
            yield Entry(arch, kind, "nf4", torch.bfloat16, True, torch.float32 if itemsize == 4 else torch.bfloat16)
            if itemsize == 4:
                yield Entry(arch, kind, "nf4", torch.float32, True, torch.float32)
    for arch in ARCHITECTURES:
        yield Entry(arch, "decode64", "fp8", torch.float16, True, torch.float16)
        for kind in ("decode16", "backward"):
            # nf4 is fp4 with other levels.
            yield from (Entry(arch, kind, format, torch.bfloat16, False) for format in FORMATS if format != "nf4")
        yield from (Entry(arch, "dequantise", format, torch.bfloat16, format == "nf4") for format in FORMATS)


ENTRIES = list(_entries())


def weight_of(entry: Entry) -> QuantizedWeight:
    """Return a weight without memory. fp8 is in blocks of 128 x 128."""
    fp32, blocks = torch.float32, N * K // 64
    if entry.format in ("int8", "fp8"):
        scales = (N,) if entry.format == "int8" else (N // FP8_BLOCK, K // FP8_BLOCK)
        codes = empty(N, K, dtype=CODES[entry.format])
        return QuantizedWeight(entry.format, (N, K), entry.dtype, codes, empty(*scales, dtype=fp32))
    codes = empty(N, K // 2, dtype=torch.uint8)
    if not entry.most:
        return QuantizedWeight(entry.format, (N, K), entry.dtype, codes, empty(blocks, dtype=fp32), 64)
    nested = Nested(empty(256, dtype=fp32), empty(blocks // 256, dtype=fp32), empty(dtype=fp32))
    return QuantizedWeight(entry.format, (N, K), entry.dtype, codes, empty(blocks, dtype=torch.uint8), 64, nested)


def launch_of(entry: Entry) -> Launch:
    """Return the launch of the back-end for the entry's largest rank, with K or M split."""
    w, dtype = weight_of(entry), entry.dtype
    if entry.kind == "dequantise":
        return quantised.dequantise_launch(w, empty(N, K, dtype=dtype))
    tile = quant_tiles.TABLES[entry.arch, entry.adapter_dtype.itemsize][entry.kind]
    decode = entry.kind.startswith("decode")
    plan = tiles.Plan(decode, tile, 8, within=True)
    p, M = 0.1 if entry.most else 0.0, tile.BLOCK_M if decode else 4096
    return compile_report.launch_of(entry.arch, plan, dtype, entry.adapter_dtype, p, w, M)


def _code(number: int) -> tuple[object, ...]:
    entry = ENTRIES[number]
    tile = quant_tiles.TABLES[entry.arch, entry.adapter_dtype.itemsize].get(entry.kind)
    return (None if entry.arch in ONE_CODE else entry.arch, tile, *entry[1:])


def _compile(number: int) -> Report:
    return compile_report.compile_report(launch_of(ENTRIES[number]), ENTRIES[number].arch)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Reports]:
    with compile_report.compiled_ahead(request, _compile, _code) as reports:
        yield reports


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda number: str(ENTRIES[number]))
def test_an_entry_fits_its_architecture_and_uses_its_instructions(number: int, compiled: Reports) -> None:
    entry, report = ENTRIES[number], compiled[number]
    report.check(entry.arch)
    if entry.kind == "dequantise" or entry.dtype == torch.float32:
        assert not report.tensor_core, "rounds fp32 operands"
    elif entry.arch in ("sm_90", "sm_100") and "decode16" not in entry.kind and entry.adapter_dtype != torch.float32:
        wanted = "wgmma.mma_async" if entry.arch == "sm_90" else "tcgen05.mma"
        assert list(report.tensor_core) == [wanted], f"falls back to {list(report.tensor_core)}"
    else:
        assert report.tensor_core, "no tensor-core instructions"
    if entry.adapter_dtype != torch.float32:
        # In fp32 the product itself is made of these.
        assert "fma.rn.f32" not in report.assembly, "a weight is contracted"
    if entry.kind != "dequantise":
        assembly.check_publication(report.assembly)
        assembly.check_consumption(report.assembly)


def test_every_tile_and_format_is_compiled() -> None:
    tested = {quant_tiles.TABLES[e.arch, e.adapter_dtype.itemsize][e.kind] for e in ENTRIES if e.kind != "dequantise"}
    assert tested == {tile for table in quant_tiles.TABLES.values() for tile in table.values()}
    assert {(e.arch, e.format) for e in ENTRIES} >= {(arch, format) for arch in ARCHITECTURES for format in FORMATS}
    assert set(FORMATS) == {"nf4", "fp4", "int8", "fp8"}, "the formats that the back-ends for GPUs serve"


def test_one_code_serves_several_architectures() -> None:
    """The kernel has everything that could differ: products, dropout, conversions of fp8."""
    codes = []
    for arch in ("sm_80", "sm_89"):
        entry = Entry(arch, "backward", "fp8", torch.bfloat16, True)
        report = compile_report.compile_report(launch_of(entry), arch, anew=True)
        head, _, code = report.assembly.partition(f".target {arch}")
        codes.append((head, code))
    assert codes[0] == codes[1]


def test_the_compiler_would_contract_if_it_were_allowed_to() -> None:
    """It turns absmax of double quantisation into one operation."""
    (number,) = (i for i, e in enumerate(ENTRIES) if (e.arch, e.kind, e.format) == ("sm_90", "dequantise", "nf4"))
    launch = launch_of(ENTRIES[number])
    contracted = changed(launch, enable_fp_fusion=True)
    assert "fma.rn.f32" in compile_report.compile_report(contracted, "sm_90").assembly


class NoDriver:
    """Answers what Triton asks of a driver while it binds arguments and compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("kind", ["nf4", "fp8", "dense"])
def test_what_is_compiled_is_what_triton_would_launch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own binder finds the same types, constants and divisibilities in the arguments, and in the tuple that
    stands for a quantised W."""
    x, y, h, a, b = (torch.zeros(shape).bfloat16() for shape in ((32, 256), (32, 128), (32, 16), (16, 256), (128, 16)))
    w = torch.randn(128, 256).bfloat16()
    if kind != "dense":
        w = quantize_weight(w, kind, double_quant=kind == "nf4")
    target = Target(tiles.Gpu("sm_90", 132), contextlib.nullcontext, lambda: 0, lambda: False)
    plan = tiles.Plan(False, quant_tiles.TABLES["sm_90", 2]["backward"], 1, within=kind != "dense")
    saved, gradients = launching.Saved(x, h), launching.GradientBuffers(x, a, b, h)
    launch = launching.backward_launch(target, plan, y, saved, Base(w), Adapter(a, b, 0.75), gradients)
    kernel = launch.kernel
    monkeypatch.setattr(driver, "_active", NoDriver())
    source = kernel.warmup(**launch.arguments, **launch.options, grid=(launch.programs,)).src
    kernel.device_caches.clear()
    signature, constants, attributes = compile_report.specialise(kernel, launch.arguments)
    assert source.signature == signature
    assert {path: value for path, value in source.attrs.items() if value} == attributes
    assert {path: constexpr(value) for path, value in source.constants.items()} == constants
