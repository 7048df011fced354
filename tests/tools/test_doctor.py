"""The doctor reports what is installed, what is missing and how to get it, and nothing personal such as paths."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.fake_gpu import CPU, IDENTITY, backend, call, fake_gpu, restart
from support.paths import ROOT

import lora_kernels
from lora_kernels.__main__ import main
from lora_kernels.backends import dispatch
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import Evidence, Timing, Verdict
from lora_kernels.tools import doctor, kernels_here, packages


def test_the_report_agrees_with_explain_and_holds_no_paths(capsys):
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert [entry["name"] for entry in report["backends"]] == list(dispatch.BACKENDS)
    for entry in report["backends"]:
        assert entry["ready"] == bool(entry["serves"]) and entry["ready"] == (not entry["reasons"])
    automatic = [entry["name"] for entry in report["backends"] if "cpu" in entry["automatic"]]
    operands = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(4, 2)
    assert automatic == [lora_kernels.explain(*operands).forward]
    assert str(Path.home()) + "/" not in text and str(ROOT) not in text


def test_the_tables_name_versions_and_backends(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "versions" in text and "eager" in text and "the automatic choice" in text
    if not torch.cuda.is_available():
        assert "not ready" in text and "how to get it" in text


def test_a_machine_that_no_backend_serves_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(
        dispatch, "refusals", lambda name, call: [f"{name} is broken: /home/someone/lib/thing.so is missing"]
    )
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "broken: thing.so is missing" in text and "/home" not in text


def test_missing_extensions_are_reported_with_a_way_to_get_them(monkeypatch, capsys):
    for name in ("_C", "_cuda"):
        monkeypatch.setitem(sys.modules, f"lora_kernels.{name}", None)
    report = doctor.examine()
    assert not report["native"]["built"] and not report["cuda"]["built"]
    told = {entry["what"]: entry["how"] for entry in report["missing"]}
    assert "g++" in told["CPU kernels"] and "LORA_KERNELS_CUDA=1" in told["CUDA kernels"]
    main(["doctor"])
    assert "not built" in capsys.readouterr().out


def test_kernels_of_another_version_are_reported_with_the_way_to_build_them(monkeypatch):
    def set_levels(*_):
        raise ValueError("a format that this build does not know")

    monkeypatch.setattr(pytest.importorskip("lora_kernels._C"), "set_levels", set_levels)
    for name in [name for name in sys.modules if name.startswith("lora_kernels.backends.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    dispatch.cache_clear()
    try:
        report = doctor.examine()
    finally:
        dispatch.cache_clear()
    assert "built from another version of this package" in report["native"]["reason"]
    cpu = next(each for each in report["backends"] if each["name"] == "cpu")
    assert not cpu["ready"] and any("pip install" in reason for reason in cpu["reasons"])


def test_a_driver_that_is_too_old_for_the_cuda_kernels_is_told_with_the_way_out(monkeypatch):
    module = SimpleNamespace(
        build_info=lambda: {"nvcc": "13.0", "arch": "sm_90a", "driver": "580", "sources": "abc"},
        devices=list,
    )
    monkeypatch.setitem(sys.modules, "lora_kernels._cuda", module)
    report = doctor.examine()
    assert not any(entry["what"] == "CUDA kernels" for entry in report["missing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    told = {entry["what"]: entry["how"] for entry in kernels_here._missing(report)}
    assert "needs driver 580 or later" in told["CUDA kernels"] and "CUDA_HOME" in told["CUDA kernels"]
    text = dict(kernels_here.facts(report))["CUDA kernels"]
    assert text == "built by nvcc 13.0 for sm_90a; needs driver 580 or later; driver: answers: 0 devices"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/usr/lib/x86_64/libgomp.so.1: cannot open", "libgomp.so.1: cannot open"),
        ("see https://pytorch.org/get-started/locally", "see https://pytorch.org/get-started/locally"),
        ("no module named 'triton'", "no module named 'triton'"),
    ],
)
def test_absolute_paths_are_cut(text, left):
    assert packages.without_paths(text) == left


def test_what_is_known_about_a_gpu_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "BACKENDS", ("triton", "composite", "eager"))
    cache = tmp_path / ".cache"
    with fake_gpu(cache, backend("triton"), backend("composite")):
        verdicts = {
            "composite forward r16 bfloat16+bfloat16": Verdict("right", "", "2026-11-27"),
            "triton forward r16 bfloat16+bfloat16": Verdict(
                "right", "", "2099-11-28"
            ),  # the check at first use adds verdicts of today
            "triton backward r16 bfloat16+bfloat16": Verdict("stuck", "at the tickets", "2026-11-28"),
        }
        find.add(CPU, verdicts, {file.bucket_of(call()): Timing(1e-3, {}, "2026-11-26")})
        stale = tmp_path / "old.json"
        file.add(stale, Evidence(IDENTITY._replace(driver="535")))
        monkeypatch.setenv(find.VARIABLE, str(stale))
        restart()
        assert main(["doctor"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        report = doctor.examine()
    assert "~/.cache/lora_kernels/evidence-fake-gpu-132.json, last written on 2099-11-28" in text
    assert "triton: 1 classes of kernels right, 1 not" in text and "1 passes timed, 0 plans measured" in text
    assert "not used: triton backward r16 bfloat16+bfloat16: stuck: at the tickets" in text
    assert "old.json does not hold here: driver 535 then, 580.65 now" in text
    assert not any("evidence" in entry["what"] for entry in report["missing"])
    assert str(tmp_path) not in json.dumps(report)


def test_a_gpu_without_times_is_missing_evidence_and_verify_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ("composite", "eager"))
    with fake_gpu(tmp_path, backend("composite")):
        report = doctor.examine()
    assert {"what": "evidence for Fake GPU", "how": "run python -m lora_kernels verify"} in report["missing"]
    assert next(entry for entry in report["backends"] if entry["name"] == "composite")["automatic"] == ["cpu"]
