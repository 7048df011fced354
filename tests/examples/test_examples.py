"""The language-model examples run as a newcomer runs them, in a few steps, and keep their promises."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

for _needed in ("transformers", "accelerate", "peft"):
    pytest.importorskip(_needed)

EXAMPLES = ROOT / "examples"


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python command and return its process. It computes on one thread, because several threads wait for each
    other on a busy machine."""
    # The package need not be installed: it may be built in its folder.
    paths = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": paths}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], text=True, env=os.environ | environment, **pipes)


def output(process: subprocess.Popen[str]) -> str:
    """Wait for a process, which must succeed, and return what it printed."""
    said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    return said


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """Return the process and the folder of each example that needs one process, by its name. They run at the same time,
    since each takes one thread."""
    names = ["finetune_lm", *(["generate_qlora"] if importlib.util.find_spec("bitsandbytes") else [])]
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    found = {
        name: (start(str(EXAMPLES / f"{name}.py"), "--short", "--out", str(folder)), folder)
        for name, folder in folders.items()
    }
    yield found
    for process, _ in found.values():
        process.kill()
        process.communicate()


def test_finetune_lm_fuses_every_layer_and_learns(started) -> None:
    process, folder = started["finetune_lm"]
    said = output(process)
    assert "28 of 28 LoRA layers fused" in said and " not fused" not in said
    found = {
        name: [float(value) for value in values.split()]
        for name, values in re.findall(r"^  (pretrained|with the adapter|adapter off) +([\d. ]+)$", said, re.MULTILINE)
    }
    assert found["adapter off"] == found["pretrained"]
    assert found["with the adapter"][1] < 0.97 * found["pretrained"][1] < 1000
    assert re.search(r"^  fused +[\d.]+ ms", said, re.MULTILINE)
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_generate_qlora_learns_in_4_bits_and_generates(started) -> None:
    pytest.importorskip("bitsandbytes")
    process, folder = started["generate_qlora"]
    said = output(process)
    assert "28 of 28 LoRA layers fused" in said and " not fused" not in said
    dense, stored = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) KiB", said))
    assert dense / 8 < stored < dense / 7  # 4 bits instead of 32, and a scale for every 64 weights
    before, after = map(float, re.search(r"examples: ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < 0.97 * before < 1000
    merged = float(re.search(r"perplexity, merged: ([\d.]+)", said)[1])
    assert abs(merged - after) < 0.5 * (before - after)  # NF4 lost little of the base
    assert len(re.findall(r"^  \d+ tokens  ['\"]", said, re.MULTILINE)) == 3 * 3
    # bitsandbytes may compute in bf16 even if another dtype is asked for
    assert float(re.search(r"logits differ by (\S+) ", said)[1]) < torch.finfo(torch.bfloat16).eps
    rates = [float(rate) for rate in re.findall(r"^  .* ([\d.]+) tokens/s$", said, re.MULTILINE)]
    assert len(rates) == 2 and min(rates) > 0
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def perplexities_by_step(said: str) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in re.findall(r"step (\d+): .* ([\d.]+)$", said, re.M)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard runs on CPUs from torch 2.7 on")
@pytest.mark.slow
def test_finetune_fsdp_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    words = [str(EXAMPLES / "finetune_fsdp.py"), "--short", "--out", str(tmp_path)]
    said = output(start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words))
    assert "28 layers fused, 0 not; 2 processes" in said
    perplexities = perplexities_by_step(said)
    # A single process needs no launcher, which takes seconds to start and to end.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    said = output(start(*words, "--resume", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **address))
    assert "28 layers fused, 0 not; 1 processes" in said
    perplexities += perplexities_by_step(said)
    (zero, first), (saved, second), (resumed, third), (end, last) = perplexities
    assert zero == 0 < saved == resumed < end
    assert second < 0.97 * first and abs(third - second) <= 0.1 and last < second
    assert len(list(tmp_path.glob("checkpoint-*/*.distcp"))) == 2 + 1
