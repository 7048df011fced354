"""The kernels of many adapters, compiled for their architectures with no GPU: the registers, memory and instructions
that they take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.compile_report import ONE_CODE, Report, Reports, compile_report, compiled_ahead, specialise
from support.composite_many_launches import launches

pytestmark = pytest.mark.slow

HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16
LAUNCHES = (
    "forward down", "forward up", "backward down", "backward up", "da parts", "da sum", "db parts", "db sum",
)  # fmt: skip
"""What `launches` returns, in its order."""


class Entry(NamedTuple):
    """A launch, in one of the variants that ask most of the compiler. All have dropout."""

    arch: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    which: int
    b: str = "r"

    def __str__(self) -> str:
        names = (str(t).removeprefix("torch.") for t in (self.dtype, self.adapter_dtype))
        return "-".join([self.arch, LAUNCHES[self.which], *names, self.b])


def _entries() -> Iterator[Entry]:
    for which, name in enumerate(LAUNCHES):
        if name.endswith("sum"):  # too small to differ
            yield Entry("sm_80", BF16, BF16, which)
            continue
        for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
            yield Entry(arch, BF16, BF16, which)
            yield Entry(arch, BF16, SINGLE, which)
        yield Entry("sm_90", HALF, HALF, which)
        for arch in ("sm_75", "sm_80", "sm_100"):
            yield Entry(arch, HALF, SINGLE, which)
            yield Entry(arch, SINGLE, SINGLE, which)
    yield Entry("sm_90", BF16, BF16, LAUNCHES.index("forward up"), "c")  # the b of a stack


ENTRIES = list(_entries())


def _compile(number: int) -> Report:
    arch, dtype, adapter_dtype, which, b = ENTRIES[number]
    return compile_report(launches(arch, dtype, adapter_dtype, b=b)[which], arch)


def _code(number: int) -> tuple[object, ...]:
    entry = ENTRIES[number]
    return (None if entry.arch in ONE_CODE else entry.arch, *entry[1:])


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Reports]:
    with compiled_ahead(request, _compile, _code) as reports:
        yield reports


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda number: str(ENTRIES[number]))
def test_a_launch_fits_its_architecture_and_uses_its_instructions(number: int, compiled: Reports) -> None:
    entry, report = ENTRIES[number], compiled[number]
    report.check(entry.arch)
    name, nvidia = LAUNCHES[entry.which], entry.arch.startswith("sm_")
    products = not name.endswith("sum")
    in_16_bits = entry.adapter_dtype.itemsize == 2
    tf32 = entry.dtype == BF16 and nvidia and name.endswith("up")
    units = products and entry.arch != "sm_75" and (in_16_bits or tf32 or not nvidia)
    assert bool(report.tensor_core) == units


def test_large_operands_are_read_and_written_in_vectors() -> None:
    """x, dy, dx, y and the adapters are moved sixteen bytes at a time, though their addresses come from memory."""
    made = launches("sm_90", BF16, BF16, b="c")
    for name, launch in zip(LAUNCHES, made, strict=True):
        text = compile_report(launch, "sm_90").assembly
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
        if name.endswith(("down", "parts")):
            assert copies, name
        if name.endswith("up"):
            assert re.search(r"ld\.global\S*\.v4", text) and re.search(r"st\.global\S*\.v4", text), name


def test_neither_rows_nor_adapters_compile_again() -> None:
    keys = []
    for M, n in ((8192, 16), (4097, 3), (1, 1)):
        found = launches("sm_80", BF16, BF16, M=M, n=n)
        keys.append([repr(specialise(each.kernel, each.arguments)) for each in found])
    assert keys[0] == keys[1] == keys[2]
