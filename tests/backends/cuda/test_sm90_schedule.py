"""The arithmetic of the sm_90a kernels: tickets, waits, counters, splits, layouts. Needs g++ but no CUDA."""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
import shutil

import pytest
from support import sm90

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the checks with")

DX, DA, DB = 1, 2, 4


@functools.cache
def library() -> ctypes.CDLL:
    sources = [sm90.MACHINE / f"{part}.cpp" for part in ("schedule", "layout")]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    return ctypes.CDLL(str(sm90.compiled(sources, [*sources, *sm90.SM90.glob("*.h")], flags)))


def check(name: str, *args: int) -> None:
    """Call the check of this name in layout.cpp or schedule.cpp, and assert that it finds no fault."""
    function = getattr(library(), f"check_{name}")
    function.restype = ctypes.c_char_p
    assert function(*args) == b"", f"{name}{args}: {function(*args).decode()}"


def problems() -> list[tuple[int, int, int, int]]:
    """Return (M, N, K, R) of real layers, of edge cases, and of random layers."""
    generator = random.Random(0)
    draw = generator.randint
    odd = [(draw(1, 3000), 8 * draw(1, 200), 8 * draw(1, 200), draw(1, 256)) for _ in range(60)]
    layers = [(8192, 4096, 4096, 16), (16384, 1024, 8192, 64), (2048, 14336, 4096, 256)]
    return [*layers, (1, 8, 8, 1), (129, 264, 136, 129), *odd]


@pytest.mark.parametrize("needs", range(1, 8))
def test_every_item_is_one_ticket_and_waits_for_lower_ones(needs: int) -> None:
    for (M, N, K, R), sms, prep, cluster in itertools.product(problems(), (1, 78, 132), (0, 5), (1, 2)):
        check("items", M, N, K, R, sms, prep, needs, cluster)


@pytest.mark.parametrize("cluster", [1, 2])
def test_memory_bound_items_lie_among_the_others(cluster: int) -> None:
    for (M, N, K, R), sms in itertools.product(problems(), (1, 78, 132)):
        check("mix", M, N, K, R, sms, cluster)


@pytest.mark.parametrize("cluster", [1, 2])
def test_tiles_at_work_share_what_they_read(cluster: int) -> None:
    """132 tiles of 128 by 256 form a region that is as nearly square as 16 rows of tiles allow."""
    assert library().rows_at_work(64, 56, 256, 132, cluster) <= 16 * 128 + 9 * 256
    assert library().rows_at_work(6, 56, 256, 132, cluster) <= 6 * 128 + 22 * 256


def test_counters_do_not_overlap() -> None:
    for (M, N, K, R), sms, cluster in itertools.product(problems(), (1, 132), (1, 2)):
        check("counters", M, N, K, R, sms, cluster)


@pytest.mark.parametrize(
    ("M", "columns", "sms", "chosen"),
    [
        (8192, 4096, 132, (256, 2)),
        (8192, 14336, 114, (256, 2)),
        (8300, 4096, 132, (256, 2)),  # 65 row blocks
        (512, 1024, 132, (128, 1)),  # too few tiles of 256 columns
        (128, 132 * 256, 132, (256, 1)),  # one row block
        (384, 44 * 256, 132, (256, 1)),  # three row blocks: pairs would take two rounds, single blocks take one
        (256, 256, 1, (256, 1)),  # one multiprocessor cannot run a pair
    ],
)
def test_the_rule_chooses_columns_and_cluster(M: int, columns: int, sms: int, chosen: tuple[int, int]) -> None:
    assert divmod(library().tiling_of(M, columns, sms), 10) == chosen


def test_splits_cover_the_contraction() -> None:
    for blocks in range(1, 70):
        for splits in range(1, blocks + 1):
            check("splits", blocks, splits)
    check("splits", 33_554_432, 264)  # M = 2³¹


def test_gradients_are_split_into_parts_of_at_least_eight_blocks_of_rows() -> None:
    rows = (1, 64, 65, 1023, 1024, 8192, 2**31 - 1)
    for tiles, M, sms in itertools.product((1, 2, 8, 32, 112, 1000), rows, (1, 78, 132)):
        splits = library().gradient_splits_of(tiles, M, sms)
        blocks = -(-M // 64)
        assert 1 <= splits <= max(1, blocks // 8)
        check("splits", blocks, splits)


def test_decode_splits_k_into_at_most_32_parts() -> None:
    for tiles, blocks, sms in itertools.product((1, 2, 33, 113, 200, 1001), (1, 2, 3, 16, 64, 224), (1, 78, 132)):
        splits = library().decode_splits_of(tiles, blocks, sms)
        assert 1 <= splits <= min(32, blocks)
        check("splits", blocks, splits)


@pytest.mark.parametrize(("prep", "a_tiles", "w_tiles", "splits"), [(0, 1, 32, 4), (9, 2, 7, 1), (1, 1, 1, 32)])
def test_decode_gives_every_item_one_ticket(prep: int, a_tiles: int, w_tiles: int, splits: int) -> None:
    check("decode", prep, a_tiles, w_tiles, splits)


@pytest.mark.parametrize(("tiles", "splits", "registers"), [(1, 1, 8), (3, 5, 8), (4, 2, 64), (2, 32, 4)])
def test_partial_sums_have_their_own_places(tiles: int, splits: int, registers: int) -> None:
    check("partials", tiles, splits, registers)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("grid", "resident"), [(1, 1), (132, 1), (132, 7), (132, 132), (3, 2)])
@pytest.mark.parametrize("needs", [DX, DA, DX | DA | DB, DB])
def test_launches_end_however_few_blocks_are_resident(grid: int, resident: int, needs: int, cluster: int) -> None:
    """Clusters run in random order, and three launches follow each other over one workspace."""
    for seed, (M, N, K, R) in enumerate([(8192, 1024, 1024, 16), (700, 264, 520, 200), (64, 8, 8, 1)]):
        check("progress", M, N, K, R, grid, 5 * (seed % 2), needs, cluster, grid, resident, 3, seed)


@pytest.mark.parametrize("N", [8, 16, 32, 64, 128, 256])
def test_each_element_of_a_tile_is_in_one_accumulator(N: int) -> None:
    check("fragments", N)


@pytest.mark.parametrize("N", [128, 256])
def test_each_accumulator_gets_the_mask_bit_of_its_element(N: int) -> None:
    check("keep_bits", N)


def test_masking_a_box_visits_every_chunk_once() -> None:
    check("chunks")


def test_stmatrix_writes_elements_where_the_tma_store_reads_them() -> None:
    check("stmatrix")


@pytest.mark.parametrize("step", range(4))
def test_descriptors_find_elements_where_the_tma_load_puts_them(step: int) -> None:
    for base in (0, 1024, 0x38000):
        for extent in (8, 16, 32, 64, 128, 256):
            check("descriptor", 128, 0, extent, step, base)
            if extent >= 64:
                check("descriptor", 128, 1, extent, step, base)
        check("descriptor", 32, 1, 16, step, base)


def test_a_stage_expects_the_bytes_of_its_boxes() -> None:
    check("bytes")


def test_conversion_chunks_cover_the_matrix() -> None:
    for rows, pitch in ((1, 8), (16, 4096), (4096, 16), (14336, 256), (1000, 24), (2**24, 256)):
        check("prep", rows, pitch)
