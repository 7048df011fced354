"""scripts/gpu_report.py puts results into a checkout, says what is stale, and refuses what it cannot vouch for. All
results here are made up, and no checkout but a temporary one is written to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from support import llama_run, measured_pages
from support.paths import ROOT

from lora_kernels.evidence import file, find, identity
from lora_kernels.evidence.file import Evidence, Verdict
from lora_kernels.testing.documents import write

HERE = llama_run.IDENTITY._replace(sources=identity.source_hash())
FACTORS = {"F.linear": 1.0, "PEFT": 1.8, "PEFT, fp32 adapters": 2.0, "addmm_": 1.2, "ours: composite": 1.13}
RIGHT = {"composite forward r16 bfloat16+bfloat16": Verdict("right", "", "2030-01-01")}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("gpu_report")
    monkeypatch.setattr(script, "_draw", lambda path: None)
    return script


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return measured_pages.checkout(tmp_path / "checkout")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The folder that gpu_check.py has filled."""
    folder = tmp_path / "c"
    file.add(folder / "evidence.json", Evidence(HERE, RIGHT))
    write(llama_run.document(FACTORS, HERE), folder / "llama.json")
    (folder / "log.txt").touch()
    return folder


def test_results_become_tables_pictures_and_shipped_evidence(script, root, results, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "_draw", drawn.append)
    assert script.main([str(results), "--root", str(root)]) == 0
    kept = root / "benchmarks" / "results" / "gpu" / "2030-01-01-fake-gpu-llama.json"
    assert json.loads(kept.read_text()) == json.loads((results / "llama.json").read_text()) and drawn == [kept]
    shipped = root / "lora_kernels" / "evidence" / "shipped" / "fake-gpu-132.json"
    assert file.read(shipped).verdicts == RIGHT
    readme, measuring = ((root / name).read_text() for name in ("README.md", "docs/measuring.md"))
    assert "**Fake GPU** (sm_90, driver 580.65)" in readme
    assert "/blob/main/benchmarks/results/gpu/2030-01-01-fake-gpu-llama.json)" in readme
    assert "| composite: forward over F.linear | ×1.13 of 24/24 layers, ≤ 1.15 met |" in readme
    assert "| PEFT (fp32 adapters, p=0.05) over ours, fwd + bwd | ×1.77 | 24/24 | ≥ 1.40 | met |" in measuring
    assert "Decoding in a CUDA graph" in measuring and "not yet run" not in readme + measuring


def test_shipped_evidence_is_found_where_it_is_put(script, root, results, monkeypatch):
    script.main([str(results), "--root", str(root)])
    monkeypatch.setattr(find, "SHIPPED", root / find.SHIPPED.relative_to(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "nothing"))
    monkeypatch.delenv(find.VARIABLE, raising=False)
    assert find._look(HERE._replace(driver="999")).evidence.verdicts == RIGHT


def test_check_says_what_is_stale(script, root, results, capsys):
    words = [str(results), "--root", str(root)]
    assert script.main([*words, "--check"]) == 1 and not (root / "benchmarks").exists()
    assert "shipped/fake-gpu-132.json is stale" in capsys.readouterr().out
    assert script.main(words) == 0 == script.main([*words, "--check"])
    write(llama_run.document(FACTORS | {"ours: composite": 1.3}, HERE), results / "llama.json")
    assert script.main([*words, "--check"]) == 1
    assert "fake-gpu-llama.json is stale" in capsys.readouterr().out
    script.main(words)
    page = root / "README.md"
    page.write_text(page.read_text().replace("missed", "met"))
    assert script.main([*words, "--check"]) == 1 and "README.md is stale" in capsys.readouterr().out


def refused(script: ModuleType, root: Path, *results: Path) -> bool:
    """Return whether results are refused, and nothing of the checkout is changed."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    status = script.main([*map(str, results), "--root", str(root)])
    return status == 1 and before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_results_of_other_kernels_are_refused(script, root, results, capsys):
    other = HERE._replace(sources="0123")
    write(llama_run.document(FACTORS, other), results / "llama.json")
    assert refused(script, root, results)
    assert "llama.json: it was measured with state 0123 of the kernels'" in capsys.readouterr().out
    (results / "llama.json").unlink()
    file.add(results / "evidence.json", Evidence(other, RIGHT))
    assert refused(script, root, results) and "evidence.json: it was measured" in capsys.readouterr().out
    file.add(results / "evidence.json", Evidence(HERE._replace(extension="4567 by nvcc 13.0"), RIGHT))
    assert refused(script, root, results) and "state 4567 of csrc/cuda" in capsys.readouterr().out
    built = f"{script.native_nvcc.source_hash()} by nvcc 13.0"
    file.add(results / "evidence.json", Evidence(HERE._replace(extension=built), RIGHT))
    assert script.main([str(results / "evidence.json"), "--root", str(root)]) == 0


def test_results_without_verdicts_are_refused(script, root, results, capsys):
    assert refused(script, root, results / "llama.json") and "there are no verdicts" in capsys.readouterr().out
    file.add(results / "evidence.json", Evidence(HERE._replace(driver="another"), RIGHT))
    assert refused(script, root, results) and "there are no verdicts" in capsys.readouterr().out
    (results / "evidence.json").unlink()
    file.add(results / "evidence.json", Evidence(HERE))
    assert refused(script, root, results) and "it has no verdicts" in capsys.readouterr().out


def test_what_is_no_result_of_a_gpu_is_refused(script, root, results, tmp_path, capsys):
    document = llama_run.document(FACTORS, HERE)
    for change in ({"identity": None}, {"suite": None}, {"timings": []}):
        write(document | change, results / "llama.json")
        assert refused(script, root, results)
    text = (results / "evidence.json").read_text()
    (results / "evidence.json").write_text(text.replace('"right"', '"wrong"'))
    assert refused(script, root, results) and "checksum" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert refused(script, root, tmp_path / "empty") and "there is no evidence.json" in capsys.readouterr().out


def test_no_result_of_a_gpu_is_on_record_unless_it_is_shown(script):
    """README says that nothing has run on a GPU as long as there are no results."""
    there = any((ROOT / "benchmarks" / "results" / "gpu").glob("*.json"))
    assert there != (script.update_readme.gpu_tables.NO_GPU_RUN in (ROOT / "README.md").read_text())
