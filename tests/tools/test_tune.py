"""`python -m lora_kernels tune`, the whole command, on CPU tensors with the kernels in the interpreter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lora_kernels.__main__ import main
from lora_kernels.backends import workspace
from lora_kernels.plans import choose, quant_tiles, store, tiles
from lora_kernels.quant.weight import quantize_weight
from lora_kernels.testing import one_layer
from lora_kernels.tools.tune import measure, plans_to_try

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plan_cache")]

CPU = torch.device("cpu")
NAME = "Interpreted GPU (1)"
BF16 = (torch.bfloat16, torch.bfloat16)
GPU = tiles.Gpu("interpreted", 3, NAME)
CASE = tiles.Case(BF16, 5, 16, 24, 4, False)
"""M, N, K, R and no dropout, as in OPTIONS."""
TICKETS = tiles.Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2, num_warps=4, num_stages=2)
BACKWARD = tiles.Tile(
    BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
OPTIONS = ("tune", "--device", "cpu", "--shapes", "5x24x16:4")


@pytest.mark.parametrize("text", ["8x8", "8x8x8", "0x8x8:4", "8x8x8:0", "8x12x8:4", "8x8x9:4", "ax8x8:4", "8x8x8:4:4"])
def test_a_text_that_names_no_shape_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--shapes", text])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--device", "cuda:99"], ["--device", "cpu"], ["--device", "cpu", "--forget"]])
def test_without_a_gpu_it_says_so(options: list[str], plan_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *options]) == 2
    assert "needs a GPU" in " ".join(capsys.readouterr().out.split())
    assert list(plan_cache.iterdir()) == []


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Yield the module of launches, for a GPU with one tile per pass. The only other plan to try has three stages,
    which is the same kernel in the interpreter."""
    pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
    from support.interp import interpret

    from lora_kernels.backends.triton import device, launch

    target = device.Target(GPU, contextlib.nullcontext, lambda: 0, lambda: False)
    monkeypatch.setitem(device.TARGETS, CPU, target)
    monkeypatch.setitem(tiles.TABLES, ("interpreted", 2), {"tickets": TICKETS, "backward": BACKWARD})
    monkeypatch.setitem(quant_tiles.TABLES, ("interpreted", 2), {"tickets": TICKETS, "backward": BACKWARD})
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(plans_to_try, "CHANGES", {kind: {"num_stages": (3,)} for kind in plans_to_try.CHANGES})
    monkeypatch.setattr(measure, "ROUNDS", 1)
    with interpret():
        yield launch


def replace_launch(launching, monkeypatch: pytest.MonkeyPatch, stages: int | None, fake) -> None:
    """Replace the launches of plans with `stages` stages by ``fake(launch)``, or those of all plans by
    ``fake(launch, plan)`` if `stages` is None."""
    for name in ("forward_launch", "backward_launch"):
        stock = getattr(launching, name)

        def change(target, plan, *args, stock=stock):
            launch = stock(target, plan, *args)
            if stages is None:
                return fake(launch, plan)
            return fake(launch) if plan.tile.num_stages == stages else launch

        monkeypatch.setattr(launching, name, change)


def repeat_launches(launching, monkeypatch: pytest.MonkeyPatch, slow: Callable[[tiles.Plan], bool]) -> None:
    """Run each launch once in the interpreter. Later runs repeat its results: at once, or after 0.05 s where the plan
    is `slow`."""
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

    replace_launch(launching, monkeypatch, None, Repeated)


