"""``verify --tune`` with the Triton kernels: its job, on CPU tensors with the kernels in the interpreter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_gpu import CPU, IDENTITY
from support.told import notes, told

from lora_kernels.backends import workspace
from lora_kernels.evidence import find, identity
from lora_kernels.evidence.file import Verdict
from lora_kernels.plans import choose, quant_tiles, store, tiles
from lora_kernels.quant.weight import quantize_weight
from lora_kernels.testing import one_layer
from lora_kernels.tools.verify import judging, plans_to_try, tuning
from lora_kernels.tools.verify.judging import DeviceLost
from lora_kernels.tools.verify.subject import Setting, Size
from lora_kernels.tools.verify.times import Pass

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plan_cache")]

BF16 = (torch.bfloat16, torch.bfloat16)
GPU = tiles.Gpu("interpreted", 3, CPU)
CASE = tiles.Case(BF16, 5, 16, 24, 4, False)
"""M, N, K, R and no dropout, as in PASSES."""
TICKETS = tiles.Tile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2, num_warps=4, num_stages=2)
DECODE = tiles.Tile(max_rank=32, BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, num_warps=4, num_stages=2)
BACKWARD = tiles.Tile(
    BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
SIZE = Size(5, 24, 16, 4)
DENSE = Setting(*BF16, 0.0)


def tuned(folder: Path, setting: Setting = DENSE, p: float = 0.0, skipped: list = []) -> list[dict]:  # noqa: B006
    """Measure the plans of both passes, and return what was told."""
    passes = [Pass(SIZE, p, op) for op in ("forward", "backward")]
    return told(folder, lambda tell: tuning.main(CPU, setting, passes, 1, skipped, float("inf"), tell))


def keep(events: list[dict]) -> dict[str, Any]:
    """Put the plans that were told on record, and return them."""
    plans = {key: plan for event in events for key, plan in event.get("fastest", {}).items()}
    find.add(CPU, plans=plans)
    choose.cache_clear()
    return plans


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
    monkeypatch.setitem(quant_tiles.TABLES, ("interpreted", 2), {"decode16": DECODE, "backward": BACKWARD})
    workspace.clean()
    monkeypatch.setattr(plans_to_try, "CHANGES", {kind: {"num_stages": (3,)} for kind in plans_to_try.CHANGES})
    monkeypatch.setattr(identity, "identify", lambda device: IDENTITY)
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


def test_a_wrong_plan_is_dropped(launching, monkeypatch, tmp_path) -> None:
    class Wrong:
        def __init__(self, launch) -> None:
            self.launch = launch

        def run(self) -> None:
            self.launch.run()
            out = self.launch.arguments.get("y", self.launch.arguments.get("dx"))
            out[3, 5] += 8

    replace_launch(launching, monkeypatch, 3, Wrong)
    events = tuned(tmp_path)
    for op, name in (("forward", "y"), ("backward", "dx")):
        assert f"triton 5x24x16:4 p=0 {op}: dropped" in notes(events)
        assert f"stages 3: {name}: error" in notes(events)
    assert [plan["tile"]["num_stages"] for plan in keep(events).values()] == [2, 2]
    assert [event["row"][-1] for event in events if "row" in event] == ["the tables'"] * 2


def test_the_faster_plan_is_kept_and_then_used(launching, monkeypatch, tmp_path) -> None:
    repeat_launches(launching, monkeypatch, lambda plan: plan.tile.num_stages == 2)
    events = tuned(tmp_path)
    find.forget()
    choose.cache_clear()
    assert choose.plan("forward", CASE, GPU).tile is TICKETS, "a job writes nothing itself"
    assert len(keep(events)) == 2
    assert choose.plan("forward", CASE, GPU).tile.num_stages == 3
    assert choose.plan("backward", CASE, GPU).tile.num_stages == 3
    assert [event["key"] for event in events if "fastest" in event] == [
        f"triton {op} tickets bfloat16+bfloat16" for op in ("forward", "backward")
    ]
    assert [event["step"] for event in events if "step" in event] == [
        f"5x24x16:4 p=0 {op}" for op in ("forward", "backward")
    ]


@pytest.mark.parametrize("within", [True, False], ids=["within", "first"])
def test_plans_for_a_quantised_weight_are_kept_by_format(within: bool, launching, monkeypatch, tmp_path) -> None:
    """The tables dequantise this W within the products. The faster way is kept, for this format alone, and then
    used."""
    from lora_kernels.backends import triton
    from lora_kernels.backends.triton import quant as quantised_weights

    made = []
    monkeypatch.setattr(quantised_weights, "dense", lambda w, dtype: made.append(1) or w.dequantize(dtype))
    repeat_launches(launching, monkeypatch, lambda plan: plan.within != within)
    kept = keep(tuned(tmp_path, DENSE._replace(quant="nf4", double_quant=True)))
    assert {plan["within"] for plan in kept.values()} == {within}
    assert all("nf4 nested" in key for key in kept)
    x, w, a, b = torch.randn(5, 24), torch.randn(16, 24), torch.randn(4, 24), torch.randn(16, 4)
    x, w, a, b = (t.bfloat16() for t in (x, w, a, b))
    for double_quant, entries in ((True, 0 if within else 2), (False, 0)):
        made.clear()
        quantised = quantize_weight(w, "nf4", double_quant=double_quant)
        y, h = one_layer.forward(triton, x, quantised, a, b, None, 1.0, 0.0, None, True)
        one_layer.backward(triton, y, x, quantised, a, b, h, 1.0, 0.0, None, True, True, True)
        assert len(made) == entries


def test_a_wrongly_dequantised_weight_is_found(launching, monkeypatch, tmp_path) -> None:
    """The right results for a quantised W are computed from its codes, so a launch that writes zeros for W is wrong."""
    from lora_kernels.backends.triton import quant as quantised_weights

    monkeypatch.setattr(quantised_weights, "dense", lambda w, dtype: torch.zeros(w.shape, dtype=dtype))
    said = notes(tuned(tmp_path, DENSE._replace(quant="fp8")))
    assert said.count("dropped w first:") == 2 and "y: error" in said and "dx: error" in said


def test_nothing_is_told_where_no_plan_is_right(launching, monkeypatch, tmp_path) -> None:
    """A plan that cannot be launched and one that writes nothing are both found."""

    def refuse(launch):
        raise RuntimeError("out of resource: shared memory")

    class Idle:
        def __init__(self, launch) -> None: ...

        def run(self) -> None: ...

    replace_launch(launching, monkeypatch, 2, refuse)
    replace_launch(launching, monkeypatch, 3, Idle)
    events = tuned(tmp_path)
    said = notes(events)
    assert said.count("out of resource: shared memory") == 2
    assert "y: not finite" in said and "dx: not finite" in said
    assert said.count("no plan gives right results") == 2
    assert not any("fastest" in event for event in events)


def test_a_lost_gpu_ends_the_job_and_the_last_step_names_the_plan(launching, monkeypatch, tmp_path) -> None:
    def crash(launch):
        raise RuntimeError("an illegal memory access was encountered")

    replace_launch(launching, monkeypatch, 2, crash)
    monkeypatch.setattr(judging, "answers", lambda device: False)
    steps = []

    def job(tell) -> None:
        with pytest.raises(DeviceLost, match="no longer answers after RuntimeError: an illegal memory access"):
            tuning.main(CPU, DENSE, [Pass(SIZE, 0.0, "forward")], 1, [], float("inf"), tell)

    steps = [event for event in told(tmp_path, job) if "doing" in event]
    assert steps[-1]["job"] == store.key("forward", CASE) and "stages 2" in steps[-1]["plan"]


def test_plans_and_jobs_that_hung_before_are_left_out(launching, tmp_path) -> None:
    first = tuned(tmp_path)
    forward, backward = store.key("forward", CASE), store.key("backward", CASE)
    plan = next(event["plan"] for event in first if event.get("job") == forward and event.get("plan"))
    again = tuned(tmp_path, skipped=[(forward, plan), (backward, "")])
    assert not any(event.get("job") == backward for event in again)
    tried = {event["plan"] for event in again if event.get("job") == forward}
    assert plan not in tried and len(tried) > 1


def test_a_class_that_is_not_right_is_not_tuned(launching, tmp_path) -> None:
    find.add(CPU, {"triton forward tickets bfloat16+bfloat16": Verdict("stuck", "", "2026-11-28")})
    assert [event["row"][1] for event in tuned(tmp_path) if "row" in event] == ["triton backward"]


def test_other_bits_and_flags_left_behind_are_faults(launching, monkeypatch, tmp_path) -> None:
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
    said = notes(tuned(tmp_path, p=0.3))
    assert "y: other bits in a second run" in said and "dx: other bits in a second run" in said
    assert said.count("leaves counters in the workspace") == 2
    assert not workspace.clean()
