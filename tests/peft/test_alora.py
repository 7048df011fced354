"""Activated LoRA through fused layers: the adapter has the tokens from its invocation tokens on, as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from peft import LoraConfig, PeftModel  # noqa: E402
from support.peft_models import fused_layers  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.nn.mixed import mixed  # noqa: E402
from lora_kernels.peft import by_row  # noqa: E402

INVOCATION = [7, 8]
TOKENS = torch.tensor([[1, 2, 7, 8, 3, 4], [7, 8, 1, 2, 7, 8], [1, 7, 2, 8, 3, 4], [5, 6, 9, 7, 8, 1]])
"""Their invocation tokens begin at 2, at 4 (the last time), nowhere, and at 3."""
LENGTHS = [4, 2, 0, 3]
KWARGS = {"target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def make(**kwargs) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_hidden_layers": 2}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0))
    return peft.get_peft_model(
        net, LoraConfig(r=4, lora_alpha=20, alora_invocation_tokens=INVOCATION, **KWARGS, **kwargs), adapter_name="act"
    )


def results(model: PeftModel, tokens: Tensor, **kwargs) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(input_ids=tokens, **kwargs).logits
    logits.square().sum().backward()
    return {"y": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(got) > 2
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_pefts(checkpointing):
    model = make()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    want = results(model, TOKENS)
    lora_kernels.fuse(model, strict=True)
    equal(results(model, TOKENS), want)
    assert all(layer.fused_calls == 1 + checkpointing and not layer.passed_over for layer in fused_layers(model))


def test_the_adapter_sees_the_tokens_from_its_invocation_on_and_no_others(monkeypatch):
    model = make().eval()
    lora_kernels.fuse(model, strict=True)
    seen = []
    multi = lora_kernels.peft.fused.lora_linear_multi
    monkeypatch.setattr(
        lora_kernels.peft.fused,
        "lora_linear_multi",
        lambda x, w, own, rows, **k: (seen.append(rows), multi(x, w, own, rows, **k))[1],
    )
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert len({id(rows) for rows in seen}) == 1 and len(seen) == 6  # made once for all layers
    rows = seen[0]
    want = [6 * j + t for j, length in enumerate(LENGTHS) for t in range(6 - length, 6)]
    assert rows.counts == (len(want),) and rows.order[: len(want)].tolist() == want


def test_where_no_token_is_active_a_and_b_get_zeros_as_in_peft():
    model = make().train()
    want = results(model, TOKENS[2:3])
    lora_kernels.fuse(model, strict=True)
    got = results(model, TOKENS[2:3])
    equal(got, want)
    assert all(not grad.any() for name, grad in got.items() if name != "y")


def test_a_batch_of_activated_and_plain_adapters_has_pefts_values():
    model = make()
    model.add_adapter("plain", LoraConfig(r=3, **KWARGS))
    model.add_adapter("late", LoraConfig(r=5, alora_invocation_tokens=[2], **KWARGS))
    plain = copy.deepcopy(model.eval())
    lora_kernels.fuse(model, strict=True)
    names = ["act", "late", "__base__", "plain"]
    with torch.no_grad():
        got, want = (each(input_ids=TOKENS, adapter_names=names).logits for each in (model, plain))
    torch.testing.assert_close(got, want)
    assert all(layer.fused_calls and not layer.passed_over for layer in fused_layers(model))


def test_generation_has_pefts_tokens():
    model = make().eval()
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    want = model.generate(input_ids=TOKENS, **how)
    lora_kernels.fuse(model, strict=True)
    assert torch.equal(model.generate(input_ids=TOKENS, **how), want)
    assert all(layer.fused_calls >= 6 for layer in fused_layers(model))


def test_files_are_pefts(tmp_path: Path):
    model = make().eval()
    lora_kernels.fuse(model, strict=True)
    model.save_pretrained(tmp_path, selected_adapters=["act"])
    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "act").eval()
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    with torch.no_grad():
        want = loaded(input_ids=TOKENS).logits
        lora_kernels.fuse(loaded, strict=True)
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, want)
        torch.testing.assert_close(model(input_ids=TOKENS).logits, want)


def test_mixed_takes_ids_of_tokens_and_refuses_names_of_samples():
    model = make().train()
    want = results(model, TOKENS)
    lora_kernels.fuse(model, strict=True)
    ids = torch.full_like(TOKENS, -1)
    for j, length in enumerate(LENGTHS):
        ids[j, 6 - length :] = 0
    with mixed(model, ids):
        equal(results(model, TOKENS), want)
    with mixed(model, ["act"] * 4), pytest.raises(RuntimeError, match="an id for each token"):
        model(input_ids=TOKENS)


def test_an_activated_adapter_beside_another_active_one_is_pefts():
    model = make().eval()
    model.add_adapter("plain", LoraConfig(r=3, **KWARGS))
    model.base_model.set_adapter(["act", "plain"])
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    offsets = [4, 2, None, 3]
    with torch.no_grad():
        got, want = (each(input_ids=TOKENS, alora_offsets=offsets).logits for each in (model, plain))
    assert torch.equal(got, want)
    assert all(set(layer.passed_over) == {"an activated LoRA beside others"} for layer in fused_layers(model))


def test_rows_of_offsets_are_clipped_to_the_tokens_that_are_there():
    rows = by_row.rows_of_offsets(("a", "b", "__base__"), (5, None, None), frozenset("a"), 2)
    assert rows.counts == (2, 2) and rows.order.tolist() == [0, 1, 2, 3, 4, 5]
