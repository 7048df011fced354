"""The command line: help, version, commands that are imported when they are given, and doctor where torch is missing or
packages are broken."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import lora_kernels
from lora_kernels.__main__ import main
from lora_kernels.tools import packages

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.argv = ["python -m lora_kernels", *sys.argv[1:]]
import runpy
runpy.run_module("lora_kernels", run_name="__main__")
"""


def without_torch(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-S", "-c", WITHOUT_TORCH, *args], capture_output=True, text=True, cwd=ROOT)


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("doctor", "bench", "verify", "analyse", "run", "--version"))


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"lora_kernels {lora_kernels.__version__}\n"


def test_an_unknown_command_is_an_error_that_names_the_others(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["docter"])
    assert ended.value.code == 2 and "doctor" in capsys.readouterr().err


def test_the_console_scripts_run_this_command_line():
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2]
    for name in ("lora_kernels", "lora-kernels"):
        assert f'{name} = "lora_kernels.__main__:main"\n' in scripts


def test_a_console_script_calls_itself_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lora-kernels"])
    main([])
    assert capsys.readouterr().out.startswith("usage: lora-kernels ")


def test_the_public_names_are_shown_by_dir():
    assert set(lora_kernels.__all__) | {"analysis", "train", "jobs"} <= set(dir(lora_kernels))
    assert dir(lora_kernels) == sorted(set(dir(lora_kernels)))


def test_doctor_says_that_torch_is_missing_and_how_to_get_it():
    run = without_torch("doctor")
    assert run.returncode == 1 and not run.stderr
    text = " ".join(run.stdout.split())
    assert "torch cannot be imported (ModuleNotFoundError" in text and "pip install torch" in text
    told = json.loads(without_torch("doctor", "--json").stdout)
    assert told["fault"].startswith("torch cannot be imported") and told["backends"] == []
    (entry,) = told["missing"]
    assert entry["what"] == "torch" and entry["how"].startswith("pip install torch")


@pytest.mark.parametrize("args", [(), ("--version",), ("-h",)])
def test_help_and_version_need_no_torch(args):
    run = without_torch(*args)
    assert run.returncode == 0 and run.stdout and not run.stderr


def test_another_command_without_torch_says_so_in_one_line():
    run = without_torch("bench")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "bench: torch cannot be imported" in run.stderr and "doctor shows what is here" in run.stderr


def test_a_name_of_the_package_without_torch_is_an_import_error_that_says_so():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import lora_kernels\n"
        "for name in ('FusedLoRALinear', 'fuse', 'train'):\n"
        "    try: getattr(lora_kernels, name)\n"
        "    except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.count("needs torch: torch cannot be imported") == 3, run.stderr


@pytest.mark.slow
def test_doctor_runs_beside_broken_packages_and_names_them(tmp_path: Path):
    for name, fault in {
        "triton": "RuntimeError",
        "rich": "OSError",
        "peft": "ValueError",
        "torchao": "OSError",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {fault}('{name} is broken: /opt/secret/lib.so')")
    for name, text in {"torchao": b"\xff\xfe", "trl": b"Metadata-Version: 2.1\n"}.items():
        folder = tmp_path / f"{name}-9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_bytes(text)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lora_kernels.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", script, "doctor", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    states = {entry["name"]: entry["state"] for entry in report["packages"]}
    assert states["torchao"].startswith("broken: its metadata cannot be read")
    assert states["trl"].startswith("broken: its metadata gives the version")
    reasons = {entry["name"]: entry["reasons"] for entry in report["backends"]}
    assert reasons["triton"] == ["could not be loaded: RuntimeError: triton is broken: lib.so"]
    assert "/opt/secret" not in run.stdout


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.18.9", "older than tested"),
        ("0.19.0", "tested"),
        ("0.21.2", "tested"),
        ("0.21.3.dev0", "tested"),
        ("0.22.0", "newer than tested"),
        ("1.0", "newer than tested"),
        ("nonsense", "broken: its metadata gives the version 'nonsense'"),
    ],
)
def test_releases_outside_of_those_that_were_tested_are_told(monkeypatch, version, state):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (entry,) = (each for each in packages.packages() if each["name"] == "peft")
    assert (entry["state"], entry["tested"]) == (state, "0.19 to 0.21")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(packages.TESTED, "no_such_package", ("1.0", "2.0"))
    entry = packages.packages()[-1]
    assert entry == {"name": "no_such_package", "version": None, "tested": "1.0 to 2.0", "state": "not installed"}


def test_the_pinned_releases_are_among_the_tested_ones():
    pins = (
        line.split(";")[0].strip().partition("==") for line in (ROOT / "requirements-dev.txt").read_text().splitlines()
    )
    for name, _, version in pins:
        if version and name in packages.TESTED:
            oldest, newest = map(packages._release, packages.TESTED[name])
            assert oldest <= packages._release(version) <= newest, name
