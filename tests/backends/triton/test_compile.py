"""Every entry of the tables, compiled for its architecture with no GPU: the registers, memory and instructions that the
kernel takes, and the order in which it publishes and waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support import assembly
from support.compile_report import ONE_CODE, Report, Reports, compile_report, compiled_ahead, launch_of

from lora_kernels.plans import tiles

pytestmark = pytest.mark.slow


class Entry(NamedTuple):
    """One entry of the tables, in one of the variants that ask most of the compiler. It has dropout where the entry
    serves dropout."""

    arch: str
    kind: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float
    precision: str = "highest"

    def __str__(self) -> str:
        names = (str(t).removeprefix("torch.") for t in (self.dtype, self.adapter_dtype))
        dropout = "dropout" if self.p else "plain"
        return "-".join(
            [self.arch, self.kind, *names, dropout, *([self.precision] if self.adapter_dtype.itemsize == 4 else [])]
        )


def _entries() -> Iterator[Entry]:
    for (arch, itemsize), table in tiles.TABLES.items():
        for kind in table:
            # An entry is compiled without dropout if its table has another entry for dropout.
            p = 0.0 if f"{kind}_dropout" in table else 0.1
            if itemsize == 2:  # the two types share tiles but not instructions
                for dtype in (torch.bfloat16, torch.float16):
                    yield Entry(arch, kind, dtype, dtype, p)
                continue
            # "high" uses tensor cores, "highest" the ordinary cores. Beside an x in 16 bits only x wᵀ and dy w use
            # tensor cores, and what is done with fp32 adapters is done as for an x in fp32.
            for dtype in (torch.float32, torch.bfloat16):
                for precision in ("highest", "high"):
                    yield Entry(arch, kind, dtype, torch.float32, p, precision)


ENTRIES = list(_entries())


def _tile(entry: Entry) -> tiles.Tile:
    return tiles.TABLES[entry.arch, entry.adapter_dtype.itemsize][entry.kind]


def _code(number: int) -> tuple[object, ...]:
    entry = ENTRIES[number]
    return (None if entry.arch in ONE_CODE else entry.arch, _tile(entry), *entry[1:])


def _compile(number: int) -> Report:
    entry, tile = ENTRIES[number], _tile(ENTRIES[number])
    plan = tiles.Plan(entry.kind.startswith("decode"), tile, 1 if entry.kind.startswith("tickets") else 8)
    launch = launch_of(entry.arch, plan, entry.dtype, entry.adapter_dtype, entry.p, precision=entry.precision)
    return compile_report(launch, entry.arch)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Reports]:
    with compiled_ahead(request, _compile, _code) as reports:
        yield reports


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda number: str(ENTRIES[number]))
def test_an_entry_fits_its_architecture_and_uses_its_instructions(number: int, compiled: Reports) -> None:
    entry, report = ENTRIES[number], compiled[number]
    report.check(entry.arch)
    if entry.dtype == torch.float32 and entry.precision == "highest":
        assert not report.tensor_core, "rounds fp32 operands"
    else:
        assert report.tensor_core, "no tensor-core instructions"
    if entry.arch in ("sm_90", "sm_100") and "decode16" not in entry.kind and entry.adapter_dtype.itemsize == 2:
        wanted = "wgmma.mma_async" if entry.arch == "sm_90" else "tcgen05.mma"
        assert list(report.tensor_core) == [wanted], f"falls back to {list(report.tensor_core)}"
    assert (report.bulk_copies > 0) == ("_tma" in entry.kind)
    assembly.check_publication(report.assembly)
    assembly.check_consumption(report.assembly)


def test_every_entry_is_compiled_in_every_variant() -> None:
    entries = {(arch, itemsize, kind) for (arch, itemsize), table in tiles.TABLES.items() for kind in table}
    variants = Counter((e.arch, e.adapter_dtype.itemsize, e.kind) for e in ENTRIES)
    assert variants == {entry: entry[1] for entry in entries}  # two types of 16 bits; two precisions of two types of x


PTX = """
.visible .entry kernel(.param .u64 p)
{{
    mov.u32 %r1, %tid.x;
    @%p6 atom.global.gpu.relaxed.add.u32 %r9, [ %rd1 ], 1;
    bar.sync 0;
    @%p1 bra $L__BB0_2;
    st.global.v4.b32 [ %rd1 ], {{ %r1, %r2, %r3, %r4 }};
    {barrier}
    @%p6 atom.global.gpu.release.add.u32 %r5, [ %rd2 ], %r6;
    bra.uni $L__BB0_4;
$L__BB0_2:
    {spin}
    bar.sync 0;
    @%p2 bra $L__BB0_2;
$L__BB0_3:
    @%p3 ld.global.cg.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd3 ];
$L__BB0_4:
    ret;
}}
"""
SPIN = "@%p6 ld.global.gpu.acquire.b32 %r7, [ %rd2 ];"


def test_the_right_order_passes() -> None:
    text = PTX.format(barrier="bar.sync 0;", spin=SPIN)
    assembly.check_publication(text)
    assembly.check_consumption(text)


def test_a_missing_barrier_is_reported() -> None:
    with pytest.raises(AssertionError, match="no store comes before"):
        assembly.check_publication(PTX.format(barrier="", spin=SPIN))


SMALLEST = next(i for i, e in enumerate(ENTRIES) if (e.arch, e.kind, e.dtype) == ("sm_80", "decode16", torch.bfloat16))


@pytest.mark.parametrize("number", [SMALLEST], ids=lambda number: str(ENTRIES[number]))
def test_a_barrier_taken_out_of_a_kernel_is_reported(number: int, compiled: Reports) -> None:
    """The smallest kernel that publishes passes as compiled, and fails without the barrier that orders its stores."""
    text = compiled[number].assembly
    assembly.check_publication(text)
    lines = text.splitlines()
    (at,) = (i for i, line in enumerate(lines) if ".acq_rel." in line)
    while "st.global" not in lines[at]:
        at -= 1
        if lines[at].strip().startswith("bar.sync"):
            lines[at] = ""
    with pytest.raises(AssertionError, match=r"no store comes before|no barrier"):
        assembly.check_publication("\n".join(lines))


def test_a_missing_acquire_is_reported() -> None:
    with pytest.raises(AssertionError, match="before it is waited for"):
        assembly.check_consumption(PTX.format(barrier="bar.sync 0;", spin="ld.volatile.global.b32 %r7, [ %rd2 ];"))
