"""Adapters on disk: PEFT and this package load each other's, loralib's load, and saving is all or nothing."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import threading
import warnings

import hypothesis.strategies as hs
import pytest
import torch
from hypothesis import example, given, settings
from support.adapter_models import CONFIG, WEIGHTS, adapted, assert_unchanged, close, llama, net, run, state, train
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.models.adapters import load_adapter, save_adapter
from lora_kernels.models.inject import adapter_parameters, apply_lora, merge_and_unload
from lora_kernels.models.loralib import load_loralib

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")

# --- round trips ---

RULES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["head"], "r": 3, "lora_alpha": 7, "use_rslora": True, "lora_dropout": 0.25},
    {"target_modules": r"inner\.fc", "r": 2},
    # "^fc" means the top-level fc only, in a model where another name ends in fc too
    {"target_modules": "fc|head", "rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 3.5}},
    {"rank_pattern": {"^fc": 2, "out": 5}, "alpha_pattern": {"head": 1, "fc": 32}, "lora_dropout": 0.5},
    {"rank_pattern": {"inner.fc": 3}, "use_rslora": True},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_the_adapters_that_are_saved_here(tmp_path, rules, dtype):
    base = net(dtype)
    ours = adapted(copy.deepcopy(base), **rules, adapter_dtype=torch.float32)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and of surplus keys
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    own = {n: m for n, m in ours.named_modules() if isinstance(m, FusedLoRALinear)}
    assert set(layers) == set(own)
    for name, layer in own.items():
        assert layers[name].scaling["default"] == layer.scaling
        assert torch.equal(layers[name].lora_A["default"].weight, layer.lora_A)
        assert torch.equal(layers[name].lora_B["default"].weight, layer.lora_B)
    config = theirs.peft_config["default"]
    assert config.lora_dropout == rules.get("lora_dropout", 0.0) and config.use_rslora == rules.get("use_rslora", False)
    close(run(ours, dtype), run(theirs, dtype), dtype)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False])
def test_the_adapters_that_peft_saves_are_loaded_here(tmp_path, rules, dtype, plain):
    base = net(dtype)
    rules = {"target_modules": ["head", "fc", "out"]} | rules
    theirs = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**rules))).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    if not plain:  # the model has LoRA already, with another alpha
        apply_lora(ours, **rules | {"lora_alpha": 100, "alpha_pattern": {}}, adapter_dtype=torch.float32)
        kept = list(adapter_parameters(ours))
    report = load_adapter(ours, tmp_path)
    close(run(ours, dtype), run(theirs, dtype), dtype)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(ours)) and not ours.training
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        f"{layer.name}.lora_{part}" for layer in report.layers for part in "AB"
    }
    if plain:
        layers = [m for m in ours.modules() if isinstance(m, FusedLoRALinear)]
        assert {layer.lora_dropout for layer in layers} == {rules.get("lora_dropout", 0.0)}
    else:  # an optimizer's parameters are still the model's
        assert all(a is b for a, b in zip(kept, adapter_parameters(ours), strict=True))


def test_a_transformers_models_adapter_goes_to_peft_and_back(tmp_path):
    base = llama()
    ours = adapted(copy.deepcopy(base), rank_pattern={"q_proj": 2}, exclude_modules=["down_proj"])
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(run(theirs), run(ours))
    theirs.save_pretrained(tmp_path / "b")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "b")
    assert torch.equal(run(again), run(ours))
    auto = json.loads((tmp_path / "a" / CONFIG).read_text())["auto_mapping"]
    assert auto == json.loads((tmp_path / "b" / CONFIG).read_text())["auto_mapping"]


def test_layers_to_transform_in_a_config_of_peft_is_followed(tmp_path):
    base = llama()
    rules = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    theirs = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**rules))).eval()
    theirs.save_pretrained(tmp_path)
    assert [layer.name for layer in load_adapter(base, tmp_path).layers] == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(run(base), run(theirs))


NAMES = hs.lists(hs.sampled_from(["a", "b", "ab", "a_b", "a+b", "0"]), min_size=1, max_size=3).map(tuple)


@settings(deadline=None, max_examples=40)
@example(chosen={("a",): (True, 1, 1), ("0",): (True, 2, 1), ("a", "0"): (True, 3, 1)})  # "0.fc" sorts before "a.0.fc"
@given(
    chosen=hs.dictionaries(
        NAMES, hs.tuples(hs.booleans(), hs.integers(1, 3), hs.integers(1, 3)), min_size=2, max_size=5
    )
)
def test_whatever_the_names_the_config_means_each_layer_and_no_other(tmp_path_factory, chosen):
    root = nn.Module()
    for path in chosen:
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module("fc", nn.Linear(2, 2))
    names = {".".join((*path, "fc")): value for path, value in chosen.items()}
    wanted = {name: (r, alpha) for name, (wanted, r, alpha) in names.items() if wanted}
    if not wanted:
        wanted = dict.fromkeys(list(names)[:1], (1, 1))
    bare = copy.deepcopy(root)
    for name, (r, alpha) in wanted.items():
        parent, _, child = name.rpartition(".")
        layer = FusedLoRALinear.from_linear(root.get_submodule(name), r=r, lora_alpha=alpha)
        root.get_submodule(parent).add_module(child, layer)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(root.requires_grad_(False), directory)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), directory)
    got = {
        n.removeprefix("base_model.model."): (m.r["default"], m.lora_alpha["default"])
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    assert got == wanted
    assert {x.name: (x.r, x.lora_alpha) for x in load_adapter(bare, directory).layers} == wanted


@pytest.mark.parametrize("file", [torch.float16, torch.float32])
def test_a_plain_model_in_16_bits_gets_adapters_in_fp32_whatever_the_files_dtype_is(tmp_path, file):
    source = adapted(net(torch.float16), adapter_dtype=file)
    save_adapter(source, tmp_path)
    model = net(torch.float16)
    load_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(torch.float16), tmp_path)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert {p.dtype for n, p in theirs.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.equal(model.head.lora_A, source.head.lora_A.float())


def test_a_bf16_adapter_becomes_fp32_on_an_fp32_base(tmp_path):
    source = adapted(net(torch.bfloat16))
    save_adapter(source, tmp_path)
    model = net()
    load_adapter(model, tmp_path)
    assert torch.equal(model.head.lora_A, source.head.lora_A.float()) and model.head.lora_A.dtype == torch.float32


def test_merged_switched_off_and_wrapped_models_are_saved_whole(tmp_path):
    base = net()
    model = adapted(copy.deepcopy(base))
    want = run(model)
    model.head.merge()
    model.fc.scaling = 0.0
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        save_adapter(nn.parallel.DistributedDataParallel(model), tmp_path / "ddp")
    finally:
        torch.distributed.destroy_process_group()
    for directory in tmp_path.iterdir():
        target = copy.deepcopy(base)
        load_adapter(torch.compile(target, backend="eager"), directory)
        torch.testing.assert_close(run(target), want)


# --- saving ---


def test_saving_leaves_two_files_readable_by_others_and_creates_the_directory(tmp_path):
    directory = tmp_path / "a" / "b"
    for _ in range(2):
        save_adapter(adapted(net()), directory)
        assert sorted(os.listdir(directory)) == [CONFIG, WEIGHTS]
    plain = tmp_path / "plain"
    plain.touch()
    assert (directory / WEIGHTS).stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("fail_at", ["fsync 1", "fsync 2", "replace 1", "replace 2"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_of_saving_leaves_the_old_adapter(tmp_path, monkeypatch, fail_at, error):
    base = net()
    old = adapted(copy.deepcopy(base), r=2)
    save_adapter(old, tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    calls = {"n": 0}
    function, _, count = fail_at.partition(" ")
    real = getattr(os, function)

    def broken(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == int(count):
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, broken)
        with pytest.raises(type(error)):
            save_adapter(adapted(copy.deepcopy(base), r=3), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files
    load_adapter(base, tmp_path)
    assert torch.equal(run(base), run(old))


def test_what_is_loaded_is_of_one_save_while_threads_save(tmp_path):
    """Each saver has a rank and an alpha of its own, so that files of two saves do not fit together."""
    base = net()
    models = {r: adapted(copy.deepcopy(base), r=r, lora_alpha=10 * r) for r in (1, 2, 3)}
    want = {r: run(model) for r, model in models.items()}
    save_adapter(models[1], tmp_path)
    threads = [
        threading.Thread(target=lambda m=m: [save_adapter(m, tmp_path) for _ in range(12)]) for m in models.values()
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        model = copy.deepcopy(base)
        rank = load_adapter(model, tmp_path).layers[0].r
        assert torch.equal(run(model), want[rank])
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_save_that_was_killed_between_its_files_is_finished_by_the_next_load(tmp_path):
    base = net()
    save_adapter(adapted(copy.deepcopy(base), r=2), tmp_path)
    new = adapted(copy.deepcopy(base), r=2, lora_alpha=100)

    def die() -> None:
        real = os.replace

        def replace(source, target):
            if str(target).endswith(CONFIG):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replace
        save_adapter(new, tmp_path)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert len(os.listdir(tmp_path)) == 3
    load_adapter(base, tmp_path)
    assert torch.equal(run(base), run(new)) and sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    real = os.replace

    def broken(source, target):
        if str(target).endswith(CONFIG):
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no"):
        save_adapter(adapted(net()), tmp_path)
    assert os.listdir(tmp_path) == []


def test_models_that_cannot_be_saved_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer with an adapter"):
        save_adapter(net(), tmp_path / "x")
    with pytest.raises(ValueError, match="a name"):
        save_adapter(FusedLoRALinear(2, 2), tmp_path / "x")
    model = adapted(net(), use_rslora=True)
    model.head.use_rslora = False
    with pytest.raises(ValueError, match=r"use_rslora.*\(fc, inner\.fc, inner\.out\)"):
        save_adapter(model, tmp_path / "x")
    model = adapted(net())
    model.head.lora_more = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"head\.lora_more"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_trained_parameters_that_are_not_saved_are_named(tmp_path):
    model = adapted(net(), target_modules=["out"])
    model.head.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved: head\.weight, head\.bias"):
        save_adapter(model, tmp_path)


# --- loralib ---


def loralib_state(model: nn.Module, bias: str = "none") -> dict[str, torch.Tensor]:
    """Return the dictionary that loralib.lora_state_dict would return."""
    wanted = {"none": ("lora_",), "all": ("lora_", "bias")}[bias]
    return {key: value.clone() for key, value in model.state_dict().items() if any(w in key for w in wanted)}


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_a_loralib_checkpoint_loads_with_its_biases(tmp_path, from_file, plain):
    base = net()
    rules = {"target_modules": "fc|inner.out", "r": 3, "lora_alpha": 5, "rank_pattern": {"out": 2}}
    source = adapted(copy.deepcopy(base), **rules)
    with torch.no_grad():
        source.norm.bias.fill_(0.5)
    checkpoint = loralib_state(source, "all")
    if from_file:
        st.save_file(checkpoint, tmp_path / "x.safetensors")
        checkpoint = tmp_path / "x.safetensors"
    if plain:
        report = load_loralib(base, checkpoint, lora_alpha=5)
        assert [layer.name for layer in report.layers] == ["fc", "inner.out"]
    else:
        apply_lora(base, **rules)
        load_loralib(base, checkpoint)
    assert torch.equal(run(base), run(source))
    load_loralib(base, loralib_state(source), lora_alpha=0)
    torch.testing.assert_close(run(base), run(merge_and_unload(base)))
    assert len(loralib_state(source)) == 4


@pytest.mark.parametrize(
    ("change", "alpha", "words"),
    [
        ({}, None, "pass it"),
        ({}, float("inf"), "inf"),
        ({"fc.lora_A": torch.ones(3, 9)}, 1, r"fc\.lora_A \(3, 9\)"),
        ({"fc.lora_A": torch.ones(6, 5)}, 1, "MergedLinear"),
        ({"norm.lora_A": torch.ones(1, 8), "norm.lora_B": torch.ones(8, 1)}, 1, r"norm \(a LayerNorm"),
        ({"gone.lora_A": torch.ones(1, 8), "gone.lora_B": torch.ones(8, 1)}, 1, "no place for gone"),
        ({"head.weight": torch.ones(4, 6)}, 1, r"no lora_A or lora_B: head\.weight"),
        ({"head.bias": torch.ones(5)}, 1, r"another shape: head\.bias"),
        ({"gone.bias": torch.ones(5)}, 1, r"no such bias.*gone\.bias"),
    ],
)
def test_a_loralib_checkpoint_that_does_not_fit_changes_nothing(change, alpha, words):
    checkpoint = loralib_state(adapted(net(), target_modules=["fc", "out"], r=3)) | change
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match=words):
        load_loralib(model, checkpoint, lora_alpha=alpha)
    assert_unchanged(model, before)


def test_a_pickle_is_not_opened(tmp_path):
    torch.save(loralib_state(adapted(net())), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"is a pickle.*weights_only"):
        load_loralib(net(), tmp_path / "x.pt", lora_alpha=1)
