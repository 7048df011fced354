"""``tune --backend cuda``, on the emulated GPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import sm90

from lora_kernels.__main__ import main
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch
from lora_kernels.plans import choose, store, tiles
from lora_kernels.plans.sm90 import BY_RULE, PLANS, Sm90Plan
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import problem
from lora_kernels.tools.tune import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the emulated kernels with"),
    pytest.mark.skipif(sm90.cuda_include() is None, reason="the headers of the CUDA toolkit are not there"),
    pytest.mark.timeout(300),  # the first test compiles the kernels for the host
]

BF16 = (torch.bfloat16, torch.bfloat16)
OPTIONS = ("tune", "--backend", "cuda", "--device", "cpu", "--shapes", "140x72x136:12")
CASE = tiles.Case(BF16, 140, 136, 72, 12, False)
"""M, N, K, R and no dropout, as in OPTIONS."""


@pytest.fixture(autouse=True)
def gpu(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated GPU, and an empty cache."""
    sm90.serve_cpu(monkeypatch)
    monkeypatch.setattr(cuda, "why_not", lambda call: [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: sm90.DEVICE)
    monkeypatch.setattr(measure, "ROUNDS", 1)


def after(monkeypatch: pytest.MonkeyPatch, then: Callable[[str, Sm90Plan, list[torch.Tensor]], None]) -> None:
    """Call `then(op, plan, results)` whenever the back-end has launched a pass. The emulator runs each launch once;
    later launches repeat its results at once."""
    known: dict = {}

    def replace(op: str) -> None:
        stock = getattr(launch, f"launch_{op}")

        def fake(plan: Sm90Plan, *operands) -> None:
            results = list(operands[-2:] if op == "forward" else operands[-1])
            if (op, plan) not in known:
                stock(plan, *operands)
                known[op, plan] = [t.clone() for t in results]
            for t, value in zip(results, known[op, plan], strict=True):
                t.copy_(value)
            then(op, plan, results)

        monkeypatch.setattr(launch, f"launch_{op}", fake)

    replace("forward")
    replace("backward")


def test_the_fastest_is_kept_and_then_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    best = {"forward": Sm90Plan(256, 2), "backward": Sm90Plan(128, 1)}
    used = []

    def then(op: str, plan: Sm90Plan, results: list[torch.Tensor]) -> None:
        used.append(plan)
        time.sleep(0.05 if plan != best[op] else 0)

    after(monkeypatch, then)
    assert main([*OPTIONS, "--dry-run"]) == 0
    assert choose.sm90_plan("forward", CASE, sm90.DEVICE) == BY_RULE
    used.clear()
    assert main(list(OPTIONS)) == 0
    assert set(used) == {BY_RULE, *PLANS}
    assert store.load(sm90.DEVICE) == {
        store.sm90_key("forward", CASE): (256, 2),
        store.sm90_key("backward", CASE): (128, 1),
    }
    assert "256 columns, cluster of 2" in " ".join(capsys.readouterr().out.split())
    q = problem(*CASE[1:5], dtype=torch.bfloat16)
    used.clear()
    _, h = one_layer.forward(cuda, q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None, True)
    one_layer.backward(cuda, q.dy, q.x, q.w, q.a, q.b, h, q.scale, 0.0, None, True, True, True)
    assert used == [*best.values()]
    assert main([*OPTIONS[:5], "--forget"]) == 0
    assert choose.sm90_plan("forward", CASE, sm90.DEVICE) == BY_RULE


def test_a_wrong_plan_is_dropped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def spoil(op: str, plan: Sm90Plan, results: list[torch.Tensor]) -> None:
        if plan == Sm90Plan(256, 2):
            results[0][3, 5] += 8
        elif plan == Sm90Plan(128, 1):
            launch.workspace(results[0].device, 1, 1).counters[7] = 1

    after(monkeypatch, spoil)
    assert main(list(OPTIONS)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("dropped 256 columns, cluster of 2:") == 2
    assert shown.count("dropped 128 columns, cluster of 1: leaves counters in the workspace") == 2
    assert not {Sm90Plan(256, 2), Sm90Plan(128, 1)} & set(store.load(sm90.DEVICE).values())


def test_both_back_ends_share_a_file() -> None:
    """A plan of one back-end is never taken for a plan of the other."""
    plan = tiles.Plan(False, tiles.TABLES["sm_90", 2]["tickets"], 1)
    entry = store.key("forward", CASE)
    choose.keep(sm90.DEVICE, {entry: plan, store.sm90_key("forward", CASE): Sm90Plan(256, 1)})
    choose.cache_clear()
    assert choose.sm90_plan("forward", CASE, sm90.DEVICE) == Sm90Plan(256, 1)
    found = store.find(sm90.DEVICE, entry, tiles.Plan)
    assert found is not None
    assert vars(found.tile) == vars(plan.tile)
    assert store.find(sm90.DEVICE, entry, Sm90Plan) is None
    assert (
        choose.sm90_plan("backward", CASE, sm90.DEVICE) == choose.sm90_plan("forward", CASE, "another GPU") == BY_RULE
    )


def test_refusals_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.undo()
    assert main([*OPTIONS, "--quant", "nf4"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "needs a GPU that the sm_90a kernels serve: serves tensors on an NVIDIA GPU, not on cpu" in shown
    assert "the kernels take a dense weight, not nf4" in shown
