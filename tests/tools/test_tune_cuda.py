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
from lora_kernels.plans import store as tuned
from lora_kernels.plans import tiles
from lora_kernels.plans.tilings import BY_RULE, TILINGS, Tiling, find, key
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import problem
from lora_kernels.tools.tune import measure as tune_measure

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the emulated kernels with"),
    pytest.mark.skipif(sm90.cuda_include() is None, reason="the headers of the CUDA toolkit are not there"),
    pytest.mark.timeout(300),  # the first test compiles the kernels for the host
]

BF16 = (torch.bfloat16, torch.bfloat16)
OPTIONS = ("tune", "--backend", "cuda", "--device", "cpu", "--shapes", "140x72x136:12")
CASE = (140, 136, 72, 12, False)
"""M, N, K, R and no dropout, as in OPTIONS."""


@pytest.fixture(autouse=True)
def gpu(plan_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated GPU, and an empty cache."""
    sm90.serve_cpu(monkeypatch)
    monkeypatch.setattr(cuda, "why_not", lambda call: [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: sm90.DEVICE)
    monkeypatch.setattr(tune_measure, "ROUNDS", 1)


def after(monkeypatch: pytest.MonkeyPatch, then: Callable[[str, Tiling, list[torch.Tensor]], None]) -> None:
    """Whenever the back-end has launched a pass, `then(op, tiling, results)`. The emulator runs each launch once;
    further ones repeat its results at once."""
    known: dict = {}

    def replace(op: str) -> None:
        stock = getattr(launch, f"launch_{op}")

        def fake(tiling: Tiling, *operands) -> None:
            results = list(operands[-2:] if op == "forward" else operands[-1])
            if (op, tiling) not in known:
                stock(tiling, *operands)
                known[op, tiling] = [t.clone() for t in results]
            for t, value in zip(results, known[op, tiling], strict=True):
                t.copy_(value)
            then(op, tiling, results)

        monkeypatch.setattr(launch, f"launch_{op}", fake)

    replace("forward")
    replace("backward")


def test_the_fastest_is_kept_and_then_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    best = {"forward": Tiling(256, 2), "backward": Tiling(128, 1)}
    used = []

    def then(op: str, tiling: Tiling, results: list[torch.Tensor]) -> None:
        used.append(tiling)
        time.sleep(0.05 if tiling != best[op] else 0)

    after(monkeypatch, then)
    assert main([*OPTIONS, "--dry-run"]) == 0
    assert find("forward", sm90.DEVICE, BF16, *CASE) == BY_RULE
    used.clear()
    assert main(list(OPTIONS)) == 0
    assert set(used) == {BY_RULE, *TILINGS}
    assert tuned.load(sm90.DEVICE) == {key("forward", BF16, *CASE): (256, 2), key("backward", BF16, *CASE): (128, 1)}
    assert "256 columns, cluster of 2" in " ".join(capsys.readouterr().out.split())
    q = problem(*CASE[:4], dtype=torch.bfloat16)
    used.clear()
    _, h = one_layer.forward(cuda, q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None, True)
    one_layer.backward(cuda, q.dy, q.x, q.w, q.a, q.b, h, q.scale, 0.0, None, True, True, True)
    assert used == [*best.values()]
    assert main([*OPTIONS[:5], "--forget"]) == 0
    assert find("forward", sm90.DEVICE, BF16, *CASE) == BY_RULE


def test_a_wrong_candidate_is_dropped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def spoil(op: str, tiling: Tiling, results: list[torch.Tensor]) -> None:
        if tiling == Tiling(256, 2):
            results[0][3, 5] += 8
        elif tiling == Tiling(128, 1):
            launch.workspace(results[0].device, 1, 1).counters[7] = 1

    after(monkeypatch, spoil)
    assert main(list(OPTIONS)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("dropped 256 columns, cluster of 2:") == 2
    assert shown.count("dropped 128 columns, cluster of 1: leaves counters in the workspace") == 2
    assert not {Tiling(256, 2), Tiling(128, 1)} & set(tuned.load(sm90.DEVICE).values())


def test_both_back_ends_share_a_file() -> None:
    """A plan of one is none of the other's."""
    plan = tiles.Plan(False, tiles.TABLES["sm_90", 2]["tickets"], 1)
    entry = tuned.key("forward", *BF16, *CASE)
    tuned.store(sm90.DEVICE, {entry: plan, key("forward", BF16, *CASE): Tiling(256, 1)})
    tuned.cache_clear()
    assert find("forward", sm90.DEVICE, BF16, *CASE) == Tiling(256, 1)
    found = tuned.find(sm90.DEVICE, entry, tiles.Plan)
    assert found is not None
    assert vars(found.tile) == vars(plan.tile)
    assert tuned.find(sm90.DEVICE, entry, Tiling) is None
    assert find("backward", sm90.DEVICE, BF16, *CASE) == find("forward", "another GPU", BF16, *CASE) == BY_RULE


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.undo()
    assert main([*OPTIONS, "--quant", "nf4"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "needs a GPU that the sm_90a kernels serve: serves tensors on an NVIDIA GPU, not on cpu" in shown
    assert "the kernels take a dense weight, not nf4" in shown
