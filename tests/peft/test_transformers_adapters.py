"""Adapters that transformers itself adds and loads: `fuse` afterwards, or `enable` before, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from packaging.version import Version  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support.peft_models import fused_layers, randomise  # noqa: E402
from support.tiny_llama import VOCABULARY, llama, lora  # noqa: E402

import lora_kernels  # noqa: E402

_NEEDED = transformers.integrations.peft.MIN_PEFT_VERSION
pytestmark = pytest.mark.skipif(
    Version(peft.__version__) < Version(_NEEDED), reason=f"this transformers needs PEFT {_NEEDED} for its own adapters"
)
IDS = torch.arange(4, 24).view(2, 10) % VOCABULARY


@pytest.fixture
def enabled() -> Iterator[None]:
    lora_kernels.enable()
    yield
    lora_kernels.disable()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two adapters that differ in their scaling, beside the folder of the model that they name."""
    llama().save_pretrained(tmp_path / "base")
    for alpha in (8, 20):
        torch.manual_seed(alpha)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        wrapped = peft.get_peft_model(model, lora(lora_alpha=alpha, target_modules=["q_proj", "down_proj"]))
        randomise(wrapped)
        wrapped.save_pretrained(tmp_path / str(alpha))
    return [tmp_path / "8", tmp_path / "20"]


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **kwargs).logits


def wanted(folder: Path) -> torch.Tensor:
    """Return the logits of PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    return logits(peft.PeftModel.from_pretrained(base, folder))


def all_fused(model: nn.Module) -> None:
    layers = fused_layers(model)
    assert len(layers) == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()) > 0
    assert all(layer.fused_calls and not layer.passed_over for layer in layers)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_an_adapter_that_transformers_adds_trains_and_saves_as_pefts(tmp_path):
    model = llama()
    torch.manual_seed(1)
    model.add_adapter(lora(init_lora_weights=False))
    plain = copy.deepcopy(model)
    assert not lora_kernels.fuse(model, strict=True).not_fused
    got, want = step(model), step(plain)
    assert got.keys() == want.keys() and len(got) == 28
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    all_fused(model)
    for each, name in ((model, "fused"), (plain, "plain")):
        each.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fused", "plain")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())


def test_adapters_are_switched_off_set_and_deleted_as_in_transformers():
    model = llama()
    base = logits(model)
    model.add_adapter(lora(init_lora_weights=False), "first")
    lora_kernels.fuse(model, strict=True)
    model.add_adapter(lora(init_lora_weights=False, r=7), "second")  # into layers that are fused already
    plain = copy.deepcopy(model)
    lora_kernels.unfuse(plain)
    for names in ("first", "second", ["first", "second"]):
        for each in (model, plain):
            each.set_adapter(names)
        torch.testing.assert_close(logits(model), logits(plain))
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    for each in (model, plain):
        each.delete_adapter("second")
        each.set_adapter("first")
    torch.testing.assert_close(logits(model), logits(plain))
    all_fused(model)


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "the adapter's folder": transformers.AutoModelForCausalLM.from_pretrained,
    "AutoPeftModel": peft.AutoPeftModelForCausalLM.from_pretrained,
    "low memory": lambda folder: peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base"), folder, low_cpu_mem_usage=True
    ),
}


@pytest.mark.parametrize("how", LOADERS)
def test_layers_of_every_loader_are_fused(enabled, folders, how):
    model = LOADERS[how](folders[0])
    torch.testing.assert_close(logits(model), wanted(folders[0]))
    all_fused(model)


def test_loaded_adapters_are_swapped_in_place_as_in_transformers(enabled, folders):
    """transformers puts the other adapter's A and B into the layers, and leaves their scaling."""
    found = []
    for fused in (True, False):
        if not fused:
            lora_kernels.disable()
        model = llama()
        model.enable_peft_hotswap(target_rank=4)
        found.append([])
        for folder in (*folders, folders[0]):
            model.load_adapter(folder, adapter_name="default")
            found[-1].append(logits(model))
        model.load_adapter(folders[1], adapter_name="other")
        found[-1].append(logits(model))
        if fused:
            all_fused(model)
    torch.testing.assert_close(*found)
    first, second, again, other = found[0]
    assert torch.equal(first, again) and not torch.allclose(first, second)
    torch.testing.assert_close(other, wanted(folders[1]))


def test_generation_gives_the_tokens_of_peft(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[0])
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS[:, :4], **kwargs)
    lora_kernels.fuse(model, strict=True)
    assert torch.equal(model.generate(IDS[:, :4], **kwargs), want)
    all_fused(model)


@pytest.mark.slow
def test_the_trainer_trains_an_adapter_that_transformers_added(tmp_path, enabled):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": IDS[i % 2], "labels": IDS[i % 2]}

    losses = []
    for fused in (True, False):
        if not fused:
            lora_kernels.disable()
        model = llama()
        torch.manual_seed(1)
        model.add_adapter(lora(init_lora_weights=False))
        args = transformers.TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no", seed=0
        )
        losses.append(transformers.Trainer(model, args, train_dataset=Rows()).train().training_loss)
        assert len(fused_layers(model)) == (14 if fused else 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
