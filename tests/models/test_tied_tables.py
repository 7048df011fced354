"""A table that an embedding and an output head share is adapted, saved, loaded and merged without a silent change."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from support.adapter_models import assert_unchanged, run, state, train
from torch import nn

from lora_kernels import adapter_parameters, apply_lora, load_adapter, merge_and_unload, save_adapter
from lora_kernels.models.kinds import lora_layers

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

TABLE, HEAD = "model.embed_tokens", "lm_head"
TIED = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}


def llama(**more) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapted(**rules) -> nn.Module:
    model = llama()
    apply_lora(model, r=3, lora_alpha=6, **(rules or TIED))
    return train(model)


def update(model: nn.Module) -> torch.Tensor:
    layer = lora_layers(model)[TABLE]
    return layer.scaling * (layer.lora_embedding_A.double() @ layer.lora_embedding_B.double().t())


# --- adapters of their own ---


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_merge_that_would_part_the_table_from_the_head_is_refused(target):
    model = adapted(target_modules=[target])
    before, want = state(model), run(model)
    with pytest.raises(ValueError, match=r"shares its weight with .*untie=True.*ensure_weight_tying"):
        merge_and_unload(model)
    assert_unchanged(model, before)
    torch.testing.assert_close(run(model), want)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("merged", [False, True])
def test_untie_merges_one_of_the_two_and_the_saved_model_computes_the_same(tmp_path, target, merged):
    model = adapted(target_modules=[target])
    want, base = run(model), llama().lm_head.weight
    if merged:
        next(iter(lora_layers(model).values())).merge()
        with pytest.raises(ValueError, match="shares its weight"):
            merge_and_unload(model)
    merge_and_unload(model, untie=True)
    other = model.lm_head if target == "embed_tokens" else model.model.embed_tokens
    assert torch.equal(other.weight, base) and model.config.tie_word_embeddings is False
    torch.testing.assert_close(run(model), want)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again), want)


def test_a_quantised_head_is_parted_from_its_table_too():
    model = llama()
    apply_lora(model, target_modules=["lm_head"], quant="int8")
    want = run(train(model))
    with pytest.raises(ValueError, match="lm_head shares its weight with the other end"):
        merge_and_unload(model)
    merge_and_unload(model, untie=True)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(run(model), want, rtol=1e-3, atol=1e-4)


def test_a_model_that_computes_otherwise_without_the_tie_stays_tied(tmp_path):
    config = transformers.UMT5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=True,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.UMT5ForConditionalGeneration(config).eval()
    plain, ids = copy.deepcopy(model), torch.arange(1, 7)[None]
    apply_lora(model, target_modules=["shared"], ensure_weight_tying=True)
    want = train(model)(input_ids=ids, labels=ids).loss
    names = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert list(lora_layers(model)) == names and len(list(adapter_parameters(model))) == 2
    model.lm_head.scaling *= 2  # now the two updates differ
    with pytest.raises(ValueError, match="shares its weight"):
        merge_and_unload(model)
    if "tie_word_embeddings" in inspect.unwrap(type(model).forward).__code__.co_names:  # not from transformers 5.24 on
        with pytest.raises(ValueError, match="forward of UMT5ForConditionalGeneration computes something else"):
            merge_and_unload(model, untie=True)
    model.lm_head.scaling /= 2
    save_adapter(model, tmp_path)
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(input_ids=ids, labels=ids).loss, want, rtol=0, atol=0)
    assert len(list(adapter_parameters(again))) == 2
    other = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(other(input_ids=ids, labels=ids).loss, want)
    merge_and_unload(model)
    assert len({id(model.get_submodule(name).weight) for name in names}) == 1
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, want)


def test_untie_leaves_a_tie_that_no_adapter_touches():
    model = adapted(target_modules=["q_proj"])
    merge_and_unload(model, untie=True)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_linear_layer_of_another_model_merges_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    apply_lora(model, target_modules=["0"])
    merge_and_unload(train(model))
    assert model[0].weight is not model[1].weight


# --- one adapter for both ---


def test_a_tied_adapter_is_one_update_of_table_and_head():
    model = adapted()
    table, head = (lora_layers(model)[name] for name in (TABLE, HEAD))
    assert head.lora_B is table.lora_embedding_A and head.lora_embedding_B is table.lora_embedding_B
    assert len(list(adapter_parameters(model))) == 4  # two of q_proj and two of the table
    plain = llama().double()
    plain.lm_head.weight.data += update(model)
    plain.model.layers[0].self_attn.q_proj.weight.data += (
        model.model.layers[0].self_attn.q_proj.scaling
        * (model.model.layers[0].self_attn.q_proj.lora_B @ model.model.layers[0].self_attn.q_proj.lora_A).double()
    )
    torch.testing.assert_close(run(model).double(), run(plain), rtol=1e-4, atol=1e-5)


def test_the_gradients_are_the_sums_of_those_of_table_and_head():
    model = adapted().double()
    layer = lora_layers(model)[TABLE]
    run(model).square().sum().backward()
    got = layer.lora_embedding_A.grad, layer.lora_embedding_B.grad
    plain = llama().double()
    q = model.model.layers[0].self_attn.q_proj
    plain.model.layers[0].self_attn.q_proj.weight.data += q.scaling * (q.lora_B @ q.lora_A).detach()
    plain.lm_head.weight.data += update(model).detach()
    run(plain).square().sum().backward()
    dw = plain.lm_head.weight.grad * layer.scaling
    a, b = layer.lora_embedding_A.detach(), layer.lora_embedding_B.detach()
    torch.testing.assert_close(got, (dw @ b, dw.t() @ a), rtol=1e-6, atol=1e-9)


def test_peft_and_we_read_each_others_tied_adapters(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, lora_alpha=6, **TIED))
    train(theirs).eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for model in (llama(), adapted()):
        load_adapter(model, tmp_path / "theirs")
        torch.testing.assert_close(run(model), run(theirs))
        assert lora_layers(model)[HEAD].lora_B is lora_layers(model)[TABLE].lora_embedding_A
    ours = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(ours, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(other), run(ours))
    again = llama()
    load_adapter(again, tmp_path / "ours")
    torch.testing.assert_close(run(again), run(ours), rtol=0, atol=0)


def test_the_tables_that_peft_saves_beside_the_adapter_must_be_the_models(tmp_path):
    theirs = train(peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["embed_tokens"]))).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(run(model), run(theirs))
    other = llama()
    other.lm_head.weight.data += 1
    with pytest.raises(ValueError, match=r"base_layer\.weight.*save_embedding_layers=False"):
        load_adapter(other, tmp_path)


def test_a_file_with_two_values_for_a_tied_adapter_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    path = Path(tmp_path / "adapter_model.safetensors")
    tensors = st.load_file(path)
    st.save_file({key: t + ("lm_head" in key) for key, t in tensors.items()}, path)
    for model in (llama(), adapted()):
        before = state(model)
        with pytest.raises(ValueError, match="one parameter in this model, and two different values"):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_tied_adapters_merge_into_one_table(tmp_path):
    model = adapted()
    want = run(model)
    merge_and_unload(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    torch.testing.assert_close(run(model), want)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again), want)


def test_tied_adapters_that_differ_in_the_padding_row_merge_only_apart():
    model = llama(pad_token_id=0)
    apply_lora(model, **TIED)
    train(model)
    want = run(model)
    with pytest.raises(ValueError, match="shares its weight"):
        merge_and_unload(model)
    merge_and_unload(model, untie=True)
    torch.testing.assert_close(run(model), want)


def test_a_copy_of_a_tied_model_is_tied_in_itself():
    model = adapted()
    other = copy.deepcopy(model)
    table, head = (lora_layers(other)[name] for name in (TABLE, HEAD))
    assert head.lora_B is table.lora_embedding_A is not lora_layers(model)[TABLE].lora_embedding_A
    other.load_state_dict(llama().state_dict(), strict=True)  # a plain checkpoint leaves the adapter as it is
    torch.testing.assert_close(run(other), run(model))


def test_what_has_no_tied_weights_is_told():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="no layer of the model has the embedding's weight"):
        apply_lora(model, ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="neither the embedding nor a layer"):
        apply_lora(llama(), target_modules=["q_proj"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="r or lora_alpha differs"):
        apply_lora(llama(), **TIED, rank_pattern={"lm_head": 2})
    with pytest.raises(ValueError, match=r"lm_head cannot have the adapter of model\.embed_tokens with use_dora"):
        apply_lora(llama(), **TIED, use_dora=True)
