"""DoRA on disk: PEFT and this package load each other's, and a magnitude that does not fit is named."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.adapter_models import (
    adapted,
    assert_unchanged,
    close,
    edit_config,
    edit_weights,
    llama,
    net,
    run,
    state,
    train,
)

from lora_kernels import FusedLoRALinear
from lora_kernels.models.adapters import load_adapter, save_adapter
from lora_kernels.models.inject import adapter_parameters, apply_lora, merge_and_unload
from lora_kernels.models.loralib import load_loralib

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")

RULES = [
    {"target_modules": ["head", "fc", "out"]},
    {"target_modules": "fc|head", "r": 3, "rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 3.5}},
    {"target_modules": ["head"], "use_rslora": True, "lora_dropout": 0.25},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_the_adapters_that_are_saved_here(tmp_path, rules, dtype):
    base = net(dtype)
    ours = adapted(copy.deepcopy(base), **rules, use_dora=True, adapter_dtype=torch.float32)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and of surplus keys
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert theirs.peft_config["default"].use_dora
    for name, layer in ours.named_modules():
        if isinstance(layer, FusedLoRALinear):
            magnitude = theirs.get_submodule(f"base_model.model.{name}").lora_magnitude_vector["default"].weight
            assert torch.equal(magnitude, layer.lora_magnitude_vector)
    close(run(ours, dtype), run(theirs, dtype), dtype)
    if dtype == torch.float32:
        close(run(merge_and_unload(ours)), run(theirs.merge_and_unload()), dtype)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False])
def test_the_adapters_that_peft_saves_are_loaded_here(tmp_path, rules, dtype, plain):
    base = net(dtype)
    theirs = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**rules, use_dora=True))).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    if not plain:  # the model has DoRA already, with another alpha, and a run has filled its cache of norms
        changed = {"lora_alpha": 100, "alpha_pattern": {}, "use_dora": True}
        apply_lora(ours, **rules | changed, adapter_dtype=torch.float32)
        run(ours, dtype)
        kept = list(adapter_parameters(ours))
    report = load_adapter(ours, tmp_path)
    close(run(ours, dtype), run(theirs, dtype), dtype)
    assert all(layer.use_dora for layer in report.layers) and str(report).count("  DoRA") == len(report.layers)
    assert len(list(adapter_parameters(ours))) == 3 * len(report.layers)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(ours))
    if not plain:  # an optimizer's parameters are still the model's
        assert all(a is b for a, b in zip(kept, adapter_parameters(ours), strict=True))


def test_a_transformers_models_adapter_goes_to_peft_and_back(tmp_path):
    base = llama()
    ours = adapted(copy.deepcopy(base), rank_pattern={"q_proj": 2}, exclude_modules=["down_proj"], use_dora=True)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(run(theirs), run(ours))
    theirs.save_pretrained(tmp_path / "b")
    files = [st.load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[1][key], files[0][key]) for key in files[0])
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "b")
    assert torch.equal(run(again), run(ours))


def test_an_fp32_magnitude_beside_a_bf16_weight_stays_fp32(tmp_path):
    save_adapter(adapted(net(torch.bfloat16), use_dora=True, adapter_dtype=torch.bfloat16), tmp_path)
    edit_weights(tmp_path, lambda t: t.update({MAGNITUDE.format("head"): torch.full((4,), 1 / 3)}))
    model = net(torch.bfloat16)
    load_adapter(model, tmp_path)
    assert torch.equal(model.head.lora_magnitude_vector, torch.full((4,), 1 / 3))
    assert {p.dtype for p in model.fc.parameters() if p.requires_grad} == {torch.float32}


def test_merged_and_switched_off_layers_are_saved_whole(tmp_path):
    base = net()
    model = adapted(copy.deepcopy(base), use_dora=True)
    want = run(model)
    model.head.merge()
    model.fc.scaling = 0.0
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(run(base), want)
    before = state(model)
    with pytest.raises(ValueError, match=r"merged: head\. unmerge"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    model.head.unmerge()
    load_adapter(model, tmp_path)
    assert torch.equal(run(model), run(base))


# --- what does not fit ---

MAGNITUDE = "base_model.model.{}.lora_magnitude_vector"


def magnitude(name, *shape):
    return lambda d: edit_weights(d, lambda t: t.update({MAGNITUDE.format(name): torch.ones(shape)}))


BROKEN = {
    "missing": (lambda d: edit_weights(d, lambda t: t.pop(MAGNITUDE.format("head"))), r"lacks head\.lora_magnitude_v"),
    "of no layer": (magnitude("norm", 8), r"lacks norm\.lora_A, norm\.lora_B"),
    "too long": (magnitude("head", 5), r"head\.lora_magnitude_vector \(5,\).* \(4, 8\)"),
    "a convolution's": (magnitude("head", 1, 4, 1, 1), r"head\.lora_magnitude_vector \(1, 4, 1, 1\)"),
    "with a weight": (
        lambda d: edit_weights(d, lambda t: t.update({MAGNITUDE.format("fc") + ".weight": torch.ones(8)})),
        r"two values for fc\.lora_magnitude_vector",
    ),
    "not in the config": (
        lambda d: edit_config(d, use_dora=False),
        r"has fc\.lora_magnitude_vector, .*use_dora in adapter_config\.json is false",
    ),
    "only in the config": (
        lambda d: edit_weights(d, lambda t: [t.pop(key) for key in list(t) if "magnitude" in key]),
        r"lacks fc\.lora_magnitude_vector, head\.lora_magnitude_vector",
    ),
    "no truth value": (lambda d: edit_config(d, use_dora="yes"), "use_dora='yes'"),
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(tmp_path, case, plain):
    breaks, words = BROKEN[case]
    save_adapter(adapted(net(), use_dora=True), tmp_path)
    breaks(tmp_path)
    model = net() if plain else adapted(net(), use_dora=True)
    before = state(model)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (True, r"is of DoRA.* no fc\.lora_magnitude_vector, .*use_dora=True"),
        (False, r"is of plain LoRA.* no fc\.lora_magnitude_vector, .*use_dora=False"),
    ],
)
def test_dora_and_plain_lora_do_not_mix(tmp_path, file, words):
    save_adapter(adapted(net(), use_dora=file), tmp_path)
    model = adapted(net(), use_dora=not file)
    before = state(model)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_some_layers_with_dora_cannot_be_saved(tmp_path):
    model = adapted(net(), target_modules=["fc", "out"])
    model.head = FusedLoRALinear.from_linear(model.head, use_dora=True)
    with pytest.raises(ValueError, match=r"some layers have use_dora \(head\)"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_loralib_checkpoint_and_dora_do_not_mix():
    dora, plain = adapted(net(), use_dora=True), adapted(net())
    states = [{k: v for k, v in model.state_dict().items() if "lora_" in k} for model in (dora, plain)]
    for model, checkpoint, words in (
        (net(), states[0], r"no lora_A or lora_B: fc\.lora_magnitude_vector"),
        (dora, states[1], r"is of plain LoRA.* no fc\.lora_magnitude_vector"),
    ):
        before = state(model)
        with pytest.raises(ValueError, match=words):
            load_loralib(model, checkpoint, lora_alpha=1)
        assert_unchanged(model, before)
