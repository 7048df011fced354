"""LORA_KERNELS=1 reaches every process in which torch is imported, by an entry point that torch calls."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from support import entry_world
from support.entry_world import MAKE

import lora_kernels_autoload as autoload


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return entry_world.make(tmp_path_factory.mktemp("world"))


def test_the_entry_point_is_a_function_of_a_module_beside_the_package():
    module, function = entry_world.metadata().split("=")[1].strip().split(":")
    assert getattr(importlib.import_module(module), function) is autoload.install
    assert Path(autoload.__file__).name == "lora_kernels_autoload.py"  # in the package it would import the package


@pytest.mark.parametrize(
    ("value", "made"), [("1", "['fused', 1]"), (" 1 ", "['fused', 1]"), ("0", "[1]"), ("", "[1]"), (None, "[1]")]
)
def test_the_values_of_the_variable(world, value, made):
    ran = entry_world.run(world, MAKE, value, "-W", "error")
    assert ran.stdout.strip() == made and not ran.stderr, ran.stderr


@pytest.mark.parametrize("value", ["yes", "2", "true"])
def test_another_value_is_an_error_where_peft_is_imported_and_torch_is_imported_all_the_same(world, value):
    ran = entry_world.run(world, f"import torch; print('torch')\n{MAKE}", value)
    assert ran.stdout.strip() == "torch" and ran.returncode == 1
    said = f"ValueError: the environment variable LORA_KERNELS is '{value}': 1 fuses the LoRA layers that PEFT makes, 0"
    assert said in ran.stderr


def test_nothing_is_imported_before_peft_makes_its_first_layer(world):
    code = """
import torch, sys
assert not [name for name in sys.modules if name.partition(".")[0] in ("lora_kernels", "peft")]
from peft.tuners.lora import model
assert "lora_kernels" not in sys.modules
model.LoraModel._create_new_module(1)
assert "lora_kernels.peft.enabling" in sys.modules
"""
    ran = entry_world.run(world, code, "1")
    assert ran.returncode == 0, ran.stderr


def test_a_process_without_the_variable_gets_no_finder_and_spends_less_than_a_millisecond(world):
    code = """
import sys, time, typing  # torch has imported typing by then
before, modules = list(sys.meta_path), set(sys.modules)
start = time.process_time()
from lora_kernels_autoload import install
install()
print(time.process_time() - start)
assert sys.meta_path == before and set(sys.modules) - modules <= {"lora_kernels_autoload", "__future__"}
"""
    ran = [entry_world.run(world, code, None) for _ in range(3)]
    assert not any(each.returncode for each in ran), ran[0].stderr
    assert min(float(each.stdout) for each in ran) < 1e-3


def test_a_module_that_is_looked_for_is_found_as_without_the_variable(world):
    code = """
import importlib.util, inspect, sys, torch
finders = len(sys.meta_path)
torch_again = [entry.load()() for entry in torch.entry_points(group="torch.backends")]
assert len(sys.meta_path) == finders
for _ in range(2):
    assert importlib.util.find_spec("peft.tuners.lora.model").origin.endswith("model.py")
import peft
model = sys.modules["peft.tuners.lora.model"]
assert "class LoraModel" in inspect.getsource(model) and type(model.__loader__).__name__ == "SourceFileLoader"
assert importlib.util.find_spec("peft.tuners.lora.none") is None
print(peft.LoraModel._create_new_module(1))
print(importlib.reload(model).LoraModel._create_new_module(2))
"""
    ran = entry_world.run(world, code, "1")
    assert ran.stdout.splitlines() == ["['fused', 1]", "['fused', 2]"], ran.stderr


BROKEN = {
    "the package": ({"lora_kernels_peft_enabling": "raise ImportError('it is broken')"}, "ImportError: it is broken"),
    "another PEFT": (
        {"peft_tuners_lora_model": "class LoraModel:\n    def _create_new_module(*args): return [*args]"},
        "AttributeError: 'function' object has no attribute '__func__'",
    ),
    "a module before torch": (
        {"peft___init__": "import sys, types\nname = 'peft.tuners.lora.model'\n"
         "sys.modules[name] = types.ModuleType(name)\nimport torch\n"
         "class LoraModel:\n    _create_new_module = staticmethod(lambda *args: [*args])"},
        "peft.tuners.lora.model was imported before torch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_warns_with_the_reason_and_leaves_the_layers_to_peft(tmp_path, case):
    changed, reason = BROKEN[case]
    world = entry_world.make(tmp_path / "world", **changed)
    code = f"{MAKE}; peft.LoraModel._create_new_module(2)"
    for options in [(), ("-W", "error")]:  # a program that makes errors of warnings is not stopped
        ran = entry_world.run(world, code, "1", *options)
        assert ran.stdout.strip() == "[1]" and ran.returncode == 0, ran.stderr
        assert ran.stderr.count("LORA_KERNELS=1 has no effect here, and PEFT's own LoRA layers stay") == 1
        assert reason in ran.stderr


def test_a_loader_whose_methods_cannot_be_replaced_is_named(monkeypatch):
    class Fixed:
        __slots__ = ()

        def exec_module(self, module):
            raise NotImplementedError

    class Finder:
        def find_spec(self, name, path=None, target=None):
            return importlib.util.spec_from_loader(name, Fixed())

    monkeypatch.setattr(sys, "meta_path", [object(), Finder()])
    with pytest.warns(RuntimeWarning, match=r"peft.tuners.lora.model cannot be watched \('Fixed' object"):
        assert isinstance(autoload._Finder().find_spec("peft.tuners.lora.model").loader, Fixed)


def test_torch_calls_the_entry_points_of_its_group_when_it_is_imported(monkeypatch):
    import torch

    called = []

    class Entry:
        name = "lora_kernels"

        def load(self):
            return lambda: called.append(self.name)

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry()] if group == "torch.backends" else [])
    torch._import_device_backends()
    assert called == ["lora_kernels"]
