"""The file of measured plans: a plan serves the calls that it was measured for, and a damaged file serves none."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch

from lora_kernels.plans import choose, sm90, store, tiles
from lora_kernels.tools.tune.plans_to_try import plans_to_try

pytestmark = pytest.mark.usefixtures("plan_cache")

NAME = "Interpreted GPU (1)"
BF16 = (torch.bfloat16, torch.bfloat16)
BACKWARD = tiles.Tile(
    BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
OTHER = tiles.Plan(
    True, tiles.Tile(max_rank=16, BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=5), 7
)
GPU = tiles.Gpu("sm_90", 132, NAME)
CASE = tiles.Case(BF16, 8192, 4096, 4096, 16, False)
KEY = store.key("forward", CASE)


def contents(plan: tiles.Plan) -> tuple:
    return plan.redundant, plan.split, plan.within, vars(plan.tile)


def plan_of(op: str = "forward", gpu: tiles.Gpu = GPU, **changes) -> tiles.Plan:
    return choose.plan(op, CASE._replace(**changes), gpu)


@pytest.mark.parametrize("rows, bucket", [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (8192, 8192), (8193, 16384)])
def test_rows_are_kept_by_powers_of_two(rows: int, bucket: int) -> None:
    key = store.key("forward", tiles.Case(BF16, rows, 40, 24, 3, False))
    assert key == f"forward bfloat16+bfloat16 M{bucket} N40 K24 R16"


def test_everything_else_that_a_plan_depends_on_is_in_its_key() -> None:
    same = {store.key("forward", tiles.Case(BF16, 64, 40, 24, R, False)) for R in (1, 8, 16)}
    assert len(same) == 1
    others = {
        store.key("forward", tiles.Case(BF16, 64, 40, 24, 17, False)),
        store.key("forward", tiles.Case(BF16, 64, 40, 24, 33, False)),
        store.key("forward", tiles.Case(BF16, 64, 40, 24, 16, True)),
        store.key("backward", tiles.Case(BF16, 64, 40, 24, 16, False)),
        store.key("forward", tiles.Case(BF16, 64, 48, 24, 16, False)),
        store.key("forward", tiles.Case(BF16, 64, 40, 32, 16, False)),
        store.key("forward", tiles.Case((torch.float16, torch.float16), 64, 40, 24, 16, False)),
        store.key("forward", tiles.Case((torch.bfloat16, torch.float32), 64, 40, 24, 16, False)),
        store.key("forward", tiles.Case(BF16, 64, 40, 24, 16, False, w_format="nf4")),
        store.key("forward", tiles.Case(BF16, 64, 40, 24, 16, False, w_format="nf4 nested")),
        store.key("forward", tiles.Case(BF16, 64, 40, 24, 16, False, w_format="fp8")),
    }
    assert len(others) == 11 and not others & same


def test_a_kept_plan_overrides_the_table_where_it_was_measured() -> None:
    table = plan_of()
    place = choose.keep(NAME, {KEY: OTHER})
    assert contents(plan_of()) == contents(OTHER)
    assert contents(plan_of(M=4097)) == contents(OTHER)
    for elsewhere in (
        plan_of(M=4096),
        plan_of(aligned=False),
        plan_of(dtypes=(torch.bfloat16, torch.float32)),
        plan_of(op="backward"),
        plan_of(gpu=GPU._replace(name="another GPU")),
        plan_of(gpu=GPU._replace(name=None)),
        plan_of(M=64, w_format="nf4"),
    ):
        assert contents(elsewhere) != contents(OTHER)
    place.unlink()
    assert contents(plan_of()) == contents(OTHER), "the file is read once"
    choose.cache_clear()
    assert plan_of() is not table and contents(plan_of()) == contents(table)


def test_a_backward_is_looked_up_too() -> None:
    kept = tiles.Plan(False, BACKWARD, 3)
    choose.keep(NAME, {store.key("backward", tiles.Case(BF16, 8192, 4096, 4096, 16, False)): kept})
    assert contents(plan_of(op="backward")) == contents(kept)
    assert contents(plan_of()) != contents(kept)


def test_keeping_leaves_one_file_and_forgetting_none(plan_cache: Path) -> None:
    choose.keep(NAME, {KEY: OTHER})
    choose.keep("another GPU", {KEY: OTHER})
    assert store.path(NAME) == plan_cache / "lora_kernels" / "tuned-interpreted-gpu-1.json"
    assert {each.name for each in (plan_cache / "lora_kernels").iterdir()} == {
        "tuned-interpreted-gpu-1.json",
        "tuned-another-gpu.json",
    }
    assert choose.forget(NAME) and not choose.forget(NAME)
    assert store.load(NAME) == {} and KEY in store.load("another GPU")


def test_a_failed_write_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    place = choose.keep(NAME, {KEY: OTHER})
    before = place.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        choose.keep(NAME, {})
    assert place.read_bytes() == before and list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("relative", ["", "cache"])
def test_without_a_usable_setting_the_home_directory_serves(relative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.path("GPU") == Path("/home/someone/.cache/lora_kernels/tuned-gpu.json")


@pytest.mark.parametrize("package", ["torch", "triton", "lora_kernels"])
def test_a_file_of_other_versions_is_passed_over_in_silence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose.keep(NAME, {KEY: OTHER})
    here = store.versions()
    assert package in here
    monkeypatch.setattr(store, "versions", lambda: here | {package: "99"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contents(plan_of()) != contents(OTHER)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"BLOCK_K": 64', '"BLOCK_K": 48'),
        lambda text: json.dumps({"content": json.loads(text)["content"]}),
        lambda text: "\udc80",
    ],
    ids=["empty", "cut short", "a list", "null", "edited", "no checksum", "no text"],
)
def test_a_damaged_file_is_named_in_a_warning_and_ignored(damage) -> None:
    table = plan_of()
    place = choose.keep(NAME, {KEY: OTHER})
    text = place.read_text(encoding="utf-8")
    damaged = damage(text)
    assert damaged != text
    place.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning) as caught:
        assert contents(plan_of()) == contents(table)
    assert len(caught) == 1 and str(place) in str(caught[0].message) and "--forget" in str(caught[0].message)


def test_a_plan_over_a_quantised_weight_is_kept_for_its_format_alone() -> None:
    within = OTHER._replace(within=True)
    kept = {store.key("forward", tiles.Case(BF16, 8192, 4096, 4096, 16, False, w_format="nf4")): within, KEY: OTHER}
    choose.keep(NAME, kept)
    assert contents(plan_of(w_format="nf4")) == contents(within)
    # What was measured for a dense w serves where w is dequantised first.
    assert contents(plan_of(w_format="nf4 nested")) == contents(OTHER)
    assert contents(plan_of()) == contents(OTHER)


@pytest.mark.parametrize("w_format", ["", "nf4", "fp8"])
def test_plans_to_try_begin_with_the_tables_choice_and_are_within_the_rules(w_format: str) -> None:
    gpu = GPU._replace(name=None)
    for op in ("forward", "backward"):
        for M, R, dropout in ((16, 16, False), (16, 200, False), (8192, 64, False), (8192, 64, True)):
            size = tiles.Case(BF16, M, 1024, 4096, R, dropout, w_format=w_format)
            plans = plans_to_try(op, size, gpu)
            assert next(iter(plans.values())) is choose.plan(op, size, gpu)
            assert 8 < len(plans) < 120
            for plan in plans.values():
                tile = plan.tile
                assert not plan.redundant or (op == "forward" and M <= 1024 and tile.block_r(R) >= R)
                assert plan.redundant or 2 * tile.BLOCK_M >= 128
                assert bool(tile.BLOCK_C) == (op == "backward")
                assert 1 <= plan.split <= 4096
                assert bool(w_format) or not plan.within
            if w_format:
                assert any(plan.within and plan.tile.tma for plan in plans.values())
                first = [name for name, plan in plans.items() if not plan.within]
                assert len(first) == 1 and first[0].startswith("w first: ")


def test_what_was_measured_for_a_dense_weight_is_tried_once_it_is_dequantised() -> None:
    choose.keep(NAME, {KEY: OTHER})
    plans = plans_to_try("forward", CASE._replace(w_format="int8"), GPU)
    assert [contents(plan) for plan in plans.values() if not plan.within] == [
        contents(plan_of(gpu=GPU._replace(name=None))),
        contents(OTHER),
    ]


def test_a_file_of_this_format_is_read() -> None:
    """The format of the file does not depend on the names of the types that hold plans."""
    tile = {"max_rank": None, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_T": 16}
    tile |= {"GROUP_M": 2, "num_warps": 4, "num_stages": 2, "tma": False}
    plans = {
        "backward bfloat16+bfloat16 M8192 N4096 K4096 R16": {
            "redundant": False, "tile": tile, "split": 3, "within": False,
        },
        "cuda forward bfloat16+bfloat16 M8192 N4096 K4096 R16": {"columns": 256, "cluster": 2},
    }  # fmt: skip
    content = {"schema": 2, "device": NAME, "versions": store.versions(), "plans": plans}
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    store.path(NAME).parent.mkdir()
    store.path(NAME).write_text(json.dumps({"sha256": checksum, "content": content}), encoding="utf-8")
    assert contents(plan_of("backward")) == contents(tiles.Plan(False, BACKWARD, 3))
    assert choose.sm90_plan("forward", CASE, NAME) == sm90.Sm90Plan(256, 2)
