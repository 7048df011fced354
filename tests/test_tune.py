"""`python -m lora_kernels tune`: the file of measured plans, the look-up, and the command, in the interpreter."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lora_kernels import tune_measure
from lora_kernels.__main__ import main
from lora_kernels.kernels import candidates, quant_tiles, tiles, tuned
from lora_kernels.quant import quantize_weight

CPU = torch.device("cpu")
NAME = "Interpreted GPU (1)"
BF16 = (torch.bfloat16, torch.bfloat16)
TICKETS = tiles.Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2, num_warps=4, num_stages=2)
BACKWARD = tiles.Tile(
    BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
OTHER = tiles.Plan(
    True, tiles.Tile(max_rank=16, BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=5), 7
)
KEY = tuned.key("forward", *BF16, 8192, 4096, 4096, 16, False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache directory, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.cache_clear()
    yield tmp_path
    tuned.cache_clear()


def contents(plan: tiles.Plan) -> tuple:
    return plan.redundant, plan.split, plan.within, vars(plan.tile)


def case(M: int = 8192, aligned: bool = True, device: str | None = NAME, dtypes: tuple = BF16, w_format: str = ""):
    return tiles.Case("sm_90", 2, M, 4096, 4096, 16, False, aligned, 132, device, dtypes, w_format)


def plan_of(op: str = "forward", **changes) -> tiles.Plan:
    return tiles.plan(op, case(**changes))


@pytest.mark.parametrize("rows, bucket", [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (8192, 8192), (8193, 16384)])
def test_rows_are_kept_by_powers_of_two(rows: int, bucket: int) -> None:
    key = tuned.key("forward", *BF16, rows, 40, 24, 3, False)
    assert key == f"forward bfloat16+bfloat16 M{bucket} N40 K24 R16"


def test_everything_else_that_a_plan_depends_on_is_in_its_key() -> None:
    same = {tuned.key("forward", *BF16, 64, 40, 24, R, False) for R in (1, 8, 16)}
    assert len(same) == 1
    others = {
        tuned.key("forward", *BF16, 64, 40, 24, 17, False),
        tuned.key("forward", *BF16, 64, 40, 24, 33, False),
        tuned.key("forward", *BF16, 64, 40, 24, 16, True),
        tuned.key("backward", *BF16, 64, 40, 24, 16, False),
        tuned.key("forward", *BF16, 64, 48, 24, 16, False),
        tuned.key("forward", *BF16, 64, 40, 32, 16, False),
        tuned.key("forward", torch.float16, torch.float16, 64, 40, 24, 16, False),
        tuned.key("forward", torch.bfloat16, torch.float32, 64, 40, 24, 16, False),
        tuned.key("forward", *BF16, 64, 40, 24, 16, False, "nf4"),
        tuned.key("forward", *BF16, 64, 40, 24, 16, False, "nf4 nested"),
        tuned.key("forward", *BF16, 64, 40, 24, 16, False, "fp8"),
    }
    assert len(others) == 11 and not others & same


def test_a_kept_plan_overrides_the_table_where_it_was_measured() -> None:
    table = plan_of()
    place = tuned.store(NAME, {KEY: OTHER})
    assert contents(plan_of()) == contents(OTHER)
    assert contents(plan_of(M=4097)) == contents(OTHER)
    for elsewhere in (
        plan_of(M=4096),
        plan_of(aligned=False),
        plan_of(dtypes=(torch.bfloat16, torch.float32)),
        plan_of(op="backward"),
        plan_of(device="another GPU"),
        plan_of(device=None, dtypes=None),
        quant_tiles.plan("forward", case(M=64, w_format="nf4")),
    ):
        assert contents(elsewhere) != contents(OTHER)
    place.unlink()
    assert contents(plan_of()) == contents(OTHER), "the file is read once"
    tuned.cache_clear()
    assert plan_of() is not table and contents(plan_of()) == contents(table)


def test_a_backward_is_looked_up_too() -> None:
    kept = tiles.Plan(False, BACKWARD, 3)
    tuned.store(NAME, {tuned.key("backward", *BF16, 8192, 4096, 4096, 16, False): kept})
    assert contents(plan_of(op="backward")) == contents(kept)
    assert contents(plan_of()) != contents(kept)


def test_storing_leaves_one_file_and_forgetting_none(cache: Path) -> None:
    tuned.store(NAME, {KEY: OTHER})
    tuned.store("another GPU", {KEY: OTHER})
    assert tuned.path(NAME) == cache / "lora_kernels" / "tuned-interpreted-gpu-1.json"
    assert {each.name for each in (cache / "lora_kernels").iterdir()} == {
        "tuned-interpreted-gpu-1.json",
        "tuned-another-gpu.json",
    }
    assert tuned.forget(NAME) and not tuned.forget(NAME)
    assert tuned.load(NAME) == {} and KEY in tuned.load("another GPU")


def test_a_failed_store_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    place = tuned.store(NAME, {KEY: OTHER})
    before = place.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        tuned.store(NAME, {})
    assert place.read_bytes() == before and list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("relative", ["", "cache"])
def test_without_a_usable_setting_the_home_directory_serves(relative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuned.path("GPU") == Path("/home/someone/.cache/lora_kernels/tuned-gpu.json")


@pytest.mark.parametrize("package", ["torch", "triton", "lora_kernels"])
def test_a_file_of_other_versions_is_passed_over_in_silence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.store(NAME, {KEY: OTHER})
    here = tuned.versions()
    assert package in here
    monkeypatch.setattr(tuned, "versions", lambda: here | {package: "99"})
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
    place = tuned.store(NAME, {KEY: OTHER})
    text = place.read_text(encoding="utf-8")
    damaged = damage(text)
    assert damaged != text
    place.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning) as caught:
        assert contents(plan_of()) == contents(table)
    assert len(caught) == 1 and str(place) in str(caught[0].message) and "--forget" in str(caught[0].message)


def test_a_plan_over_a_quantised_weight_is_kept_for_its_format_alone() -> None:
    within = OTHER._replace(within=True)
    kept = {tuned.key("forward", *BF16, 8192, 4096, 4096, 16, False, "nf4"): within, KEY: OTHER}
    tuned.store(NAME, kept)
    assert contents(quant_tiles.plan("forward", case(w_format="nf4"))) == contents(within)
    # What was measured for a dense w serves where w is dequantised first.
    assert contents(quant_tiles.plan("forward", case(w_format="nf4 nested"))) == contents(OTHER)
    assert contents(plan_of()) == contents(OTHER)


@pytest.mark.parametrize("w_format", ["", "nf4", "fp8"])
def test_candidates_begin_with_the_tables_choice_and_are_within_the_rules(w_format: str) -> None:
    module = quant_tiles if w_format else tiles
    for op in ("forward", "backward"):
        for M, R, dropout in ((16, 16, False), (16, 200, False), (8192, 64, False), (8192, 64, True)):
            size = tiles.Case("sm_90", 2, M, 1024, 4096, R, dropout, True, 132, None, None, w_format)
            plans = candidates.candidates(op, size)
            assert next(iter(plans.values())) is module.plan(op, size)
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


def test_what_was_measured_for_a_dense_weight_is_a_candidate_once_it_is_dequantised() -> None:
    tuned.store(NAME, {KEY: OTHER})
    plans = candidates.candidates("forward", case(w_format="int8"))
    assert [contents(plan) for plan in plans.values() if not plan.within] == [
        contents(plan_of(device=None)),
        contents(OTHER),
    ]


@pytest.mark.parametrize("text", ["8x8", "8x8x8", "0x8x8:4", "8x8x8:0", "8x12x8:4", "8x8x9:4", "ax8x8:4", "8x8x8:4:4"])
def test_a_shape_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--shapes", text])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--device", "cuda:99"], ["--device", "cpu"], ["--device", "cpu", "--forget"]])
def test_without_a_gpu_it_says_so(options: list[str], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *options]) == 2
    assert "needs a GPU" in " ".join(capsys.readouterr().out.split())
    assert list(cache.iterdir()) == []


class TestCommand:
    """The whole command on CPU tensors."""

    OPTIONS = ("tune", "--device", "cpu", "--shapes", "5x24x16:4")

    @pytest.fixture
    def launching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator:
        """The launcher, for a GPU with one tile per pass; the only other candidate has three stages, which in the
        interpreter is the same kernel."""
        pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
        from interp import interpret

        from lora_kernels.backends import _triton_device, _triton_launch

        target = _triton_device.Target("interpreted", 3, contextlib.nullcontext, lambda: 0, lambda: False, NAME)
        monkeypatch.setitem(_triton_device.TARGETS, CPU, target)
        monkeypatch.setitem(tiles.TABLES, ("interpreted", 2), {"tickets": TICKETS, "backward": BACKWARD})
        monkeypatch.setitem(quant_tiles.TABLES, ("interpreted", 2), {"tickets": TICKETS, "backward": BACKWARD})
        monkeypatch.setattr(_triton_device, "_workspaces", {})
        monkeypatch.setattr(candidates, "CHANGES", {kind: {"num_stages": (3,)} for kind in candidates.CHANGES})
        monkeypatch.setattr(tune_measure, "ROUNDS", 1)
        with interpret():
            yield _triton_launch

    @staticmethod
    def replace_launch(launching, monkeypatch: pytest.MonkeyPatch, stages: int | None, fake) -> None:
        """Launches of plans with so many stages, or of any, go to ``fake(launch)`` instead."""
        for name in ("forward_launch", "backward_launch"):
            stock = getattr(launching, name)

            def change(target, plan, *args, stock=stock):
                launch = stock(target, plan, *args)
                if stages is None:
                    return fake(launch, plan)
                return fake(launch) if plan.tile.num_stages == stages else launch

            monkeypatch.setattr(launching, name, change)

    def repeat_launches(self, launching, monkeypatch: pytest.MonkeyPatch, slow: Callable[[tiles.Plan], bool]) -> None:
        """The interpreter runs each launch once; further ones repeat its results, at once or, those of `slow` plans,
        after a while."""
        results: dict = {}

        class Repeated:
            def __init__(self, launch, plan: tiles.Plan) -> None:
                self.launch, self.plan = launch, plan

            def run(self) -> None:
                outs = {name: t for name, t in self.launch.arguments.items() if name in ("y", "h", "dx", "da", "db")}
                key = (tuple(outs), self.plan)
                if key not in results:
                    self.launch.run()
                    results[key] = {name: t.clone() for name, t in outs.items()}
                for name, t in outs.items():
                    t.copy_(results[key][name])
                time.sleep(0.05 if slow(self.plan) else 0)

        self.replace_launch(launching, monkeypatch, None, Repeated)

    def test_a_wrong_candidate_is_dropped(self, launching, monkeypatch, capsys) -> None:
        class Wrong:
            def __init__(self, launch) -> None:
                self.launch = launch

            def run(self) -> None:
                self.launch.run()
                out = self.launch.arguments.get("y", self.launch.arguments.get("dx"))
                out[3, 5] += 8

        self.replace_launch(launching, monkeypatch, 3, Wrong)
        assert main(list(self.OPTIONS)) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for op, name in (("forward", "y"), ("backward", "dx")):
            assert f"5x24x16:4 {op}: dropped" in shown and f"stages 3: {name}: error" in shown
        assert "the tables'" in shown and tuned.load(NAME) == {}

    def test_the_faster_candidate_is_kept_and_then_used(self, launching, monkeypatch, capsys) -> None:
        self.repeat_launches(launching, monkeypatch, lambda plan: plan.tile.num_stages == 2)
        on = tiles.Case("interpreted", 2, 5, 16, 24, 4, False, True, 3, NAME, BF16)
        assert main([*self.OPTIONS, "--dry-run"]) == 0
        assert "nothing was kept" in capsys.readouterr().out and not tuned.path(NAME).exists()
        assert tiles.plan("forward", on).tile is TICKETS
        assert main(list(self.OPTIONS)) == 0
        assert len(tuned.load(NAME)) == 2
        assert "2 plans that differ from the tables'" in " ".join(capsys.readouterr().out.split())
        assert tiles.plan("forward", on).tile.num_stages == 3
        assert tiles.plan("backward", on).tile.num_stages == 3
        assert main(["tune", "--device", "cpu", "--forget"]) == 0
        assert tiles.plan("forward", on).tile is TICKETS and not tuned.path(NAME).exists()

    @pytest.mark.parametrize("within", [True, False], ids=["within", "first"])
    def test_over_a_quantised_weight(self, within: bool, launching, monkeypatch, capsys) -> None:
        """The tables have this W dequantised first in the forward and within the backward; the faster is kept, for its
        format alone, and then used."""
        from lora_kernels.backends import _triton_quant, triton

        made = []
        monkeypatch.setattr(_triton_quant, "dense", lambda w, dtype: made.append(1) or w.dequantize(dtype))
        self.repeat_launches(launching, monkeypatch, lambda plan: plan.within != within)
        assert main([*self.OPTIONS, "--quant", "nf4", "--double-quant"]) == 0
        assert "w in nf4 nested" in " ".join(capsys.readouterr().out.split())
        kept, op = tuned.load(NAME), "forward" if within else "backward"
        assert kept[tuned.key(op, *BF16, 5, 16, 24, 4, False, "nf4 nested")].within == within
        x, w, a, b = torch.randn(5, 24), torch.randn(16, 24), torch.randn(4, 24), torch.randn(16, 4)
        x, w, a, b = (t.bfloat16() for t in (x, w, a, b))
        for double_quant, entries in ((True, 0 if within else 2), (False, 1)):
            made.clear()
            quantised = quantize_weight(w, "nf4", double_quant=double_quant)
            y, h = triton.forward(x, quantised, a, b, None, 1.0, 0.0, None, True)
            triton.backward(y, x, quantised, a, b, h, 1.0, 0.0, None, True, True, True)
            assert len(made) == entries

    @pytest.mark.parametrize("options", [["--quant", "int8"], []], ids=["int8", "dense"])
    def test_double_quantisation_is_for_four_bits(self, options: list[str], launching, capsys) -> None:
        assert main([*self.OPTIONS, *options, "--double-quant"]) == 2
        assert "nf4 or fp4" in " ".join(capsys.readouterr().out.split())

    def test_a_wrong_weight_is_found(self, launching, monkeypatch, capsys) -> None:
        """Of a quantised W the truth is what its codes stand for: W as it was is not right."""
        from lora_kernels.backends import _triton_quant

        monkeypatch.setattr(_triton_quant, "dense", lambda w, dtype: torch.zeros(w.shape, dtype=dtype))
        assert main([*self.OPTIONS, "--quant", "fp8"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("dropped w first:") == 2 and "y: error" in shown and "dx: error" in shown

    def test_where_nothing_is_right_nothing_is_kept(self, launching, monkeypatch, capsys) -> None:
        """Failing to launch, writing nothing, and giving other bits each time are all found."""

        def refuse(launch):
            raise RuntimeError("out of resource: shared memory")

        class Idle:
            def __init__(self, launch) -> None: ...

            def run(self) -> None: ...

        self.replace_launch(launching, monkeypatch, 2, refuse)
        self.replace_launch(launching, monkeypatch, 3, Idle)
        assert main(list(self.OPTIONS)) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("out of resource: shared memory") == 2
        assert "y: not finite" in shown and "dx: not finite" in shown
        assert shown.count("no candidate is right") == 2 and not tuned.path(NAME).exists()

    def test_where_the_cache_cannot_be_written_it_says_so(self, launching, monkeypatch, cache, capsys) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
        (cache / "file").write_text("in the way")
        monkeypatch.setattr(candidates, "CHANGES", {kind: {} for kind in candidates.CHANGES})
        with pytest.warns(RuntimeWarning, match="tuned-interpreted-gpu-1.json"):
            assert main(list(self.OPTIONS)) == 1
        assert "not kept" in capsys.readouterr().out

    def test_a_lost_gpu_ends_the_command(self, launching, monkeypatch, capsys) -> None:
        def crash(launch):
            raise RuntimeError("an illegal memory access was encountered")

        def silent(*args, **kwargs):
            raise RuntimeError("no answer")

        self.replace_launch(launching, monkeypatch, 2, crash)
        monkeypatch.setattr(torch, "ones", silent)
        assert main(list(self.OPTIONS)) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "no longer answers after RuntimeError: an illegal memory access" in shown
        assert "backward" not in shown and not tuned.path(NAME).exists()

    def test_other_bits_and_flags_left_behind_are_faults(self, launching, monkeypatch, capsys) -> None:
        runs = []

        class Unsteady:
            def __init__(self, launch) -> None:
                self.launch = launch

            def run(self) -> None:
                self.launch.run()
                runs.append(1)
                if len(runs) % 2:
                    out = self.launch.arguments.get("y", self.launch.arguments.get("dx"))
                    out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(torch.inf, dtype=out.dtype))

        class Untidy(Unsteady):
            def run(self) -> None:
                self.launch.run()
                self.launch.arguments["sync"][0] = 1

        self.replace_launch(launching, monkeypatch, 2, Unsteady)
        self.replace_launch(launching, monkeypatch, 3, Untidy)
        assert main([*self.OPTIONS, "--dropout", "0.3"]) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "y: other bits in a second run" in shown and "dx: other bits in a second run" in shown
        assert shown.count("leaves flags or tickets in the workspace") == 2
        from lora_kernels.backends import _triton_device

        assert not any(sync.any() for sync, _ in _triton_device._workspaces.values())
