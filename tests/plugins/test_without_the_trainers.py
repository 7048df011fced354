"""What the plug-ins say where a trainer is not installed or has changed, with no trainer at hand."""

from __future__ import annotations

import importlib
import sys

import pytest

pytest.importorskip("peft", reason="PEFT is not installed")

from lora_kernels.plugins import check, ms_swift


class Owner:
    def known(self, cfg, model): ...


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("axolotl", "this plug-in is for axolotl, which cannot be imported here"),
        (
            "llamafactory",
            "LLaMA-Factory's version 1, which cannot be imported here .*LORA_KERNELS=1 in the environment",
        ),
    ],
)
def test_a_plug_in_without_its_trainer_says_whose_it_is(name, said, monkeypatch):
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lora_kernels.plugins.{name}", raising=False)
    with pytest.raises(ImportError, match=said):
        importlib.import_module(f"lora_kernels.plugins.{name}")


def test_the_file_for_ms_swift_exists_and_calls_install(monkeypatch):
    called = []
    monkeypatch.setattr(ms_swift, "install", lambda: called.append(True))
    with open(ms_swift.PATH) as file:
        exec(compile(file.read(), ms_swift.PATH, "exec"), {})
    assert called == [True]


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"known": "self cfg"}, r"in a trainer 1.0, Owner.known takes \(self cfg model\), and .* knows \(self cfg\)"),
        ({"none": "self"}, r"Owner.none takes \(nothing\).*LORA_KERNELS=1 in the environment"),
    ],
)
def test_another_interface_is_named_with_the_way_out(methods, said):
    check(Owner, {"known": "self cfg model"}, "a trainer 1.0")
    with pytest.raises(RuntimeError, match=said):
        check(Owner, methods, "a trainer 1.0")