def test_a_wrong_plan_is_dropped(launching, monkeypatch, capsys) -> None:
    class Wrong:
        def __init__(self, launch) -> None:
            self.launch = launch

        def run(self) -> None:
            self.launch.run()
            out = self.launch.arguments.get("y", self.launch.arguments.get("dx"))
            out[3, 5] += 8

    replace_launch(launching, monkeypatch, 3, Wrong)
    assert main(list(OPTIONS)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for op, name in (("forward", "y"), ("backward", "dx")):
        assert f"5x24x16:4 {op}: dropped" in shown and f"stages 3: {name}: error" in shown
    assert "the tables'" in shown and store.load(NAME) == {}


def test_the_faster_plan_is_kept_and_then_used(launching, monkeypatch, capsys) -> None:
    repeat_launches(launching, monkeypatch, lambda plan: plan.tile.num_stages == 2)
    assert main([*OPTIONS, "--dry-run"]) == 0
    assert "nothing was kept" in capsys.readouterr().out and not store.path(NAME).exists()
    assert choose.plan("forward", CASE, GPU).tile is TICKETS
    assert main(list(OPTIONS)) == 0
    assert len(store.load(NAME)) == 2
    assert "2 plans that differ from the tables'" in " ".join(capsys.readouterr().out.split())
    assert choose.plan("forward", CASE, GPU).tile.num_stages == 3
    assert choose.plan("backward", CASE, GPU).tile.num_stages == 3
    assert main(["tune", "--device", "cpu", "--forget"]) == 0
    assert choose.plan("forward", CASE, GPU).tile is TICKETS and not store.path(NAME).exists()


@pytest.mark.parametrize("within", [True, False], ids=["within", "first"])
def test_plans_for_a_quantised_weight_are_kept_by_format(within: bool, launching, monkeypatch, capsys) -> None:
    """The tables dequantise this W first in the forward and within the product in the backward. The faster way is kept,
    for this format alone, and then used."""
    from lora_kernels.backends import triton
    from lora_kernels.backends.triton import quant as quantised_weights

    made = []
    monkeypatch.setattr(quantised_weights, "dense", lambda w, dtype: made.append(1) or w.dequantize(dtype))
    repeat_launches(launching, monkeypatch, lambda plan: plan.within != within)
    assert main([*OPTIONS, "--quant", "nf4", "--double-quant"]) == 0
    assert "w in nf4 nested" in " ".join(capsys.readouterr().out.split())
    kept, op = store.load(NAME), "forward" if within else "backward"
    assert kept[store.key(op, CASE._replace(w_format="nf4 nested"))].within == within
    x, w, a, b = torch.randn(5, 24), torch.randn(16, 24), torch.randn(4, 24), torch.randn(16, 4)
    x, w, a, b = (t.bfloat16() for t in (x, w, a, b))
    for double_quant, entries in ((True, 0 if within else 2), (False, 1)):
        made.clear()
        quantised = quantize_weight(w, "nf4", double_quant=double_quant)
        y, h = one_layer.forward(triton, x, quantised, a, b, None, 1.0, 0.0, None, True)
        one_layer.backward(triton, y, x, quantised, a, b, h, 1.0, 0.0, None, True, True, True)
        assert len(made) == entries


@pytest.mark.parametrize("options", [["--quant", "int8"], []], ids=["int8", "dense"])
def test_double_quantisation_is_for_four_bits(options: list[str], launching, capsys) -> None:
    assert main([*OPTIONS, *options, "--double-quant"]) == 2
    assert "nf4 or fp4" in " ".join(capsys.readouterr().out.split())


def test_a_wrongly_dequantised_weight_is_found(launching, monkeypatch, capsys) -> None:
    """The right results for a quantised W are computed from its codes, so a launch that writes zeros for W is wrong."""
    from lora_kernels.backends.triton import quant as quantised_weights

    monkeypatch.setattr(quantised_weights, "dense", lambda w, dtype: torch.zeros(w.shape, dtype=dtype))
    assert main([*OPTIONS, "--quant", "fp8"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("dropped w first:") == 2 and "y: error" in shown and "dx: error" in shown


def test_nothing_is_kept_where_no_plan_is_right(launching, monkeypatch, capsys) -> None:
    """A plan that cannot be launched and one that writes nothing are both found."""

    def refuse(launch):
        raise RuntimeError("out of resource: shared memory")

    class Idle:
        def __init__(self, launch) -> None: ...

        def run(self) -> None: ...

    replace_launch(launching, monkeypatch, 2, refuse)
    replace_launch(launching, monkeypatch, 3, Idle)
    assert main(list(OPTIONS)) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("out of resource: shared memory") == 2
    assert "y: not finite" in shown and "dx: not finite" in shown
    assert shown.count("no plan gives right results") == 2 and not store.path(NAME).exists()


def test_a_cache_that_cannot_be_written_is_reported(launching, monkeypatch, plan_cache, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(plan_cache / "file"))
    (plan_cache / "file").write_text("in the way")
    monkeypatch.setattr(plans_to_try, "CHANGES", {kind: {} for kind in plans_to_try.CHANGES})
    with pytest.warns(RuntimeWarning, match="tuned-interpreted-gpu-1.json"):
        assert main(list(OPTIONS)) == 1
    assert "not kept" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_command(launching, monkeypatch, capsys) -> None:
    def crash(launch):
        raise RuntimeError("an illegal memory access was encountered")

    def silent(*args, **kwargs):
        raise RuntimeError("no answer")

    replace_launch(launching, monkeypatch, 2, crash)
    monkeypatch.setattr(torch, "ones", silent)
    assert main(list(OPTIONS)) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "no longer answers after RuntimeError: an illegal memory access" in shown
    assert "backward" not in shown and not store.path(NAME).exists()


def test_other_bits_and_flags_left_behind_are_faults(launching, monkeypatch, capsys) -> None:
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

    replace_launch(launching, monkeypatch, 2, Unsteady)
    replace_launch(launching, monkeypatch, 3, Untidy)
    assert main([*OPTIONS, "--dropout", "0.3"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "y: other bits in a second run" in shown and "dx: other bits in a second run" in shown
    assert shown.count("leaves flags or tickets in the workspace") == 2
    assert not any(sync.any() for sync, _ in workspace._workspaces.values())
