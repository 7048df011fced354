"""Every tile of the back-end `composite`, compiled for its architectures with no GPU: the registers, memory and
instructions that the kernels take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.compile_report import ONE_CODE, Report, Reports, compile_report, compiled_ahead, specialise
from support.composite_launches import launches

from lora_kernels.backends.composite import tiles

pytestmark = pytest.mark.slow

KERNELS = {
    tiles.DOWN: "down",
    tiles.UP: "up",
    tiles.OVER_DY: "pass_over_dy",
    tiles.OVER_X: "pass_over_x",
    tiles.OVER_X_OF_LIST: "pass_over_x",
}
ROWS = {tiles.MANY: 8192, tiles.FEW: 16}
HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16


class Entry(NamedTuple):
    """One tile, in one of the variants that ask most of the compiler. All have dropout."""

    arch: str
    kernel: str
    rows: str
    BLOCK_R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    precision: str = "highest"

    def __str__(self) -> str:
        names = (str(t).removeprefix("torch.") for t in (self.dtype, self.adapter_dtype))
        return "-".join([self.arch, self.kernel, self.rows, f"r{self.BLOCK_R}", *names, self.precision])


def _entries() -> Iterator[Entry]:
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        for rows, kernel in itertools.product(ROWS, KERNELS):
            if rows == tiles.FEW and arch in ("sm_100", "sm_120"):
                continue  # tiles for few rows are small: it takes too long to compile them for every architecture
            for BLOCK_R in tiles.MATRIX[rows][kernel]:
                up, nvidia = kernel == tiles.UP, arch.startswith("sm_")
                # The two types of 16 bits have instructions of their own; `up` takes more registers for fp32 adapters.
                yield Entry(arch, kernel, rows, BLOCK_R, BF16, SINGLE if up and nvidia else BF16)
                if rows == tiles.MANY:
                    yield Entry(arch, kernel, rows, BLOCK_R, HALF, HALF)
    for rows, kernel in itertools.product(ROWS, KERNELS):
        for BLOCK_R in tiles.ORDINARY[rows][kernel]:
            yield Entry("sm_75", kernel, rows, BLOCK_R, HALF, SINGLE)
            yield Entry("sm_80", kernel, rows, BLOCK_R, SINGLE, SINGLE)
            if kernel != tiles.UP:
                yield Entry("sm_90", kernel, rows, BLOCK_R, BF16, SINGLE)
            if rows == tiles.MANY:
                yield Entry("sm_80", kernel, rows, BLOCK_R, HALF, SINGLE)
                yield Entry("sm_100", kernel, rows, BLOCK_R, HALF, SINGLE)
                yield Entry("gfx942", kernel, rows, BLOCK_R, BF16, SINGLE)
            if rows == tiles.MANY:
                yield Entry("sm_100", kernel, rows, BLOCK_R, SINGLE, SINGLE)
                yield Entry("sm_90", kernel, rows, BLOCK_R, SINGLE, SINGLE)
                yield Entry("sm_90", kernel, rows, BLOCK_R, SINGLE, SINGLE, "high")


def _layers(entry: Entry) -> int:
    """Return the length of the longest list that the tile serves."""
    if entry.kernel != tiles.OVER_X_OF_LIST:
        return 1
    return min(tiles.MAX_LAYERS, tiles.max_rank_of_list(entry.arch, entry.adapter_dtype.itemsize) // entry.BLOCK_R)


ENTRIES = [entry for entry in _entries() if entry.kernel != tiles.OVER_X_OF_LIST or _layers(entry) > 1]


def _compile(number: int) -> Report:
    entry = ENTRIES[number]
    torch.set_float32_matmul_precision(entry.precision)
    made = launches(
        entry.arch, entry.dtype, entry.adapter_dtype, 0.1, ROWS[entry.rows], entry.BLOCK_R, _layers(entry)
    )  # fmt: skip
    return compile_report(made[KERNELS[entry.kernel]], entry.arch)


def _code(number: int) -> tuple[object, ...]:
    entry = ENTRIES[number]
    return (None if entry.arch in ONE_CODE else entry.arch, *entry[1:])


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Reports]:
    with compiled_ahead(request, _compile, _code) as reports:
        yield reports


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda number: str(ENTRIES[number]))
def test_a_tile_fits_its_architecture_and_uses_its_instructions(number: int, compiled: Reports) -> None:
    entry, report = ENTRIES[number], compiled[number]
    report.check(entry.arch)
    if entry.dtype == entry.adapter_dtype:
        in_16_bits = entry.dtype.itemsize == 2
    else:  # beside bf16 the products with fp32 adapters that give y and dx are made in tf32, all others in fp32
        tf32 = entry.dtype == BF16 and entry.arch.startswith("sm_")
        in_16_bits = tf32 and entry.kernel in (tiles.UP, tiles.OVER_X)
    in_fp32 = entry.arch == "gfx942"  # whose matrix units multiply fp32 without rounding it
    matrix_units = entry.arch != "sm_75" and (in_16_bits or in_fp32 or entry.precision == "high")
    assert bool(report.tensor_core) == matrix_units


OTHERS = [
    (arch, dtype)
    for arch, dtypes in {"gfx90a": (BF16, SINGLE), "gfx1100": (HALF, BF16, SINGLE), "gfx1201": (BF16,)}.items()
    for dtype in dtypes
]


@pytest.mark.parametrize("arch, dtype", OTHERS)
def test_the_kernels_compile_for_other_gpus_of_amd(arch: str, dtype: torch.dtype) -> None:
    """They may spill a few registers there."""
    for launch in launches(arch, dtype, SINGLE, 0.1, 8192, 16).values():
        assert compile_report(launch, arch).assembly


def test_large_operands_are_read_and_written_in_vectors() -> None:
    """x, dy, dx and y are moved sixteen bytes at a time where they are aligned."""
    for name, launch in launches("sm_80", BF16, BF16, 0.1, 8192, 16).items():
        text = compile_report(launch, "sm_80").assembly
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
        if name != "add_parts":
            assert copies or re.search(r"ld\.global\.v4", text), name
            assert re.search(r"st\.global\.v4", text), name
        if name in ("down", "pass_over_x"):
            assert copies, f"{name} does not read x asynchronously"


def test_an_m_that_changes_does_not_compile_again() -> None:
    """Neither the number of rows nor what follows from it is in the key of a compiled kernel."""
    keys = []
    for M in (8192, 5000, 4097):
        found = launches("sm_80", BF16, BF16, 0.1, M, 16)
        keys.append({name: repr(specialise(each.kernel, each.arguments)) for name, each in found.items()})
    assert keys[0] == keys[1] == keys[2]
