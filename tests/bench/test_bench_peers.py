"""The peers of the bench: layers of other projects from their sources, and other forms of PEFT."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.__main__ import main
from lora_kernels.bench import overhead, peers, report, variants
from lora_kernels.bench.shapes import Shape
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.testing.judge import evaluate, problem

RIGHT = """
import torch.nn.functional as F
def lora_linear(x, w, a, b, *, bias, scale, p):
    return F.linear(x, w, bias) + scale * (F.dropout(x, p) @ a.T @ b.T)
"""
FORGETS = RIGHT.replace("scale * ", "")
RAISES = "def lora_linear(*args, **kwargs):\n    raise NotImplementedError('not on this GPU')\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(overhead, "_CALLS", 10)
    monkeypatch.setattr(overhead, "measure_import", lambda times: overhead.ImportCost(1.0, False))


def test_peers_are_measured_or_named_with_their_reason(tmp_path, capsys):
    sources = {"right": RIGHT, "forgets": FORGETS, "raises": RAISES, "broken": "import no_such_module"}
    words = ["bench", "--device", "cpu", "--shapes", "tiny", "--rounds", "2", "--out", str(tmp_path / "run.json")]
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
        words += ["--peer", f"{name}={tmp_path / name}.py"]
    assert main([*words, "--peer", f"absent={tmp_path}/nowhere"]) == 0
    document = json.loads((tmp_path / "run.json").read_text())
    cells = [e for e in document["timings"] if e["variant"] == "right"]
    assert len(cells) == 4 and all(e["seconds"][1] > 0 and e["backend"] is None for e in cells)
    # With dropout a peer draws its own mask and cannot be compared with the truth: it is judged at p = 0.
    assert {(e["variant"], e["p"]) for e in document["timings"] if e["variant"] == "forgets"} == {("forgets", 0.1)}
    assert not any(e["variant"] in ("raises", "broken", "absent") for e in document["timings"])
    notes = "\n".join(document["notes"])
    assert "forgets is not measured on tiny p=0: y is" in notes and "from the equation" in notes
    assert "raises is not measured on tiny p=0: NotImplementedError: not on this GPU" in notes
    assert (
        "broken is not measured: ModuleNotFoundError" in notes and "absent is not measured: FileNotFoundError" in notes
    )
    text = capsys.readouterr().out
    assert "not on this GPU" in text and str(tmp_path) not in document["command"]


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Hide packages, as if they were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else found(name))
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)


def test_unsloths_layer_is_called_by_its_own_rules(tmp_path, monkeypatch):
    """The folder holds a layer of ours in Unsloth's layout of files. Importing the package would fail, other packages
    are not installed, and x has three dimensions."""
    kernels = tmp_path / "unsloth" / "kernels"
    kernels.mkdir(parents=True)
    (tmp_path / "unsloth" / "__init__.py").write_text("raise RuntimeError('must not run')")
    (kernels / "utils.py").write_text(
        "import torch, bitsandbytes as bnb\nfrom unsloth_zoo.utils import Version\n"
        "from unsloth_zoo.log import logger\nassert Version(torch.__version__) > Version('2.0')\n"
        "NEW = Version(bnb.__version__) > Version('0.43')\nlogger.info(bnb.functional.lib.cdequantize)\n"
    )
    (kernels / "fast_lora.py").write_text(
        "from .utils import NEW\nclass LoRA_W:\n    @staticmethod\n    def apply(x, w, quant, a, b, s):\n"
        "        assert x.dim() == 3 and quant is None\n        return x @ w.T + s * (x @ a.T @ b.T)\n"
    )
    hide(monkeypatch, "unsloth", "unsloth_zoo", "bitsandbytes")
    try:
        peer = peers.load("unsloth", tmp_path)
        q = problem(8, 12, 16, 4, bias=False)
        assert peers.faults(evaluate(q, adapted(peer)), evaluate(q)) == []
        assert not peer.dropout and "without bitsandbytes, unsloth_zoo" in peer.notes[0]
        with pytest.raises(ValueError, match="no bias"):
            peer.lora_linear(q.x, q.w, q.a, q.b, bias=torch.zeros(12), scale=1.0, p=0.0)
        assert "bitsandbytes" not in sys.modules, "stand-ins are gone afterwards"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "unsloth"]:
            del sys.modules[name]


def test_lorafusions_layer_is_called_by_its_own_rules(tmp_path, monkeypatch):
    """The folder holds a layer of ours in LoRAFusion's layout of files. A GPU that its table lacks gets the H100's
    entry."""
    ops = tmp_path / "lorafusion" / "ops" / "triton_ops"
    ops.mkdir(parents=True)
    (tmp_path / "lorafusion" / "utils").mkdir()
    (ops / "config.py").write_text("from loguru import logger\nH100_CONFIG = 'h100'\nHARDWARE_CONFIGS = {}\n")
    (tmp_path / "lorafusion" / "utils" / "common.py").write_text("def get_device_short_name():\n    return 'h200'\n")
    (ops / "tma_utils.py").write_text("raise AttributeError('Triton has no such name')")
    (ops.parent / "lora_v1.py").write_text(
        "from lorafusion.ops.triton_ops.config import HARDWARE_CONFIGS\n"
        "from lorafusion.ops.triton_ops.tma_utils import HAS_TMA_DESC\n"
        "def fused_linear_lora(x, w, a, b, alpha, seed, dropout_p, linear_bias):\n"
        "    assert x.dim() == 3 and HARDWARE_CONFIGS['h200'] == 'h100' and not HAS_TMA_DESC\n"
        "    y = x @ w.T + alpha * (x @ a.T @ b.T)\n    return y if linear_bias is None else y + linear_bias\n"
    )
    language = pytest.importorskip("triton.language")
    monkeypatch.delattr(language, "_experimental_descriptor_load", raising=False)
    try:
        peer = peers.load("lorafusion", tmp_path)
        q = problem(8, 12, 16, 4)
        assert peers.faults(evaluate(q, adapted(peer)), evaluate(q)) == []
        assert any("pointer kernels" in note for note in peer.notes) and any("H100" in note for note in peer.notes)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lorafusion"]:
            del sys.modules[name]


def adapted(peer: peers.Peer):
    def lora_linear(x, w, a, b, *, scale, bias, dropout_p, seed):
        return peer.lora_linear(x, w, a, b, bias=bias, scale=scale, p=dropout_p)

    return lora_linear


def test_pefts_other_forms_are_measured_where_they_differ(monkeypatch):
    """Beside 16 bits PEFT's default is fp32 adapters. If ours are fp32, its other form has 16-bit adapters."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: compiled.append(type(layer).__name__) or layer)
    found, notes = variants.more_baselines([])
    assert notes == []
    names = {variant.name: variant for variant in found}

    def wanted(**kwargs) -> set[str]:
        shape = Shape("s", 8, 8, 8, 2, **kwargs)
        return {name for name, variant in names.items() if variant.wanted(shape)}

    assert wanted() == set()
    assert wanted(dtype=torch.bfloat16) == {"PEFT, fp32 adapters"}
    assert wanted(dtype=torch.bfloat16, adapter_dtype=torch.float32) == {"PEFT, bf16 adapters"}
    assert wanted(dtype=torch.float16, compiled=True) == {"PEFT, fp32 adapters", "PEFT compiled"}
    q = problem(8, 12, 16, 4, dtype=torch.bfloat16)
    task = names["PEFT, fp32 adapters"].build(q)
    assert {t.dtype for t in task.trained} == {torch.float32} and task.layer(q.x).dtype == torch.bfloat16
    assert {t.dtype for t in names["PEFT compiled"].build(q).trained} == {torch.bfloat16} and compiled.count(
        "Linear"
    ) == 1
    x = q.x.clone().requires_grad_()
    for variant in names.values():
        if variant.name != "PEFT, fp16 adapters":
            task = variant.build(q)
            y = task.layer(x)
            gradients = torch.autograd.grad(y, (x, *task.trained), q.dy)
            results = dict(zip(("y", "dx", "da", "db"), (y.detach(), *gradients), strict=True))
            assert peers.faults(results, evaluate(q.to(torch.float64))) == [], variant.name


