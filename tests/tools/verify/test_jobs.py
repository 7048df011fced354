"""The jobs of `verify`'s processes, run in this one: the classes, their verdicts, the times, the choices."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.fake_gpu import CPU, IDENTITY, backend, fake_gpu, restart
from support.told import notes, told

from lora_kernels.backends import dispatch, eager, workspace
from lora_kernels.core.operands import call_of
from lora_kernels.evidence import file, find, identity
from lora_kernels.evidence.file import Timing, Verdict
from lora_kernels.testing import judge
from lora_kernels.tools.verify import cases, child, judge_class, judging, rivals, survey, times
from lora_kernels.tools.verify.cases import KernelClass
from lora_kernels.tools.verify.events import Teller
from lora_kernels.tools.verify.subject import Operands, Setting, Size
from lora_kernels.tools.verify.times import Pass

BF16 = torch.bfloat16
SETTING = Setting(BF16, BF16, 0.0)
SIZE = Size(72, 64, 48, 16)
FORWARD = Pass(SIZE, 0.0, "forward")
KEY = "{} forward r16 bfloat16+bfloat16"


@pytest.fixture(autouse=True)
def tidy() -> None:
    """No counters are left from other tests."""
    workspace.clean()


def changed(change):
    """Return a forward whose y is changed, and which tells the change how often it was called."""
    calls = []

    def forward(*args):
        ys, hs = eager.forward(*args)
        calls.append(1)
        change(ys[0], len(calls))
        return ys, hs

    return forward


def wrong(y: torch.Tensor, call: int) -> None:
    y[3, 5] += 8


def unsteady(y: torch.Tensor, call: int) -> None:
    y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(torch.inf, dtype=y.dtype)) if call % 2 else y[0, 0]


def untidy(y: torch.Tensor, call: int) -> None:
    workspace.workspace(CPU, 0, False, 4, 4).counters[2] = 1


def broken(y: torch.Tensor, call: int) -> None:
    raise ValueError("out of resource: shared memory\nand more")


def full(y: torch.Tensor, call: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def judged(tmp_path: Path, change, op: str = "forward") -> list[dict]:
    """Judge one class of a back-end whose forward is changed, and return the events."""
    each = KernelClass("the key", "triton", op, SETTING, ((SIZE, 0.0), (SIZE, 0.1)))
    with fake_gpu(tmp_path, backend("triton", changed(change))):
        return told(tmp_path, lambda tell: judge_class.main(CPU, KernelClass.from_json(each.to_json()), tell))


@pytest.mark.parametrize(
    ("change", "result", "why"),
    [
        (lambda y, call: None, "right", ""),
        (wrong, "wrong", "72x64x48:16: y: RMS error"),
        (unsteady, "wrong", "72x64x48:16: y: other bits in a second run"),
        (untidy, "wrong", "72x64x48:16: leaves counters in the workspace"),
        (broken, "broken", "72x64x48:16: ValueError: out of resource: shared memory"),
    ],
)
def test_the_verdict_on_a_class(change, result: str, why: str, tmp_path: Path) -> None:
    verdict = judged(tmp_path, change)[-1]["verdict"]
    assert (verdict["key"], verdict["result"]) == ("the key", result) and verdict["why"].startswith(why)


def test_what_a_kernel_does_not_write_is_found(tmp_path: Path) -> None:
    """Fresh memory may hold the right results of an earlier run."""

    def idle(x, bases, adapters, save_h):
        (y,), hs = eager.forward(x, bases, adapters, save_h)
        other = torch.empty_like(y)
        other[:, 1:] = y[:, 1:]
        return [other], hs

    each = KernelClass("the key", "triton", "forward", SETTING, ((SIZE, 0.0),))
    with fake_gpu(tmp_path, backend("triton", idle)):
        events = told(tmp_path, lambda tell: judge_class.main(CPU, each, tell))
    assert events[-1]["verdict"]["why"] == "72x64x48:16: y: not finite"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_backward_is_judged_by_itself(tmp_path: Path) -> None:
    """Its h comes from torch, so a wrong forward is not its fault."""
    assert judged(tmp_path, wrong, "backward")[-1]["verdict"]["result"] == "right"


def test_a_lost_gpu_breaks_the_class_and_a_full_one_says_nothing(tmp_path: Path, monkeypatch) -> None:
    events = judged(tmp_path, full)
    assert not any("verdict" in event for event in events)
    assert "the GPU has too little free memory" in notes(events)
    monkeypatch.setattr(judging, "answers", lambda device: False)
    verdict = judged(tmp_path, broken)[-1]["verdict"]
    assert verdict["result"] == "broken" and "no longer answers after ValueError" in verdict["why"]


def test_the_last_event_before_a_launch_and_before_a_wait_tell_the_two_apart(tmp_path: Path) -> None:
    steps = [(event["doing"], event["limit"]) for event in judged(tmp_path, lambda y, call: None) if "doing" in event]
    first = steps.index(("72x64x48:16 p=0: first forward: compile and launch", "slow"))
    assert steps[first + 1] == ("72x64x48:16 p=0: first forward: wait for the kernels", "run")


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_every_class_of_triton_that_a_call_can_ask_for_is_judged(arch: str, quant: str | None, monkeypatch) -> None:
    pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
    from lora_kernels.backends import triton
    from lora_kernels.backends.triton import device
    from lora_kernels.plans.tiles import Gpu

    target = device.Target(Gpu(arch, 132), contextlib.nullcontext, lambda: 0, lambda: False)
    monkeypatch.setitem(device.TARGETS, CPU, target)
    monkeypatch.setitem(dispatch.AUTOMATIC, "cpu", ("triton", "eager"))
    setting = SETTING._replace(quant=quant)
    keys = {each.key for each in cases.kernel_classes(CPU, [setting], [])}
    asked = set()
    for op in ("forward", "backward"):
        for M in (1, 2, 16, 17, 64, 128, 512, 513, 8192):
            for R in (1, 8, 16, 17, 32, 64, 128, 256):
                for p in (0.0, 0.1):
                    call = setting._replace(p=p).call(op, CPU, Size(M, 4096, 1024, R))
                    asked.add(file.class_key("triton", triton.kernel_class(call), call))
    assert asked <= keys, asked - keys


def test_keys_are_those_that_the_choice_asks_for(tmp_path: Path, monkeypatch) -> None:
    asked = []
    stock = file.class_key
    with fake_gpu(tmp_path, backend("composite"), backend("triton")):
        classes = cases.kernel_classes(CPU, [SETTING, SETTING._replace(adapter_dtype=torch.float32)], [])
        find.add(CPU, {each.key: Verdict("right", "", "2026-11-28") for each in classes})
        monkeypatch.setattr(file, "class_key", lambda *args: asked.append(stock(*args)) or asked[-1])
        for each in classes:
            size, p = each.cases[0]
            q = judge.problem(size.M, size.N, size.K, size.R, dtype=BF16, adapter_dtype=each.setting.adapter_dtype, p=p)
            rows = q.x if each.op == "forward" else q.dy
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dispatch.automatic(call_of(each.op, rows, q.base, q.adapter))
    assert (
        set(asked) == {each.key for each in classes} and len(classes) == 2 * 2 * 2 * 6
    )  # of back-ends, settings, dropout and passes


def test_a_layer_whose_class_no_case_reaches_is_a_case_itself(tmp_path: Path) -> None:
    module = backend("composite")
    module.kernel_class = lambda call: "wide" if call.N > 10_000 else "narrow"
    layer = Size(2048, 64, 16384, 16)
    with fake_gpu(tmp_path, module):
        classes = {each.key: each.cases for each in cases.kernel_classes(CPU, [SETTING], [(layer, 0.0)])}
    assert classes["composite forward wide bfloat16+bfloat16"] == ((layer, 0.0),)
    assert len(classes["composite forward narrow bfloat16+bfloat16"]) == cases.MOST


def timed(tmp_path: Path, *modules, verdicts: dict | None = None, passes=(FORWARD,), **options) -> list[dict]:
    """Time passes by back-ends whose classes have `verdicts`, by name; all are right by default."""
    options = {"rounds": 3, "without": [], "setting": SETTING, "end": float("inf")} | options
    with fake_gpu(tmp_path, *modules):
        known = {module.name: "right" for module in modules} if verdicts is None else verdicts
        find.add(CPU, {KEY.format(name): Verdict(result, "", "2026-11-28") for name, result in known.items()})
        setting, rounds, without, end = (options[name] for name in ("setting", "rounds", "without", "end"))
        return told(tmp_path, lambda tell: times.main(CPU, setting, passes, rounds, without, end, tell))


def delayed(seconds: float):
    return changed(lambda y, call: time.sleep(seconds))


def test_the_back_ends_that_are_right_are_timed_beside_their_rivals(tmp_path: Path) -> None:
    modules = [backend("composite"), backend("triton", delayed(0.02)), backend("cuda")]
    events = timed(tmp_path, *modules, verdicts={"composite": "right", "triton": "right", "cuda": "stuck"})
    (timing,) = [event for event in events if "timing" in event]
    ratios = timing["timing"]["ratios"]
    peft = {"PEFT"} if "PEFT" in rivals.others(False, False, "forward") else set()
    assert set(ratios) == {"composite", "triton", "eager", "addmm_"} | peft
    assert ratios["triton"][1] > 10 * ratios["composite"][1] and timing["timing"]["frozen_seconds"] > 0
    assert file.Bucket(**timing["timing"]["bucket"]) == file.bucket_of(SETTING.call("forward", CPU, SIZE))
    assert timing["done"] == str(FORWARD)
    steps = [event for event in events if event.get("variant") == "triton"]
    assert {event["key"] for event in steps} == {KEY.format("triton")} and {event["limit"] for event in steps} == {
        "slow", "run",
    }  # fmt: skip


def test_a_backward_is_timed_alone(tmp_path: Path) -> None:
    module = backend("composite")
    passes = [Pass(SIZE, p, "backward") for p in (0.0, 0.1)]
    with fake_gpu(tmp_path, module):
        for dropout in ("", " dropout"):
            find.add(CPU, {f"composite backward r16 bfloat16+bfloat16{dropout}": Verdict("right", "", "2026-11-28")})
        events = told(tmp_path, lambda tell: times.main(CPU, SETTING, passes, 3, [], float("inf"), tell))
    found = [event["timing"]["ratios"] for event in events if "timing" in event]
    assert len(found) == 2 and all({"composite", "addmm_"} <= set(each) for each in found)
    assert module.calls == 0


def test_what_is_wrong_at_the_size_that_is_timed_is_not_timed(tmp_path: Path) -> None:
    late = changed(lambda y, call: wrong(y, call))
    events = timed(tmp_path, backend("composite"), backend("triton", late), backend("cuda", changed(broken)))
    told_of = {event["verdict"]["key"]: event["verdict"] for event in events if "verdict" in event}
    assert {key.split()[0]: verdict["result"] for key, verdict in told_of.items()} == {
        "triton": "wrong", "cuda": "broken",
    }  # fmt: skip
    assert told_of[KEY.format("triton")]["why"].startswith("72x64x48:16: y: ")
    (timing,) = [event["timing"] for event in events if "timing" in event]
    assert not {"triton", "cuda"} & set(timing["ratios"]) and "composite" in timing["ratios"]


def test_a_back_end_that_failed_is_not_tried_on_the_next_pass(tmp_path: Path) -> None:
    tried: list[int] = []
    module = backend("triton", changed(lambda y, call: tried.append(call) or broken(y, call)))
    timed(tmp_path, module, passes=[FORWARD, FORWARD._replace(size=Size(72, 64, 56, 16))])
    assert tried == [1]


def test_variants_may_be_left_out_and_others_layers_may_fail(tmp_path: Path, monkeypatch) -> None:
    def fails(op: str, operands) -> None:
        raise RuntimeError("not this version")

    monkeypatch.setattr(rivals, "others", lambda *args: {"addmm_": fails, "PEFT": fails})
    events = timed(tmp_path, backend("composite"), without=["PEFT", "eager"])
    (timing,) = [event["timing"] for event in events if "timing" in event]
    assert set(timing["ratios"]) == {"composite"}
    assert notes(events) == f"{FORWARD}: addmm_ is not measured: RuntimeError: not this version"


def test_a_quantised_weight_is_timed_over_its_own_frozen_layer(tmp_path: Path) -> None:
    key = KEY.format("composite") + " nf4"
    with fake_gpu(tmp_path, backend("composite")):
        find.add(CPU, {key: Verdict("right", "", "2026-11-28")})
        setting = SETTING._replace(quant="nf4", double_quant=True)
        events = told(tmp_path, lambda tell: times.main(CPU, setting, [FORWARD], 3, [], float("inf"), tell))
    (timing,) = [event["timing"] for event in events if "timing" in event]
    assert set(timing["ratios"]) == {"composite", "eager"} and timing["bucket"]["w_format"] == "nf4"


def test_the_frozen_layer_dequantises_its_weight_in_every_call() -> None:
    operands = Operands(SETTING._replace(quant="nf4"), SIZE, CPU, 0)
    q, w = operands.q, operands.w.dequantize(BF16)
    assert torch.equal(rivals.frozen("forward", operands)(), q.x @ w.t())
    assert torch.equal(rivals.frozen("backward", operands)(), q.dy @ w)


def test_no_pass_is_begun_after_the_end(tmp_path: Path) -> None:
    assert timed(tmp_path, backend("composite"), end=time.monotonic() - 1) == []


def test_a_pass_for_which_the_memory_does_not_suffice_is_told(tmp_path: Path) -> None:
    events = timed(tmp_path, backend("composite", changed(full)), passes=[FORWARD, FORWARD])
    assert [event["failed"] for event in events if "failed" in event] == [str(FORWARD)] * 2


def surveyed(tmp_path: Path, name: str | None = None, here: dict | None = None, **options) -> list[dict]:
    passes = options.get("passes", [FORWARD])
    return [
        event["survey"] for event in told(tmp_path, lambda tell: survey.main(name, [SETTING], SETTING, passes, 1, tell))
    ]


def test_every_kind_of_gpu_is_surveyed_once(tmp_path: Path, monkeypatch) -> None:
    names = ["H100", "H100", "H100 MIG 3g.40gb", "A100"]
    gpus = [torch.device("cuda", index) for index in range(4)]
    here = {device: IDENTITY._replace(device=name) for device, name in zip(gpus, names, strict=True)}
    monkeypatch.setattr(identity, "identify", here.__getitem__)
    monkeypatch.setattr(survey, "_all_devices", lambda: gpus)
    monkeypatch.setattr(dispatch, "refusals", lambda name, call: ["not here"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find.forget()
    assert [each["device"] for each in surveyed(tmp_path)] == ["cuda:0", "cuda:2", "cuda:3"]
    assert [each["device"] for each in surveyed(tmp_path, "cuda:1")] == ["cuda:1"]
    assert [each["device"] for each in surveyed(tmp_path, "cuda")] == ["cuda:0"]
    assert surveyed(tmp_path, "cuda:9") == [] == surveyed(tmp_path, "cpu")
    assert surveyed(tmp_path)[0]["refusals"]["triton"] == ["not here"]
    find.forget()


@pytest.mark.parametrize("field", ["driver", "torch", "triton", "ptxas", "sources", "extension"])
def test_evidence_of_another_state_is_found_stale(field: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(survey, "_all_devices", lambda: [CPU])
    with fake_gpu(tmp_path, backend("composite")):
        verdicts = {KEY.format("composite"): Verdict("right", "", "2026-11-28")}
        timings = {file.bucket_of(SETTING.call("forward", CPU, SIZE)): Timing(1.0, {}, "2026-11-28")}
        find.add(CPU, verdicts, timings)
        restart()
        (known,) = surveyed(tmp_path)
        assert known["verdicts"] == list(verdicts) and known["unmeasured"] == [] and len(known["used"]) == 1
    with fake_gpu(tmp_path, backend("composite"), here=IDENTITY._replace(**{field: "changed"})):
        (known,) = surveyed(tmp_path)
    assert known["verdicts"] == [] and known["unmeasured"] == [str(FORWARD)] and known["used"] == []
    ((path, why),) = known["passed"]
    assert path.endswith("evidence-fake-gpu-132.json") and why[0].startswith(field) and why[0].endswith("changed now")


def test_the_choices_are_those_of_dispatch(tmp_path: Path) -> None:
    with fake_gpu(tmp_path, backend("triton"), backend("composite")):
        find.add(
            CPU,
            {KEY.format(name): Verdict("right", "", "2026-11-28") for name in ("triton", "composite")},
            {
                file.bucket_of(SETTING.call("forward", CPU, SIZE)): Timing(
                    1.0, {"triton": (1.0, 1.0, 1.0), "composite": (1.1, 1.1, 1.1), "eager": (2.0, 2.0, 2.0)}, ""
                )
            },
        )
        events = told(tmp_path, lambda tell: survey.chosen(CPU, SETTING, [FORWARD], tell))
    assert events == [{"chosen": [str(FORWARD), "triton"]}]


def test_a_job_is_told_to_begin_and_to_end(tmp_path: Path, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(child, "times", SimpleNamespace(main=lambda *args: done.append(args[:6])))
    job = {"kind": "times", "device": "cpu", "timed": SETTING.to_json(), "passes": [FORWARD]}
    job |= {"rounds": 2, "without": [], "seconds": None}

    def run(tell: Teller) -> None:
        assert child.main([json.dumps(job), str(tmp_path / "events")]) == 0

    assert told(tmp_path, run) == [{"doing": "start", "limit": "slow"}, {"end": True}]
    assert done == [(CPU, SETTING, [FORWARD], 2, [], float("inf"))]
