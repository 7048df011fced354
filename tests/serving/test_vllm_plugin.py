"""`register`, which vLLM calls: when our wrapper takes the place of vLLM's, and when it leaves it."""

from __future__ import annotations

import ast
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.paths import ROOT

from lora_kernels.serving.vllm import NEWEST, OLDEST, OURS, PARAMETERS, THEIRS, VARIABLE, register


def wrapper_with(parameters: dict[str, str]) -> type:
    """Return a class whose methods have these parameters."""
    methods: dict[str, object] = {}
    for name, words in parameters.items():
        exec(f"def {name}(self, {', '.join(words.split())}): ...", methods)
    methods.pop("__builtins__")
    return type("PunicaWrapperCPU", (), methods)


class Platform:
    """A stand-in for a platform of vLLM."""

    device = "cpu"
    name = THEIRS

    def is_cpu(self) -> bool:
        return self.device == "cpu"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return cls.name


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the package vllm: its version, platform and wrapper class can be changed."""
    told = SimpleNamespace(package=ModuleType("vllm"), platform=type("CpuPlatform", (Platform,), {})())
    told.package.__version__ = "0.32.0"
    told.punica = SimpleNamespace(PunicaWrapperCPU=wrapper_with(PARAMETERS))
    names = {
        "vllm": told.package,
        "vllm.platforms": SimpleNamespace(current_platform=told.platform),
        "vllm.lora": ModuleType("vllm.lora"),
        "vllm.lora.punica_wrapper": ModuleType("vllm.lora.punica_wrapper"),
        "vllm.lora.punica_wrapper.punica_cpu": told.punica,
    }
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(VARIABLE, raising=False)
    return told


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def test_the_cpu_platform_names_our_wrapper_however_often_it_is_registered(vllm, warnings):
    register()
    register()
    assert vllm.platform.get_punica_wrapper() == type(vllm.platform).get_punica_wrapper() == OURS
    assert Platform.get_punica_wrapper() == THEIRS, "only the class of the platform in use changes"
    assert not warnings.records


def test_another_platform_keeps_its_wrapper(vllm, warnings):
    vllm.platform.device = "cuda"
    register()
    assert vllm.platform.get_punica_wrapper() == THEIRS
    assert not warnings.records


def test_the_variable_turns_it_off_at_the_time_of_the_call(vllm, warnings, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    register()
    assert vllm.platform.get_punica_wrapper() == THEIRS
    assert not warnings.records
    monkeypatch.setenv(VARIABLE, "1")
    register()
    assert vllm.platform.get_punica_wrapper() == OURS


@pytest.mark.parametrize("version", ["0.12.0", "0.20.2", "0.33.0", "0.33.1rc2.dev7+g12ab.cpu"])
def test_versions_that_were_read_are_served(vllm, version):
    vllm.package.__version__ = version
    register()
    assert vllm.platform.get_punica_wrapper() == OURS


@pytest.mark.parametrize("version", ["0.11.2", "0.34.0", "1.0.0", "dev"])
def test_other_versions_keep_their_wrapper_and_a_warning_names_them(vllm, warnings, version):
    vllm.package.__version__ = version
    register()
    assert vllm.platform.get_punica_wrapper() == THEIRS
    (record,) = warnings.records
    assert f"vLLM {version} is installed, and the plug-in knows 0.{OLDEST[1]} to 0.{NEWEST[1]}" in record.getMessage()


@pytest.mark.parametrize(("name", "found"), [
    ("add_lora_linear", "y x lora_a_stacked lora_b_stacked lora_bias_stacked scale output_slices buffer kwargs"),
    ("add_lora_logits", None),
])  # fmt: skip
def test_methods_that_are_not_known_keep_their_wrapper_and_a_warning_shows_them(vllm, warnings, name, found):
    parameters = {each: words for each, words in (PARAMETERS | {name: found}).items() if words is not None}
    vllm.punica.PunicaWrapperCPU = wrapper_with(parameters)
    register()
    assert vllm.platform.get_punica_wrapper() == THEIRS
    (record,) = warnings.records
    assert f"{name} takes ({found or 'nothing'}), and the plug-in knows ({PARAMETERS[name]})" in record.getMessage()


def test_a_platform_with_a_wrapper_of_its_own_keeps_it(vllm, warnings):
    type(vllm.platform).name = "other.Wrapper"
    register()
    assert vllm.platform.get_punica_wrapper() == "other.Wrapper"
    assert "the platform CpuPlatform has a wrapper of its own, other.Wrapper" in warnings.text


def test_vllm_finds_register_by_its_entry_point():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"lora_kernels": f"{register.__module__}:{register.__name__}"}


@pytest.mark.parametrize("path", sorted((ROOT / "lora_kernels/serving/vllm").glob("*.py")), ids=lambda path: path.name)
def test_only_the_file_that_vllm_names_imports_vllm(path):
    tree = ast.parse(path.read_text())
    named = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    named += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert any(name.split(".")[0] == "vllm" for name in named) == (path.stem == OURS.split(".")[-2])