def test_a_peer_that_is_no_python_file_is_refused(tmp_path):
    (tmp_path / "peer.txt").write_text("")
    with pytest.raises(ImportError, match="no Python file"):
        peers.load("other", Path(tmp_path / "peer.txt"))


@pytest.mark.slow
def test_layers_are_timed_beside_pefts_own_unless_they_are_wrong(monkeypatch):
    calls = overhead.measure_layers(torch.device("cpu"), 2)
    names = {"PEFT's, fused", "FusedLoRALinear"}
    cells = [(c.layer, c.which, c.M, c.dtype) for c in calls]
    passes = [("forward", 1), ("forward + backward", 8)]
    assert sorted(cells) == sorted((n, which, M, d) for n in names for which, M in passes for d in ("fp32", "bf16"))
    for call in calls:
        low, middle, high = call.over_peft
        assert not call.faults and 0 < low <= middle <= high and call.call_us > 0 and call.peft_us > 0
    table = report._layer_calls_table({"layer_calls": [dataclasses.asdict(call) for call in calls]})
    assert len(table[2]) == 8 and all(row[-1] in ("met", "missed") for row in table[2])

    right = FusedLoRALinear.forward
    monkeypatch.setattr(FusedLoRALinear, "forward", lambda self, x: 1.1 * right(self, x))
    calls = overhead.measure_layers(torch.device("cpu"), 2)
    red = [call for call in calls if call.faults]
    assert len(red) == 4 and {call.layer for call in red} == {"FusedLoRALinear"}
    assert all(call.over_peft is None and call.call_us is None for call in red)
    table = report._layer_calls_table({"layer_calls": [dataclasses.asdict(call) for call in calls]})
    assert [row[4] == "red" for row in table[2]] == [bool(call.faults) for call in calls]


def test_a_wrong_layer_makes_the_bench_fail(monkeypatch, capsys):
    wrong = overhead.LayerCall("FusedLoRALinear", "forward", 1, "fp32", ["y: wrong"])
    monkeypatch.setattr(overhead, "measure_layers", lambda device, rounds: [wrong])
    assert main(["bench", "--device", "cpu", "--shapes", "tiny", "--rounds", "1", "--backend", "eager"]) == 1
    text = capsys.readouterr().out
    assert "y: wrong" in text and "the judge found faults in 1 of" in text
