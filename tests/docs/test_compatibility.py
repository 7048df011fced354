"""scripts/compatibility.py counts what ran, and its tables and its page say the same."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.paths import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("compatibility")


def ended(name: str, outcome: Any, when: Any = "call") -> pytest.TestReport:
    return pytest.TestReport(name, ("", 0, ""), {}, outcome, None, when)


def test_the_recorder_counts_how_tests_end(script: ModuleType) -> None:
    recorder = script.Recorder()
    by_backend = SimpleNamespace(nodeid="tests/a.py::b[cpu]", callspec=SimpleNamespace(params={"backend": "cpu"}))
    other_value = SimpleNamespace(nodeid="tests/a.py::b[x]", callspec=SimpleNamespace(params={"backend": object()}))
    of_a_backend = SimpleNamespace(nodeid="tests/backends/triton/c.py::d")
    recorder.pytest_collection_modifyitems([by_backend, other_value, of_a_backend])
    for report in (
        ended("tests/a.py::b[cpu]", "passed", "setup"),
        ended("tests/a.py::b[cpu]", "passed"),
        ended("tests/a.py::b[cpu]", "passed", "teardown"),
        ended("tests/a.py::b[x]", "failed"),
        ended("tests/a.py::skipped", "skipped", "setup"),
        ended("tests/a.py::without_a_fixture", "failed", "setup"),
        ended("tests/backends/triton/c.py::d", "skipped"),
    ):
        recorder.pytest_runtest_logreport(report)
    assert {name: {of: dict(counts) for of, counts in file.items()} for name, file in recorder.files.items()} == {
        "tests/a.py": {"cpu": {"passed": 1}, "": {"failed": 2, "skipped": 1}},
        "tests/backends/triton/c.py": {"triton": {"skipped": 1}},
    }


def document(torch: str, **files: dict[str, dict[str, int]]) -> dict[str, Any]:
    versions = dict.fromkeys(("python", "lora_kernels", "torch", "peft", "transformers")) | {
        "python": "3.12.1", "torch": torch, "peft": "0.21.2"
    }  # fmt: skip
    return {
        "date": "2030-01-01", "pytest": ["-m", "not slow"], "device": {"name": "A CPU"}, "versions": versions,
        "counts": {"passed": 7, "skipped": 2}, "files": {f"tests/ops/test_{name}.py": of for name, of in files.items()},
    }  # fmt: skip


def test_the_tables_are_those_of_the_documents(script: ModuleType, tmp_path: Path) -> None:
    newer = document("2.14.1+cpu", dora={"": {"passed": 3}, "cpu": {"passed": 4, "failed": 1}})
    older = document("2.6.0", dora={"cpu": {"skipped": 2}}, group={"eager": {"passed": 5}})
    assert script.write(newer, tmp_path).name == "python3.12-torch2.14.1-peft0.21.2.json"
    script.write(older, tmp_path)
    documents = script.read(tmp_path)
    assert [d["versions"]["torch"] for d in documents] == ["2.6.0", "2.14.1+cpu"], "2.6 is older than 2.14"
    lines = script.environments(documents).splitlines()
    assert "| 3.12.1 | 2.6.0 | 0.21.2 | – |" in lines[2] and "| 7 | 0 | 2 | `-m not slow` | A CPU |" in lines[2]
    assert "| DoRA | 2 skipped | 7 passed, 1 failed |" in script.features(documents)
    assert "| groups (q/k/v, gate/up) | 5 passed | – |" in script.features(documents)
    assert "| DoRA | – | 4 passed, 1 failed, 2 skipped | – | – | – |" in script.backends(documents)
    assert "serving" not in script.features(documents), "a feature without a test is left out"


def test_every_feature_names_tests_that_exist(script: ModuleType) -> None:
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    for name, patterns in script.FEATURES.items():
        assert any(script.fnmatch.fnmatch(file, pattern) for file in files for pattern in patterns), name


def test_the_page_is_fresh(script: ModuleType) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    assert script.main(["--check"]) == 0, "run python scripts/compatibility.py --table"


def test_nothing_is_recorded_of_a_run_without_tests(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script.pytest, "main", lambda *args, **more: pytest.ExitCode.NO_TESTS_COLLECTED)
    assert script.record([]) == pytest.ExitCode.NO_TESTS_COLLECTED and not list(tmp_path.iterdir())
