"""Files of adapters that PEFT has initialised from data (EVA, CorDA) give the outputs of PEFT's model, or are refused
where their base is not the model's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lora_kernels import load_adapter, save_adapter

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:.*(changes the base weights|will be ignored):UserWarning")

TARGETS = ["0", "2", "4"]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def train(tuned: nn.Module) -> None:
    """Move A and B from their first values, as a training does."""
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)


def set_field(directory, **fields) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """Batches in a subspace of three dimensions, so that EVA gives the first layer few of its ranks."""
    mixing = torch.randn(3, 24)
    return [torch.randn(16, 3) @ mixing for _ in range(8)]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_an_eva_file_with_redistributed_ranks_gives_pefts_outputs(adjust, use_rslora, inputs, tmp_path):
    base = model()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=use_rslora,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, adjust_scaling_factors=adjust),
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    peft.initialize_lora_eva_weights(
        theirs,
        inputs,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
        show_progress_bar=False,
    )
    train(theirs)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] == "eva" and len(saved["rank_pattern"]) >= 2
    assert bool(saved["alpha_pattern"]) == adjust
    ours, x = copy.deepcopy(base), inputs[0]
    report = load_adapter(ours, tmp_path)
    ranks = {layer.name: layer.r for layer in report.layers}
    assert ranks["0"] == 3 and sum(ranks.values()) <= 12
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert (ours(x) - base(x)).abs().max() > 0.1
    save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-5, atol=1e-6)


def corda(base: nn.Module, inputs: list[torch.Tensor], method: str) -> nn.Module:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    tuned = copy.deepcopy(base)

    @torch.no_grad()
    def run() -> None:
        for x in inputs:
            tuned(x)

    preprocess_corda(tuned, config, run_model=run)
    return peft.get_peft_model(tuned, config)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_a_corda_file_loads_where_its_base_is_the_models(method, inputs, tmp_path):
    """The file as it is needs the base that CorDA has changed; converted, it has twice the rank over the original."""
    base, x = model(), inputs[0]
    theirs = corda(base, inputs, method)
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT asks for before the first values are saved
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = "corda"
    train(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    wanted = theirs(x)

    ours = copy.deepcopy(base)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"'corda'.* path_initial_model_for_weight_conversion.* twice the rank"):
        load_adapter(ours, tmp_path / "raw")
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    report = load_adapter(ours, tmp_path / "plain")
    assert {layer.r for layer in report.layers} == {6}
    torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-5)

    changed = copy.deepcopy(theirs).unload()  # the base that CorDA has left
    assert not torch.equal(changed[0].weight, base[0].weight)
    set_field(tmp_path / "raw", init_lora_weights=True)
    load_adapter(changed, tmp_path / "raw")
    torch.testing.assert_close(changed(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_of_the_other_splits_load_once_they_are_plain(init, inputs, tmp_path):
    base, x = model(), inputs[0]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = init
    train(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*Load it with PEFT"):
        load_adapter(copy.deepcopy(base), tmp_path / "raw")
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "plain")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_files_of_first_values_that_leave_w_load_as_they_are(init, inputs, tmp_path):
    base, x = model(), inputs[0]
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init)
    )
    train(theirs)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
