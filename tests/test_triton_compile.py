"""Every tile of the tables, compiled for its architecture with no GPU: what the compiler made of it, and in what order
it publishes and waits."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import assembly
from compile_report import REGISTERS, SHARED_MEMORY, TENSOR_MEMORY, Report, compile_report

from lora_kernels.backends import _triton_launch as launching
from lora_kernels.kernels import tiles

pytestmark = pytest.mark.timeout(90)


class Entry(NamedTuple):
    """One entry of the tables, in one of the variants that ask most of the compiler: with dropout, where the entry
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
            [self.arch, self.kind, *names, dropout, *([self.precision] if self.dtype.itemsize == 4 else [])]
        )


def _entries() -> Iterator[Entry]:
    for (arch, itemsize), table in tiles.TABLES.items():
        for kind in table:
            # An entry with a twin for dropout, or of a kind that is never chosen with it, is compiled without.
            p = 0.0 if f"{kind}_dropout" in table or kind.startswith("redundant") else 0.1
            if itemsize == 2:
                # One tile, other instructions: both types, once with the adapters that take more registers.
                yield Entry(arch, kind, torch.bfloat16, torch.float32, p)
                yield Entry(arch, kind, torch.float16, torch.float16, p)
            else:
                # "high" is for tensor cores, "highest" for the ordinary ones (or AMD's matrix cores, in full fp32).
                for precision in ("highest", "high"):
                    yield Entry(arch, kind, torch.float32, torch.float32, p, precision)


ENTRIES = list(_entries())


def launch_of(entry: Entry) -> launching.Launch:
    """What the back-end would launch for the entry's largest rank, on tensors with no memory."""
    target = launching.Target(entry.arch, 132, contextlib.nullcontext, lambda: 0, lambda: False)
    tile = tiles.TABLES[entry.arch, entry.dtype.itemsize][entry.kind]
    M, N, K, R = 4096, 4096, 4096, tile.BLOCK_R

    def empty(*shape: int, dtype: torch.dtype = entry.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, y, h = empty(M, K), empty(N, K), empty(M, N), empty(M, R)
    a, b = empty(R, K, dtype=entry.adapter_dtype), empty(N, R, dtype=entry.adapter_dtype)
    seed = empty(dtype=torch.int64) if entry.p else None
    torch.set_float32_matmul_precision(entry.precision)
    try:
        if entry.kind.startswith("backward"):
            return launching.backward_launch(
                target, tiles.Plan(False, tile, 8), y, x, w, a, b, h, x, a, b, h, 0.75, entry.p, seed
            )
        plan = tiles.Plan(not entry.kind.startswith("tickets"), tile, 8 if entry.kind.startswith("decode") else 1)
        return launching.forward_launch(target, plan, x, w, a, b, empty(N), y, h, 0.75, entry.p, seed, True)
    finally:
        torch.set_float32_matmul_precision("highest")


def _compile(number: int) -> Report:
    return compile_report(launch_of(ENTRIES[number]), ENTRIES[number].arch)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[int, Future[Report]]]:
    """Reports on the entries whose tests were selected, from two processes."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    selected = {item.callspec.params["number"] for item in tests if item.originalname == "test_entry"}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {number: pool.submit(_compile, number) for number in sorted(selected)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda number: str(ENTRIES[number]))
def test_entry(number: int, compiled: dict[int, Future[Report]]) -> None:
    entry, report = ENTRIES[number], compiled[number].result()
    cuda = entry.arch.startswith("sm_")
    assert report.spills == 0, f"{report.spills} bytes of registers spilled"
    assert report.shared <= SHARED_MEMORY[entry.arch], f"{report.shared} bytes of shared memory"
    assert report.registers <= (REGISTERS if cuda else 512)
    assert report.tensor_memory <= TENSOR_MEMORY
    assert not report.trap, "the kernel is a trap"
    if entry.dtype == torch.float32 and entry.precision == "highest" and cuda:
        assert not report.tensor_core, "rounds fp32 operands"
    else:
        assert report.tensor_core, "no tensor-core instructions"
    if entry.arch in ("sm_90", "sm_100") and "decode16" not in entry.kind and entry.dtype.itemsize == 2:
        wanted = "wgmma.mma_async" if entry.arch == "sm_90" else "tcgen05.mma"
        assert list(report.tensor_core) == [wanted], f"falls back to {list(report.tensor_core)}"
    assert (report.bulk_copies > 0) == ("_tma" in entry.kind)
    if cuda and not entry.kind.startswith("redundant"):
        assembly.check_publication(report.assembly)
        assembly.check_consumption(report.assembly)
    if not cuda and not entry.kind.startswith("redundant"):
        assembly.check_publication_amd(report.assembly)


def test_no_entry_is_left_out() -> None:
    entries = {(arch, itemsize, kind) for (arch, itemsize), table in tiles.TABLES.items() for kind in table}
    variants = Counter((e.arch, e.dtype.itemsize, e.kind) for e in ENTRIES)
    assert variants == dict.fromkeys(entries, 2)  # two types of 16 bits, two precisions of fp32


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


def test_order_is_found() -> None:
    text = PTX.format(barrier="bar.sync 0;", spin=SPIN)
    assembly.check_publication(text)
    assembly.check_consumption(text)


def test_a_missing_barrier_is_found() -> None:
    with pytest.raises(AssertionError, match="no store comes before"):
        assembly.check_publication(PTX.format(barrier="", spin=SPIN))


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_a_barrier_taken_out_of_a_kernel_is_missed(arch: str) -> None:
    """The smallest kernel that publishes, as compiled and without what orders its stores."""
    (number,) = (i for i, e in enumerate(ENTRIES) if (e.arch, e.kind, e.dtype) == (arch, "decode16", torch.bfloat16))
    text = _compile(number).assembly
    check, order, release = {
        "sm_80": (assembly.check_publication, ("bar.sync",), ".acq_rel."),
        "gfx942": (assembly.check_publication_amd, ("s_waitcnt vmcnt(0)",), "buffer_wbl2"),
    }[arch]
    check(text)
    lines = text.splitlines()
    (at,) = (i for i, line in enumerate(lines) if release in line)
    while "store" not in lines[at] and "st.global" not in lines[at]:
        at -= 1
        if lines[at].strip().startswith(order):
            lines[at] = ""
    with pytest.raises(AssertionError, match=r"no store comes before|no barrier"):
        check("\n".join(lines))


def test_a_missing_acquire_is_found() -> None:
    with pytest.raises(AssertionError, match="before it is waited for"):
        assembly.check_consumption(PTX.format(barrier="bar.sync 0;", spin="ld.volatile.global.b32 %r7, [ %rd2 ];"))
