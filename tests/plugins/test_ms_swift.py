"""The file for ms-swift's ``--external_plugins``, imported by ms-swift's own function, and ms-swift's own models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift.tuners.peft", reason="ms-swift is not installed", exc_type=ImportError)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from support.peft_models import Net, fused_layers
from swift.tuners import LoraConfig, Swift
from swift.utils.utils import import_external_file

import lora_kernels
from lora_kernels.peft import enabling
from lora_kernels.plugins import ms_swift


@pytest.fixture
def as_before(monkeypatch):
    created = LoraModel.__dict__["_create_new_module"]
    monkeypatch.setattr(enabling._FusingFactory, "enabled", None)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    LoraModel._create_new_module = created
    for name in [name for name in sys.modules if name.startswith("_swift_external_")]:
        del sys.modules[name]


def made():
    return Swift.prepare_model(Net(), LoraConfig(r=4, target_modules=["up", "down"], lora_dtype=None))


def test_ms_swift_makes_fused_layers_once_it_has_imported_the_file(as_before):
    assert not fused_layers(made())
    import_external_file(ms_swift.PATH)
    model = made()
    assert len(fused_layers(model)) == 2
    model(torch.randn(3, 24)).sum().backward()
    assert all(each.fused_calls + each.passed_over.total() == 1 for each in fused_layers(model))
    lora_kernels.disable()
    assert not fused_layers(made())


def test_a_worker_of_a_dataloader_is_left_alone(as_before, monkeypatch):
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: "a worker")
    import_external_file(ms_swift.PATH)
    assert enabling._FusingFactory.enabled is None


def test_the_folder_of_the_file_hides_no_other_module():
    """ms-swift puts it first on sys.path."""
    (name,) = {path.stem for path in Path(ms_swift.PATH).parent.glob("*.py")} - {"__init__"}
    assert name.startswith("lora_kernels")


def test_the_module_prints_the_path():
    ran = subprocess.run([sys.executable, "-m", ms_swift.__name__], capture_output=True, text=True)
    assert ran.stdout == ms_swift.PATH + "\n", ran.stderr


def test_an_ms_swift_with_layers_of_its_own_is_refused_with_the_way_out(as_before, monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, "LORA", type("OtherModel", (), {}))
    with pytest.raises(RuntimeError, match=r"ms-swift \S+ has OtherModel for the LoRA layers of .*fuse\(model\)"):
        import_external_file(ms_swift.PATH)
    assert enabling._FusingFactory.enabled is None
