"""The files that GitHub, PyPI and Zenodo read: workflows, issue forms, the citation, and the project's addresses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.paths import ROOT

import lora_kernels

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def read(path: Any) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_only_and_pins_what_it_uses(path: Any) -> None:
    found = read(path)
    assert found["permissions"] == {"contents": "read"} and found["concurrency"]["group"]
    for name, job in found["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            if "uses" in step:
                assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), f"{name}: pin {step['uses']} by its commit"
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, name
            assert "${{" not in step.get("run", ""), f"{name}: hand a value to a command by env"


def test_the_tests_run_on_every_python_that_is_supported() -> None:
    matrix = read(GITHUB / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in range(10, 15)]
    assert matrix["versions"] == ["oldest", "newest"]
    for name in matrix["versions"]:
        lines = (GITHUB / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert {"torch", "peft", "transformers", "trl"} <= pinned.keys()
    assert project()["requires-python"] == f">={matrix['python'][0]}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_asks_for_what_is_needed(path: Any) -> None:
    found = read(path)
    assert {"name", "description", "body"} <= found.keys()
    fields = {field["id"]: field for field in found["body"]}
    assert len(fields) == len(found["body"])
    assert all(field["type"] in ("textarea", "checkboxes", "input", "dropdown") for field in fields.values())
    if "bug" in found["labels"]:
        doctor = fields["doctor"]
        assert (
            doctor["validations"]["required"]
            and "python -m lora_kernels doctor --json" in doctor["attributes"]["label"]
        )


def test_the_citation_is_of_this_version_and_project() -> None:
    found = read(ROOT / "CITATION.cff")
    assert found["cff-version"] == "1.2.0" and found["version"] == lora_kernels.__version__
    assert found["license"] == project()["license"] and found["authors"]
    assert found["repository-code"] == project()["urls"]["Repository"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(found["date-released"]))


def test_the_project_has_one_address() -> None:
    home = project()["urls"]["Repository"]
    assert all(address.startswith(home) for address in project()["urls"].values())
    for path in (ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md", GITHUB / "ISSUE_TEMPLATE" / "config.yml"):
        text = path.read_text(encoding="utf-8")
        assert home in text, path.name
        assert set(re.findall(r"https://github\.com/[\w-]+/[\w-]+", text)) == {home}, path.name
