"""The kernel for LLaMA-Factory, applied by LLaMA-Factory's own table of kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "llamafactory.v1.plugins.model_plugins.kernels.interface",
    reason="LLaMA-Factory is not installed",
    exc_type=ImportError,
)
from llamafactory.v1.plugins.model_plugins.kernels import interface
from llamafactory.v1.plugins.model_plugins.kernels.base import BaseKernel
from llamafactory.v1.plugins.model_plugins.kernels.registry import Registry
from support.peft_models import fused_layers, make, run, same

import lora_kernels_autoload as autoload
from lora_kernels.plugins import llamafactory as ours


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setattr(Registry, "_kernels", {})
    monkeypatch.setattr(interface, "default_kernels", Registry._kernels)
    autoload._add_kernel(interface)  # what LORA_KERNELS=1 does once the module has been imported
    ours.add_kernel()
    assert interface.get_default_kernels() == ["lora_kernels"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("lora_kernels", {"include_kernels": None}), ("auto", {"include_kernels": "lora_kernels"}),
     ("auto", {"include_kernels": "auto"})],
)  # fmt: skip
def test_llamafactory_fuses_the_model_by_the_kernels_name(name, kwargs):
    model, plain, x = make(), make(), torch.randn(5, 24)
    assert interface.KernelPlugin(name)(model=model, **kwargs) is model
    assert len(fused_layers(model)) == 2
    same(run(model, x), run(plain, x))


def test_llamafactory_is_told_which_layers_are_fused(monkeypatch):
    said = []
    monkeypatch.setattr(ours, "get_logger", lambda name: SimpleNamespace(info=lambda text: said.append((name, text))))
    interface.apply_kernel("lora_kernels", model=make())
    ((name, text),) = said
    assert name.startswith("llamafactory.") and text.startswith("2 of 2 LoRA layers fused")


def test_a_model_without_lora_layers_and_a_missing_model_are_refused():
    with pytest.raises(RuntimeError, match="found no LoRA layer of PEFT: set peft_config to lora"):
        interface.apply_kernel("lora_kernels", model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"takes model=\.\.\., and got \['models'\]"):
        interface.apply_kernel("lora_kernels", models=1)


def test_the_kernel_is_for_every_kind_of_device():
    assert {"cpu", "cuda", "npu", "xpu"} <= {str(each) for each in ours.LoraKernels.get_device()}
    assert ours.LoraKernels.check_deps()


def test_a_llamafactory_with_another_interface_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(BaseKernel, "apply", classmethod(lambda cls, model: model))
    with pytest.raises(RuntimeError, match=r"BaseKernel.apply takes \(model\), and .* \(kwargs\).*LORA_KERNELS=1"):
        ours.add_kernel()
