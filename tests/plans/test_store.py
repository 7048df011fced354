"""The measured plans in the evidence: a plan serves the calls that it was measured for, and no others."""

from __future__ import annotations

import pytest
import torch
from support.fake_gpu import CPU, IDENTITY

from lora_kernels.core.operands import Call
from lora_kernels.evidence import file, find, identity
from lora_kernels.evidence.file import Verdict
from lora_kernels.plans import choose, sm90, store, tiles
from lora_kernels.plans.sm90 import BY_RULE, WITHOUT_CLUSTERS, Sm90Plan
from lora_kernels.tools.verify.plans_to_try import plans_to_try

pytestmark = pytest.mark.usefixtures("plan_cache", "device")

BF16 = (torch.bfloat16, torch.bfloat16)
BACKWARD = tiles.Tile(
    BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
OTHER = tiles.Plan(
    True, tiles.Tile(max_rank=16, BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=5), 7
)
GPU = tiles.Gpu("sm_90", 132, CPU)
CASE = tiles.Case(BF16, 8192, 4096, 4096, 16, False)
KEY = store.key("forward", CASE)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a GPU with 132 multiprocessors."""
    monkeypatch.setattr(identity, "identify", lambda device: IDENTITY)


def keep(plans: dict[str, tiles.Plan | Sm90Plan]) -> None:
    """Add plans to the evidence, as another process would."""
    find.add(CPU, plans={key: store.written(plan) for key, plan in plans.items()})
    find.forget()
    choose.cache_clear()


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
    keep({KEY: OTHER})
    assert contents(plan_of()) == contents(OTHER)
    assert contents(plan_of(M=4097)) == contents(OTHER)
    for elsewhere in (
        plan_of(M=4096),
        plan_of(aligned=False),
        plan_of(dtypes=(torch.bfloat16, torch.float32)),
        plan_of(op="backward"),
        plan_of(gpu=GPU._replace(device=None)),
        plan_of(M=64, w_format="nf4"),
    ):
        assert contents(elsewhere) != contents(OTHER)
    find.cache_path(IDENTITY).unlink()
    assert contents(plan_of()) == contents(OTHER), "the file is read once"
    find.forget()
    choose.cache_clear()
    assert plan_of() is not table and contents(plan_of()) == contents(table)


def test_a_backward_is_looked_up_too() -> None:
    kept = tiles.Plan(False, BACKWARD, 3)
    keep({store.key("backward", tiles.Case(BF16, 8192, 4096, 4096, 16, False)): kept})
    assert contents(plan_of(op="backward")) == contents(kept)
    assert contents(plan_of()) != contents(kept)


def test_a_plan_of_another_gpu_or_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    keep({KEY: OTHER})
    for change in ({"device": "another GPU"}, {"torch": "1.0"}, {"sources": "changed"}):
        monkeypatch.setattr(identity, "identify", lambda device, change=change: IDENTITY._replace(**change))
        find.forget()
        choose.cache_clear()
        assert contents(plan_of()) != contents(OTHER), change


@pytest.mark.parametrize("kept", [{"redundant": True}, {"columns": 1, "rows": 2}, {"tile": {}, "redundant": 1}, {}])
def test_an_entry_that_is_no_plan_is_named_in_a_warning_and_ignored(kept: dict) -> None:
    table = plan_of()
    find.add(CPU, plans={KEY: kept})
    choose.cache_clear()
    with pytest.warns(RuntimeWarning, match="forward bfloat16") as caught:
        assert contents(plan_of()) == contents(table)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("op", "change"),
    [
        *[
            ("forward", {name: odd})
            for name in ("split", "redundant", "within")
            for odd in ("1", -1, 10**30, None, [1])
        ],
        ("forward", {"split": True}),
        ("backward", {"redundant": True}),
        *[
            ("forward", {"tile": {name: odd}})
            for name in ("BLOCK_M", "BLOCK_K", "BLOCK_R", "GROUP_M", "num_warps", "num_stages", "tma")
            for odd in ("32", 0, -16, 1.5, True if name != "tma" else 1, 2**40)
        ],
        ("forward", {"tile": {"BLOCK_N": 48}}),
        ("forward", {"tile": {"num_warps": 3}}),
        ("forward", {"tile": {"max_rank": "16"}}),
        ("forward", {"tile": {"BLOCK_C": 64, "BLOCK_T": 32}}),
        ("backward", {"tile": {"BLOCK_C": 0}}),
        ("backward", {"tile": {"BLOCK_T": None}}),
    ],
)
def test_a_plan_that_no_launch_can_have_is_named_in_a_warning_and_ignored(op: str, change: dict) -> None:
    table, key = plan_of(op), store.key(op, CASE)
    kept = store.written(OTHER if op == "forward" else tiles.Plan(False, BACKWARD, 3))
    kept["tile"] |= change.get("tile", {})
    find.add(CPU, plans={key: kept | {name: odd for name, odd in change.items() if name != "tile"}})
    choose.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{op} bfloat16.*ignored: ValueError: "):
        assert contents(plan_of(op)) == contents(table)


def test_a_redundant_plan_that_holds_too_small_a_rank_is_ignored() -> None:
    case = CASE._replace(R=64)
    find.add(CPU, plans={store.key("forward", case): store.written(OTHER)})
    choose.cache_clear()
    with pytest.warns(RuntimeWarning, match="redundant is true, with BLOCK_R 16"):
        assert not choose.plan("forward", case, GPU).redundant


@pytest.mark.parametrize(
    "odd", [{"columns": "256", "cluster": 1}, {"columns": 64, "cluster": 1}, {"columns": 0, "cluster": 2}]
)
def test_a_plan_that_the_kernels_are_not_compiled_for_is_ignored(odd: dict) -> None:
    find.add(CPU, plans={store.sm90_key("forward", CASE): odd})
    choose.cache_clear()
    with pytest.warns(RuntimeWarning, match="not compiled for"):
        assert choose.sm90_plan("forward", CASE, CPU) == BY_RULE


def test_both_back_ends_share_the_evidence() -> None:
    """A plan of one back-end is never taken for a plan of the other."""
    tickets = tiles.Plan(False, tiles.TABLES["sm_90", 2]["tickets"], 1)
    keep({KEY: tickets, store.sm90_key("forward", CASE): Sm90Plan(128, 1)})
    assert choose.sm90_plan("forward", CASE, CPU) == Sm90Plan(128, 1)
    assert choose.sm90_plan("backward", CASE, CPU) == BY_RULE
    assert contents(plan_of()) == contents(tickets)
    assert store.find(CPU, KEY, Sm90Plan) is None


@pytest.mark.parametrize("result", ["right", "wrong", "stuck", "broken", None])
@pytest.mark.parametrize("measured", [None, Sm90Plan(256, 2), Sm90Plan(128, 1)])
def test_clusters_are_not_chosen_where_they_are_not_right(result: str | None, measured: Sm90Plan | None) -> None:
    if measured:
        keep({store.sm90_key("forward", CASE): measured})
    if result:
        call = Call("forward", CPU, *BF16, 8192, 4096, 4096, 16, False)
        find.add(CPU, {file.class_key("cuda", "clusters", call): Verdict(result, "", "2026-11-28")})
        choose.cache_clear()
    plan = measured or BY_RULE
    allowed = result in ("right", None) or plan == Sm90Plan(128, 1)
    assert choose.sm90_plan("forward", CASE, CPU) == (plan if allowed else WITHOUT_CLUSTERS)
    # Few tiles: the rule takes none of the clusters. Another class is not concerned.
    assert choose.sm90_plan("forward", CASE._replace(M=256, R=8), CPU) == BY_RULE
    assert choose.sm90_plan("backward", CASE, CPU) == BY_RULE


def test_wherever_the_rule_takes_clusters_it_is_known_to() -> None:
    def tiling(M: int, columns: int, sms: int) -> tuple[int, int]:
        """The rule of csrc/cuda/sm90/schedule.h."""
        rows, tiles_n = -(-M // 128), -(-columns // 256)
        if rows * tiles_n < sms:
            return 128, 1
        pairs = rows >= 2 and sms >= 2 and -(-(-(-rows // 2) * tiles_n) // (sms // 2)) <= -(-rows * tiles_n // sms)
        return 256, 2 if pairs else 1

    seen = set()
    for sms in (1, 16, 78, 132):
        for M in (1, 128, 129, 1024, 8192):  # 1024 rows of 512 columns are as many tiles as 16 multiprocessors
            for columns in (64, 512, 1024, 4096, 14336):
                cluster = tiling(M, columns, sms)[1]
                may = sm90.may_cluster("forward", M, columns, 8, sms)
                assert may == sm90.may_cluster("backward", M, 8, columns, sms)
                assert may or cluster == 1
                seen.add((may, cluster))
    assert {(True, 2), (False, 1)} <= seen


def test_a_plan_over_a_quantised_weight_is_kept_for_its_format_alone() -> None:
    within = OTHER._replace(within=True)
    kept = {store.key("forward", tiles.Case(BF16, 8192, 4096, 4096, 16, False, w_format="nf4")): within, KEY: OTHER}
    keep(kept)
    assert contents(plan_of(w_format="nf4")) == contents(within)
    # What was measured for a dense w serves where w is dequantised first.
    assert contents(plan_of(w_format="nf4 nested")) == contents(OTHER)
    assert contents(plan_of()) == contents(OTHER)


@pytest.mark.parametrize("w_format", ["", "nf4", "fp8"])
def test_plans_to_try_begin_with_the_tables_choice_and_are_within_the_rules(w_format: str) -> None:
    gpu = GPU._replace(device=None)
    for op in ("forward", "backward"):
        for M, R, dropout in ((16, 16, False), (16, 200, False), (8192, 64, False), (8192, 64, True)):
            size = tiles.Case(BF16, M, 1024, 4096, R, dropout, w_format=w_format)
            plans = plans_to_try(op, size, gpu)
            assert next(iter(plans.values())) is choose.plan(op, size, gpu)
            within = [plan for plan in plans.values() if plan.within]
            # No forward dequantises W within its product at this M or R.
            first_only = bool(w_format) and op == "forward" and (M, R) != (16, 16)
            assert len(plans) == 1 if first_only else 8 < len(plans) < 120
            assert bool(within) == (bool(w_format) and not first_only)
            for plan in plans.values():
                tile = plan.tile
                assert not plan.redundant or (op == "forward" and M <= 64 and tile.block_r(R) >= R)
                assert plan.redundant or 2 * tile.BLOCK_M >= 128
                assert bool(tile.BLOCK_C) == (op == "backward")
                assert 1 <= plan.split <= 4096
            if w_format:
                first = [name for name, plan in plans.items() if not plan.within]
                assert len(first) == 1 and first[0].startswith("w first: ")


def test_what_was_measured_for_a_dense_weight_is_tried_once_it_is_dequantised() -> None:
    keep({KEY: OTHER})
    plans = plans_to_try("forward", CASE._replace(w_format="int8"), GPU)
    assert [contents(plan) for plan in plans.values() if not plan.within] == [
        contents(plan_of(gpu=GPU._replace(device=None))),
        contents(OTHER),
    ]


def test_a_plan_of_this_format_is_read() -> None:
    """The format of the file does not depend on the names of the types that hold plans."""
    tile = {"max_rank": None, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_T": 16}
    tile |= {"GROUP_M": 2, "num_warps": 4, "num_stages": 2, "tma": False}
    plans = {
        "backward bfloat16+bfloat16 M8192 N4096 K4096 R16": {
            "redundant": False, "tile": tile, "split": 3, "within": False,
        },
        "cuda forward bfloat16+bfloat16 M8192 N4096 K4096 R16": {"columns": 256, "cluster": 2},
    }  # fmt: skip
    find.add(CPU, plans=plans)
    assert contents(plan_of("backward")) == contents(tiles.Plan(False, BACKWARD, 3))
    assert choose.sm90_plan("forward", CASE, CPU) == sm90.Sm90Plan(256, 2)
