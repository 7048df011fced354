"""The plans of the sm_90a kernels in `verify`: judged class by class, and tuned, on the emulated GPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import sm90
from support.fake_gpu import CPU
from support.told import notes, told

from lora_kernels.backends import cuda, dispatch
from lora_kernels.backends.cuda import launch
from lora_kernels.evidence import find
from lora_kernels.evidence.file import Verdict
from lora_kernels.plans import choose, store, tiles
from lora_kernels.plans.sm90 import BY_RULE, PLANS, WITHOUT_CLUSTERS, Sm90Plan
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import problem
from lora_kernels.tools.verify import cases, judge_class, tuning
from lora_kernels.tools.verify.subject import Setting, Size
from lora_kernels.tools.verify.times import Pass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the emulated kernels with"),
    pytest.mark.skipif(sm90.cuda_include() is None, reason="the headers of the CUDA toolkit are not there"),
    pytest.mark.timeout(300),  # the first test compiles the kernels for the host
]

BF16 = (torch.bfloat16, torch.bfloat16)
SIZE = Size(140, 72, 136, 12)
SETTING = Setting(*BF16, 0.0)
CASE = tiles.Case(BF16, 140, 136, 72, 12, False)
"""M, N, K, R and no dropout, as in SIZE."""


@pytest.fixture(autouse=True)
def gpu(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated GPU, and an empty cache."""
    sm90.serve_cpu(monkeypatch)
    refused = cuda.why_not
    # It serves the emulated GPU, and still refuses the passes that have no kernel.
    monkeypatch.setattr(
        cuda, "why_not", lambda call: refused(call)[:1] if call.op.endswith(("_multi", "_experts")) else []
    )
    monkeypatch.setattr(tuning, "BACKENDS", ("cuda",))
    monkeypatch.setitem(dispatch.AUTOMATIC, "cpu", ("cuda", "eager"))


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


def tuned(folder: Path) -> list[dict]:
    """Measure the plans of both passes, and return what was told."""
    passes = [Pass(SIZE, 0.0, op) for op in ("forward", "backward")]
    return told(folder, lambda tell: tuning.main(CPU, SETTING, passes, 1, [], float("inf"), tell))


def keep(events: list[dict]) -> dict:
    """Put the plans that were told on record, and return them."""
    plans = {key: plan for event in events for key, plan in event.get("fastest", {}).items()}
    find.add(CPU, plans=plans)
    choose.cache_clear()
    return plans


def judged(folder: Path) -> dict[str, dict]:
    """Judge every class of the back-end by one case, and return the verdicts by class."""
    verdicts = {}
    for each in cases.kernel_classes(CPU, [SETTING], [], most=1):
        for event in told(folder, lambda tell, each=each: judge_class.main(CPU, each, tell)):
            if "verdict" in event:
                verdicts[event["verdict"].pop("key")] = event["verdict"]
    return verdicts


def test_the_fastest_is_kept_and_then_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best = {"forward": Sm90Plan(256, 2), "backward": Sm90Plan(128, 1)}
    used = []

    def then(op: str, plan: Sm90Plan, results: list[torch.Tensor]) -> None:
        used.append(plan)
        time.sleep(0.05 if plan != best[op] else 0)

    after(monkeypatch, then)
    events = tuned(tmp_path)
    assert set(used) == {BY_RULE, *PLANS}
    assert keep(events) == {
        store.sm90_key("forward", CASE): {"columns": 256, "cluster": 2},
        store.sm90_key("backward", CASE): {"columns": 128, "cluster": 1},
    }
    assert [event["row"][-1] for event in events if "row" in event] == [
        "256 columns, cluster of 2", "128 columns, cluster of 1",
    ]  # fmt: skip
    q = problem(*CASE[1:5], dtype=torch.bfloat16)
    used.clear()
    _, h = one_layer.forward(cuda, q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None, True)
    one_layer.backward(cuda, q.dy, q.x, q.w, q.a, q.b, h, q.scale, 0.0, None, True, True, True)
    assert used == [*best.values()]
    # What was measured with clusters is not used where these have since been found not to be right.
    find.add(CPU, {"cuda forward clusters bfloat16+bfloat16": Verdict("stuck", "", "2026-11-28")})
    choose.cache_clear()
    assert choose.sm90_plan("forward", CASE, CPU) == WITHOUT_CLUSTERS
    again = {event["plan"] for event in tuned(tmp_path) if event.get("job") == store.sm90_key("forward", CASE)}
    assert again == {"", "by rule", "128 columns, cluster of 1", "256 columns, cluster of 1"}


def test_a_wrong_plan_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def spoil(op: str, plan: Sm90Plan, results: list[torch.Tensor]) -> None:
        if plan == Sm90Plan(256, 2):
            results[0][3, 5] += 8
        elif plan == Sm90Plan(128, 1):
            launch.workspace(results[0].device, 1, 1).counters[7] = 1

    after(monkeypatch, spoil)
    events = tuned(tmp_path)
    assert notes(events).count("dropped 256 columns, cluster of 2:") == 2
    assert notes(events).count("dropped 128 columns, cluster of 1: leaves counters in the workspace") == 2
    kept = [(plan["columns"], plan["cluster"]) for plan in keep(events).values()]
    assert len(kept) == 2 and not {(256, 2), (128, 1)} & set(kept)


def test_the_single_plans_and_the_clusters_are_classes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cases, "CASES", ((SIZE, 0.1), (SIZE, 0.0), (Size(20, 72, 136, 12), 0.0)))
    spoiled = None
    stock = launch.launch_forward

    def spoil(plan: Sm90Plan, *operands) -> None:
        stock(plan, *operands)
        if plan == spoiled:
            operands[-2][3, 5] += 8

    monkeypatch.setattr(launch, "launch_forward", spoil)
    wrong = {}
    for spoiled in (None, *PLANS):
        found = judged(tmp_path)
        assert {key.split()[2] for key in found} == {"tickets", "clusters", "decode"}
        wrong[spoiled] = {key.split()[2] for key, verdict in found.items() if verdict["result"] != "right"}
    single = {Sm90Plan(columns, 1): {"tickets"} for columns in (128, 256)}
    assert wrong == {None: set(), Sm90Plan(256, 2): {"clusters"}, **single}


def test_clusters_are_judged_apart_from_the_rule_that_may_take_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU so small that the rule takes clusters for the cases, the rule's plan is left out of their class."""
    monkeypatch.setattr(cases, "CASES", ((Size(1000, 72, 136, 12), 0.1),))
    used: list[tuple[str, Sm90Plan]] = []
    monkeypatch.setattr(launch, "launch_forward", lambda plan, *operands: used.append(("forward", plan)))
    monkeypatch.setattr(launch, "launch_backward", lambda plan, *operands: used.append(("backward", plan)))
    judged(tmp_path)
    assert BY_RULE not in {plan for _, plan in used}


def test_keys_are_those_that_dispatch_asks_for(tmp_path: Path) -> None:
    from lora_kernels.evidence import file

    for each in cases.kernel_classes(CPU, [SETTING], []):
        if "clusters" not in each.key:
            for size, p in each.cases:
                call = each.setting._replace(p=p).call(each.op, CPU, size)
                assert each.key == file.class_key("cuda", cuda.kernel_class(call), call)


def test_refusals_are_those_of_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert cases.key_of("cuda", SETTING.call("forward", CPU, SIZE)) is None
