"""PEFT's ``adapter_names`` through fused layers: W is read once, and every sample has the values that PEFT defines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import PeftModel  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import config, fused_layers, make, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.backends import dispatch  # noqa: E402
from lora_kernels.core.operands import Call  # noqa: E402
from lora_kernels.peft import by_row  # noqa: E402

CALL = Call("forward", torch.device("cpu"), torch.float32, torch.float32, 32, 40, 24, 4, False)
NAMES = ["second", "__base__", "default", "third", "second", "__base__"]


def several(dtype: torch.dtype = torch.float32, **kwargs: Any) -> PeftModel:
    """Return a model of three adapters with ranks, scales and layers of their own."""
    model = make(dtype, lora_dropout=0.1, **kwargs)
    model.add_adapter("second", config(r=2, lora_alpha=5, use_rslora=True, rank_pattern={"down": 7}))
    model.add_adapter("third", config(r=13, target_modules=["up"]))
    randomise(model)
    return model.eval()


def fused_and_plain(model: PeftModel) -> tuple[PeftModel, PeftModel]:
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    return model, plain


@pytest.mark.parametrize("shape", [(6, 24), (6, 1, 24), (6, 5, 24), (6, 2, 3, 24)])
def test_ranks_scales_and_layers_may_differ_by_adapter(shape):
    model, plain = fused_and_plain(several())
    x = torch.randn(shape)
    same(run(model, x, adapter_names=NAMES), run(plain, x, adapter_names=NAMES), 1e-5)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))


def test_an_adapter_with_a_bias_adds_it_to_its_own_samples():
    model = make(lora_bias=True)
    model.add_adapter("second", config(r=2))
    randomise(model)
    for layer in [m for name, m in model.named_modules() if "lora_B" in name and isinstance(m, nn.Linear)]:
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    model, plain = fused_and_plain(model.eval())
    x, names = torch.randn(4, 3, 24), ["second", "default", "__base__", "default"]
    same(run(model, x, adapter_names=names), run(plain, x, adapter_names=names), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_fp32_beside_a_base_in_16_bits(dtype):
    model, plain = fused_and_plain(several(dtype))
    assert {p.dtype for name, p in model.named_parameters() if "lora_A" in name} == {torch.float32}
    x = torch.randn(6, 5, 24).to(dtype)
    got, want = run(model, x, adapter_names=NAMES), run(plain, x, adapter_names=NAMES)
    same(got, want, 4 * torch.finfo(dtype).eps)


def test_adapters_of_two_dtypes_share_a_batch():
    model = several(torch.bfloat16)
    for name, p in model.named_parameters():
        if ".second." in name:
            p.data = p.data.bfloat16()
    model, plain = fused_and_plain(model)
    x = torch.randn(6, 5, 24).bfloat16()
    got, want = run(model, x, adapter_names=NAMES), run(plain, x, adapter_names=NAMES)
    same(got, want, 4 * torch.finfo(torch.bfloat16).eps)
    assert not any(layer.passed_over for layer in fused_layers(model))


def test_autocast_gives_what_peft_gives_under_it():
    model, plain = fused_and_plain(several())
    x = torch.randn(6, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = model(x, adapter_names=NAMES), plain(x, adapter_names=NAMES)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=4 * torch.finfo(torch.bfloat16).eps * want.abs().max().item())


@torch.no_grad()
def test_samples_of_the_base_have_its_bits():
    model = several()
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.up
    x = torch.randn(6, 5, 24)
    y, alone = layer(x, adapter_names=NAMES), layer.base_layer(x)
    for j, name in enumerate(NAMES):
        assert torch.equal(y[j], alone[j]) == (name == "__base__")
    assert torch.equal(layer(x, adapter_names=["__base__"] * 6), alone)


def count_reads_of_w(monkeypatch: pytest.MonkeyPatch, layer: Any) -> list[str]:
    """Return a list that grows by one entry with each product of x and the W of `layer`."""
    reads: list[str] = []
    w, linear = layer.base_layer.weight, F.linear

    def counted(x, weight, *rest):
        if weight.data_ptr() == w.data_ptr():
            reads.append("F.linear")
        return linear(x, weight, *rest)

    monkeypatch.setattr(F, "linear", counted)
    if not dispatch.refusals("cpu", CALL):
        cpu = dispatch.load("cpu")
        for name in ("forward", "forward_multi"):
            if hasattr(cpu, name):
                monkeypatch.setattr(cpu, name, counted_kernel(reads, getattr(cpu, name)))
    return reads


def counted_kernel(reads: list[str], kernel: Any) -> Any:
    def counted(*args):
        before = len(reads)
        result = kernel(*args)
        if len(reads) == before:  # it has not left the product to F.linear
            reads.append("cpu")
        return result

    return counted


@pytest.mark.parametrize("backend", ["eager", None])
@torch.no_grad()
def test_a_mixed_batch_reads_w_once_however_many_adapters_it_has(backend, monkeypatch):
    """PEFT reads W once, and so must we: this holds the ratio of the two times where W is large."""
    model = several()
    lora_kernels.fuse(model, strict=True, backend=backend)
    layer = model.base_model.model.up
    reads = count_reads_of_w(monkeypatch, layer)
    x = torch.randn(6, 5, 24)
    for names in (["__base__"] * 6, ["default"] * 6, NAMES):
        layer(x, adapter_names=names)  # the first call of a kind may time the ways to make the product
        reads.clear()
        layer(x, adapter_names=names)
        assert len(reads) == 1


@pytest.mark.parametrize("net", ["Net", "Net8"])
def test_a_quantised_weight_is_read_once(net, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from support import bnb_models

    model = bnb_models.make(getattr(bnb_models, net)())
    model.add_adapter("second", config(r=2))
    randomise(model)
    lora_kernels.fuse(model.eval(), strict=True)
    layer = model.base_model.model.up
    calls = []
    multi = lora_kernels.peft.fused.lora_linear_multi
    monkeypatch.setattr(
        lora_kernels.peft.fused, "lora_linear_multi", lambda *a, **k: (calls.append(1), multi(*a, **k))[1]
    )
    monkeypatch.setattr(lora_kernels.peft.fused, "lora_linear", None)
    x = torch.randn(4, 3, 64)
    with torch.no_grad():
        y = layer(x, adapter_names=["second", "__base__", "default", "second"])
    assert len(calls) == 1 and not layer.passed_over
    w = layer.read_base(layer)[0].dequantize(torch.float64)
    want = F.linear(x.double(), w, layer.base_layer.bias.double())
    for j, name in ((0, "second"), (2, "default"), (3, "second")):
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        want[j] += layer.scaling[name] * (x[j].double() @ a.t() @ b.t())
    torch.testing.assert_close(y.double(), want.detach(), rtol=1e-4, atol=1e-4)


def test_rows_are_made_once_for_all_layers_and_again_for_other_names(monkeypatch):
    model, plain = fused_and_plain(several())
    made = []
    by_sample = lora_kernels.Rows.by_sample
    monkeypatch.setattr(lora_kernels.Rows, "by_sample", lambda *a: (made.append(a), by_sample(*a))[1])
    by_row.rows_of_names.cache_clear()
    names, x = list(NAMES), torch.randn(6, 5, 24)
    model(x, adapter_names=names)
    assert len(made) == 1
    model(torch.randn(6, 9, 24), adapter_names=list(names))  # neither another list nor another length makes new ones
    assert len(made) == 1
    names[0] = "default"  # the list that was given before, changed
    torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))
    assert len(made) == 2


def test_rows_of_a_forward_in_inference_mode_serve_a_backward_later():
    model, plain = fused_and_plain(several())
    x = torch.randn(6, 5, 24)
    by_row.rows_of_names.cache_clear()
    with torch.inference_mode():
        model(x, adapter_names=NAMES)
    rows = by_row.rows_of_names(tuple(NAMES))
    assert not any(each.order.is_inference() for each in (rows, rows.repeated(5)))
    same(run(model, x, adapter_names=NAMES), run(plain, x, adapter_names=NAMES), 1e-5)


@pytest.mark.slow
@compiles_whole_models
@pytest.mark.filterwarnings("error::UserWarning")  # a compiler warns of a cache that it passes over
def test_a_layer_compiles_whole_with_names():
    model, plain = fused_and_plain(several())
    layer, x = model.base_model.model.up, torch.randn(6, 5, 24)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for names in (NAMES, NAMES[::-1]):
        torch.testing.assert_close(
            compiled(x, adapter_names=names), plain.base_model.model.up(x, adapter_names=names), rtol=1e-5, atol=1e-5
        )


def test_other_adapters_of_the_same_names_are_seen_at_once():
    model, plain = fused_and_plain(several())
    x = torch.randn(6, 5, 24)
    model(x, adapter_names=NAMES)
    for each in (model, plain):
        torch.manual_seed(1)
        each.delete_adapter("second")
        each.add_adapter("second", config(r=5, init_lora_weights=False))
        each.eval()
    torch.testing.assert_close(model(x, adapter_names=NAMES), plain(x, adapter_names=NAMES))


@pytest.mark.parametrize("names", [["nobody"] * 6, NAMES[:5], [*NAMES, "default"]])
def test_unknown_names_and_other_lengths_raise_pefts_errors(names):
    model, plain = fused_and_plain(several())
    errors = []
    for each in (model, plain):
        with pytest.raises(ValueError) as error:
            each(torch.randn(6, 24), adapter_names=names)
        errors.append(str(error.value))
        for layer in each.modules():  # an error leaves PEFT's hooks behind
            layer._forward_pre_hooks.clear()
    assert errors[0] == errors[1]


def test_merged_layers_and_dora_are_refused_as_by_peft():
    model, plain = fused_and_plain(several())
    for each in (model, plain):
        each.merge_adapter(["default"])
        with pytest.raises(ValueError, match="unmerge_adapter"):
            each(torch.randn(6, 24), adapter_names=NAMES)
    dora = make(use_dora=True).eval()
    lora_kernels.fuse(dora)
    with pytest.raises(ValueError, match="DoRA"):
        dora(torch.randn(2, 24), adapter_names=["default", "__base__"])


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **ids, initializer_factor=6.0))


def language_model(net: nn.Module, task: str, targets: list[str]) -> PeftModel:
    kwargs = {"target_modules": targets, "task_type": task, "init_lora_weights": False, "lora_alpha": 32}
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, **kwargs), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=7, **kwargs))
    return model.eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("net", "task", "targets"),
    [(tiny_llama, "CAUSAL_LM", ["q_proj", "up_proj"]), (tiny_t5, "SEQ_2_SEQ_LM", ["q", "v", "wo"])],
)
def test_generation_gives_the_tokens_of_each_adapter_alone(net, task, targets, beams):
    pytest.importorskip("transformers")
    if net is tiny_t5 and peft.__version__.startswith("0.19."):
        pytest.skip("PEFT 0.19 asks transformers for a method that it no longer has")
    torch.manual_seed(0)
    model, plain = fused_and_plain(language_model(net(), task, targets))
    names = ["b", "__base__", "a", "b"]
    tokens = torch.randint(2, 40, (4, 6))
    how = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    got = model.generate(input_ids=tokens, adapter_names=names, **how)
    want = plain.generate(input_ids=tokens, adapter_names=names, **how)
    assert torch.equal(got, want)
    assert not any(layer.passed_over for layer in fused_layers(model))
    model.set_adapter("b")
    alone = model.generate(input_ids=tokens, **how)
    assert torch.equal(got[0], alone[0]) and torch.equal(got[3], alone[3])
    assert any(not torch.equal(got[j], alone[j]) for j in (1, 2))
