"""benchmarks/peers.py measures no layer that computes something else, and writes what it has measured."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("peft", reason="PEFT is not installed")
from benchmarks import peers, peers_layers
from lora_kernels.bench import layers
from lora_kernels.bench.shapes import Shape
from lora_kernels.testing import judge

SHAPE = Shape("tiny", 24, 32, 40, 4, bias=False)


def peer(branch: Any) -> peers_layers.Build:
    """The layer whose low-rank branch reads `branch(x, p)`."""

    def lora_linear(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        return F.linear(x, w, bias) + scale * F.linear(F.linear(branch(x, p), a), b)

    return layers.of_peer(lora_linear)


class WithoutMask(torch.autograd.Function):
    """Dropout whose backward forgets the mask, as that of mLoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


WRONG = {
    "no dropout": (lambda x, p: x, "0.0% of x are dropped"),
    "not scaled": (lambda x, p: F.dropout(x, p) * (1 - p), "not scaled by 1/(1 - p)"),
    "no mask in the backward": (WithoutMask.apply, "dx is"),
    "another probability": (lambda x, p: F.dropout(x, 2 * p), "% of x are dropped"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["PEFT", "fused", "ours", *WRONG])
def test_the_check_of_masks_finds_what_is_wrong(name: str, dtype: torch.dtype) -> None:
    right = {"PEFT": layers.peft, "fused": layers.peft_fused, "ours": layers.fused(None)}
    build, told = (right[name], "") if name in right else (peer(WRONG[name][0]), WRONG[name][1])
    found = peers.mask_faults(build, judge.problem(2, 8, 8, 2, dtype=dtype, p=0.25, bias=False))
    assert told in "; ".join(found) and bool(found) == bool(told), found


def test_a_wrong_layer_is_named_and_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> None:
        raise ImportError("needs a GPU\nand more")

    monkeypatch.setattr(peers_layers, "_PEERS", {"PEFT": ("peft", peers_layers._peft), "other": ("torch", absent)})
    found, notes = peers_layers.load()
    assert [each.name for each in found] == ["PEFT"] and "other is not measured: ImportError: needs a GPU" in notes
    found.append(peers_layers.Peer("wrong", "1.0", peer(lambda x, p: x * 2)))

    class Silent:
        def progress(self, total: int) -> Any:
            return contextlib.nullcontext(lambda what, steps: None)

    document = peers.measure([SHAPE], (0.0,), 1, Silent(), found)
    assert [entry["name"] for entry in document["timings"]] == [peers.FLOOR, peers.OURS, "PEFT", peers.FUSED]
    assert not any(entry["faults"] for entry in document["gate"])
    assert any("wrong is not measured" in note and "da is" in note for note in document["notes"])
    times, _ = peers.tables(document)
    assert times[1][-2:] == [f"PEFT {document['peers']['PEFT']}", peers.FUSED] and times[2][0][2].startswith("×")
    peers.peers_plot.draw(document, peers.FLOOR, (peers.OURS, peers.FUSED), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    old = "before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n"
    run = (document, tmp_path / "a.json")
    page = peers.rendered(old, run)
    assert "old" not in page and page.startswith("before") and page.endswith("after\n") and "×" in page
    assert "](../benchmarks/results/peers/a.png)" in page and peers.rendered(page, run) == page
    assert "No run on record yet" in peers.rendered(old, None)


@pytest.mark.parametrize("name", peers_layers._PEERS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_an_installed_peer_computes_the_equation(name: str, p: float) -> None:
    package, builder = peers_layers._PEERS[name]
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"{name} is not installed")
    build = builder()[0]
    q = SHAPE.problem(p, torch.device("cpu"))
    assert peers._faults(build, q, judge.truth(q)) == []
