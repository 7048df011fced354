"""The plug-in for axolotl, called by axolotl's own plug-in manager and beside its own schema of settings."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed", exc_type=ImportError)
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities
from support.peft_models import fused_layers, make, run, same

import lora_kernels
from lora_kernels.plugins import axolotl as ours

NAME = "lora_kernels.plugins.axolotl.LoraKernelsPlugin"
KERNELS = ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"]


@pytest.fixture
def manager(monkeypatch):
    """Axolotl's manager with our plug-in, loaded by its name as axolotl loads it."""
    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", type(manager.plugins)())
    manager.register(NAME)
    assert list(manager.plugins) == [NAME]
    return manager


def settings(**kwargs) -> DictDefault:
    return DictDefault({"adapter": "lora", "base_model": "tiny", "plugins": [NAME]} | kwargs)


def test_axolotl_fuses_the_model_that_it_has_loaded(manager, caplog):
    caplog.set_level(logging.INFO, logger="axolotl.lora_kernels")
    model, plain, x = make(), make(), torch.randn(5, 24)
    manager.post_model_load(settings(), model)
    assert len(fused_layers(model)) == 2 and "2 of 2 LoRA layers fused" in caplog.text
    same(run(model, x), run(plain, x))
    caplog.clear()
    manager.post_train(settings(), model)
    assert "after training: 2 of 2 LoRA layers fused" in caplog.text


def test_axolotls_own_kernels_stay_off_where_it_would_switch_them_on(manager):
    alone = AxolotlConfigWCapabilities.check_auto_enable_lora_kernels(dict(settings()))
    assert [alone[name] for name in KERNELS] == [True] * 4
    cfg = settings()
    manager.plugins[NAME].register(cfg)
    cfg = AxolotlConfigWCapabilities.check_auto_enable_lora_kernels(dict(cfg))
    assert [cfg[name] for name in KERNELS] == [False] * 4
    manager.plugins[NAME].register(DictDefault(cfg))  # a worker of Ray registers the plug-in again


@pytest.mark.parametrize("name", KERNELS)
def test_a_config_that_asks_for_them_is_refused(manager, name):
    with pytest.raises(ValueError, match=f"{name} of this config and lora_kernels exclude each other"):
        manager.plugins[NAME].register(settings(**{name: True}))


def test_its_settings_are_axolotls_and_reach_fuse(manager, monkeypatch):
    _, config = merge_input_args()
    assert {"lora_kernels_strict", "lora_kernels_group"} <= set(config.model_fields)
    asked = []
    monkeypatch.setattr(ours, "fuse", lambda model, **kwargs: asked.append(kwargs))
    for strict, group in ((None, None), (True, False), (False, True)):
        manager.post_model_load(settings(lora_kernels_strict=strict, lora_kernels_group=group), make())
        assert asked.pop() == {"strict": bool(strict), "group": bool(group)}
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="found no LoRA layer of PEFT"):
        ours.LoraKernelsPlugin().post_model_load(settings(lora_kernels_strict=True), torch.nn.Linear(2, 2))


def test_a_config_without_an_adapter_warns(manager, caplog):
    manager.post_model_load(settings(adapter=None), torch.nn.Linear(2, 2))
    assert "nothing to fuse: this config has no adapter" in caplog.text


def test_an_axolotl_with_other_hooks_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(BasePlugin, "post_model_load", lambda self, model: None)
    said = r"axolotl \S+, BasePlugin.post_model_load takes \(self model\), and .* \(self cfg model\).*LORA_KERNELS=1"
    with pytest.raises(RuntimeError, match=said):
        ours.LoraKernelsPlugin()
    assert lora_kernels.plugins.axolotl is ours
