"""`register` fuses the layers of one config; `enable`, `disable` and the environment agree about all the others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft.tuners.lora import LoraModel  # noqa: E402
from peft.tuners.lora.layer import Linear  # noqa: E402
from support.peft_models import Net, config, fused_layers, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import enabling  # noqa: E402


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    created = LoraModel.__dict__["_create_new_module"]
    monkeypatch.setattr(enabling._FusingFactory, "enabled", None)
    yield
    LoraModel._create_new_module = created


def made(of: peft.LoraConfig) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), of)
    randomise(model)
    return model


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"target_modules": ["up", "emb"], "use_rslora": True}])
def test_a_registered_config_has_the_values_and_gradients_of_pefts_own_layers(kwargs):
    plain, fused = made(config(**kwargs)), made(lora_kernels.register(config(**kwargs)))
    assert len(fused_layers(fused)) + ("emb" in str(kwargs)) == 2 and not fused_layers(plain)
    x = torch.randn(5, 24)
    same(run(fused, x), run(plain, x))
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(fused))


def test_register_returns_the_config_and_changes_nothing_else():
    own = config()
    before, created = own.to_dict(), LoraModel.__dict__["_create_new_module"]
    assert lora_kernels.register(own) is own and lora_kernels.register(own) is own
    assert own.to_dict() == before and LoraModel.__dict__["_create_new_module"] is created
    assert not fused_layers(made(config()))
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert len(fused_layers(made(again))) == 2


def test_a_config_from_a_folder_is_registered_by_itself(tmp_path):
    model = made(lora_kernels.register(config()))
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    base = copy.deepcopy(made(config()).unload())
    assert not fused_layers(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    read = lora_kernels.register(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, config=read)
    assert len(fused_layers(loaded)) == 2 and torch.equal(loaded(x), model.eval()(x))


def test_the_users_own_layers_keep_their_place_in_pefts_table():
    class Special(torch.nn.Linear):
        pass

    class SpecialLora(Linear):
        pass

    for ours_first in (True, False):
        net, own = Net(), config()
        net.up = Special(24, 40)
        if ours_first:
            lora_kernels.register(own)
        own._register_custom_module({Special: SpecialLora})
        if not ours_first:
            lora_kernels.register(own)
        model = peft.get_peft_model(net, own)
        assert type(model.base_model.model.up) is SpecialLora and len(fused_layers(model)) == 1
        assert set(own._custom_modules) == {Special, torch.nn.Module}


@pytest.mark.parametrize("other", [None, "LoHaConfig", "VeraConfig", "AdaLoraConfig"])
def test_what_is_no_lora_config_is_refused_by_name(other):
    given = None
    if other is not None:
        more = {"total_step": 10} if other == "AdaLoraConfig" else {}
        given = getattr(peft, other)(target_modules=["up"], **more)
    with pytest.raises(TypeError, match=f"takes a LoraConfig of PEFT, and this is a {type(given).__name__}. .*fuse"):
        lora_kernels.register(given)


def test_a_registered_config_is_fused_whatever_enable_and_disable_say():
    lora_kernels.enable()
    assert len(fused_layers(made(lora_kernels.register(config())))) == 2
    lora_kernels.disable()
    assert len(fused_layers(made(lora_kernels.register(config())))) == 2 and not fused_layers(made(config()))


def test_threads_that_enable_at_once_put_one_factory_in_place():
    before = LoraModel.__dict__["_create_new_module"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: lora_kernels.enable(), range(64)))
    assert LoraModel.__dict__["_create_new_module"].__func__.before is before
    lora_kernels.disable()
    lora_kernels.disable()
    assert LoraModel.__dict__["_create_new_module"] is before


def test_the_environment_fuses_until_disable_is_called():
    layers = [each for each in made(config()).modules() if type(each) is Linear]
    lora_kernels.disable()
    assert type(enabling.made_by_environment(layers[0])) is Linear
    enabling._FusingFactory.enabled = None
    assert fused_layers(torch.nn.ModuleList([enabling.made_by_environment(each) for each in layers])) == layers
    other = torch.nn.Identity()
    assert enabling.made_by_environment(other) is other and type(other) is torch.nn.Identity
