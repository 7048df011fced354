"""Adapters on disk: PEFT reads ours and we read PEFT's; a file that does not fit changes nothing."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections import OrderedDict

import hypothesis.strategies as hs
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.adapters import load_adapter, load_loralib, save_adapter
from lora_kernels.inject import adapter_parameters, apply_lora, merge_and_unload

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    inner = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), act=nn.Tanh(), out=nn.Linear(8, 6, bias=False)))
    model = nn.Sequential(OrderedDict(fc=nn.Linear(5, 8), norm=nn.LayerNorm(8), inner=inner, head=nn.Linear(6, 4)))
    return model.to(dtype).eval()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def train(model: nn.Module) -> nn.Module:
    """Other than initial values in every adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    return model


def adapted(model: nn.Module, **rules) -> nn.Module:
    apply_lora(model, **rules)
    return train(model)


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        return model(input_ids=torch.randint(32, (2, 6), generator=generator)).logits
    return model(torch.randn(7, 5, generator=generator).to(dtype))


def state(model: nn.Module) -> dict[str, object]:
    """Everything that an attempt to load could change."""
    settings = {
        name: (m.r, m.lora_alpha, m.scaling, m.use_rslora)
        for name, m in model.named_modules()
        if isinstance(m, FusedLoRALinear)
    }
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "kinds": [type(m) for m in model.modules()],
        "settings": settings,
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    torch.testing.assert_close(after.pop("values"), before["values"], rtol=0, atol=0, equal_nan=True)
    assert after == {key: value for key, value in before.items() if key != "values"}


# --- round trips ---

RULES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["head"], "r": 3, "lora_alpha": 7, "use_rslora": True, "lora_dropout": 0.25},
    {"target_modules": r"inner\.fc", "r": 2},
    # the top-level fc only, in a model where another name ends in fc
    {"target_modules": "fc|head", "rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 3.5}},
    {"rank_pattern": {"^fc": 2, "out": 5}, "alpha_pattern": {"head": 1, "fc": 32}, "lora_dropout": 0.5},
    {"rank_pattern": {"inner.fc": 3}, "use_rslora": True},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_reads_ours(tmp_path, rules, dtype):
    base = net(dtype)
    ours = adapted(copy.deepcopy(base), **rules, adapter_dtype=torch.float32)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or surplus keys are a warning in PEFT
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
def test_we_read_pefts(tmp_path, rules, dtype, plain):
    base = net(dtype)
    rules = {"target_modules": ["head", "fc", "out"]} | rules
    theirs = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**rules))).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    if not plain:  # LoRA is there, with another alpha
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


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:  # each rounds its own terms of about 1, over three layers
        torch.testing.assert_close(a, b, rtol=2**-5, atol=2**-4)
    else:
        torch.testing.assert_close(a, b)


def test_a_transformers_model_both_ways(tmp_path):
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


def test_pefts_layers_to_transform(tmp_path):
    base = llama()
    rules = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    theirs = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**rules))).eval()
    theirs.save_pretrained(tmp_path)
    assert [layer.name for layer in load_adapter(base, tmp_path).layers] == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(run(base), run(theirs))


NAMES = hs.lists(hs.sampled_from(["a", "b", "ab", "a_b", "a+b", "0"]), min_size=1, max_size=3).map(tuple)


@settings(deadline=None, max_examples=40)
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


@pytest.mark.parametrize(("base", "file", "want"), [("half", "half", "half"), ("half", "float", "float")])
def test_the_adapters_dtype_in_a_plain_model(tmp_path, base, file, want):
    base, file, want = (getattr(torch, name) for name in (base, file, want))
    save_adapter(adapted(net(torch.float16), adapter_dtype=file), tmp_path)
    model = net(base)
    load_adapter(model, tmp_path)
    assert {p.dtype for p in adapter_parameters(model)} == {want}


def test_a_bf16_adapter_on_an_fp32_base(tmp_path):
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


@pytest.mark.parametrize("fail_at", ["open", "fsync", "copyfile", "replace 1", "replace 2"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_of_saving_leaves_the_old_adapter(tmp_path, monkeypatch, fail_at, error):
    base = net()
    old = adapted(copy.deepcopy(base), r=2)
    save_adapter(old, tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    calls = {"n": 0}
    function, _, count = fail_at.partition(" ")
    module, real = {
        "open": (__import__("lora_kernels.adapter_files").adapter_files, open),
        "fsync": (os, os.fsync),
        "copyfile": (__import__("shutil"), __import__("shutil").copyfile),
        "replace": (os, os.replace),
    }[function]

    def broken(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == int(count or 2 if function != "copyfile" else 1):
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, broken, raising=False)
        with pytest.raises(type(error)):
            save_adapter(adapted(copy.deepcopy(base), r=3), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files
    load_adapter(base, tmp_path)
    assert torch.equal(run(base), run(old))


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


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no FusedLoRALinear"):
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


# --- what does not fit ---


def edit_config(directory, **fields) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(directory, change) -> None:
    tensors = st.load_file(directory / WEIGHTS)
    change(tensors)
    st.save_file(tensors, directory / WEIGHTS)


KEY = "base_model.model.head.lora_A.weight"
OUT = "base_model.model.inner.out.lora_{}.weight"


def drop_out(tensors) -> None:
    for part in "AB":
        del tensors[OUT.format(part)]


def rename_out(tensors) -> None:
    for part in "AB":
        tensors[f"base_model.model.other.lora_{part}.weight"] = tensors.pop(OUT.format(part))


def more(**shapes):
    """Other or additional tensors in the file."""
    return lambda d: edit_weights(d, lambda t: t.update({key: torch.ones(shape) for key, shape in shapes.items()}))


BROKEN = {
    "truncated": (lambda d: os.truncate(d / WEIGHTS, 700), ValueError, "cut short"),
    "truncated header": (lambda d: os.truncate(d / WEIGHTS, 5), ValueError, "cut short"),
    "empty": (lambda d: os.truncate(d / WEIGHTS, 0), ValueError, "cut short"),
    "truncated config": (lambda d: os.truncate(d / CONFIG, 40), ValueError, "cut short or not JSON"),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), ValueError, "peft_type is 'list'"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, "adapter_model.safetensors"),
    "a pickle": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), FileNotFoundError, "is a pickle"),
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, "adapter_config.json"),
    "half": (lambda d: edit_weights(d, lambda t: t.pop(KEY)), ValueError, r"lacks head\.lora_A"),
    "missing": (lambda d: edit_weights(d, drop_out), ValueError, r"no lora_A and lora_B for inner\.out"),
    "surplus": (more(**{KEY.replace("lora_A", "lora_magnitude"): (4,)}), ValueError, r"head\.lora_magnitude"),
    "another base": (lambda d: edit_weights(d, rename_out), ValueError, r"inner\.out; .*no place for other"),
    "not a linear": (
        more(**{f"base_model.model.norm.lora_{p}.weight": (8, 8) for p in "AB"}), ValueError, r"norm \(a LayerNorm"
    ),
    "another width": (more(**{KEY: (8, 7)}), ValueError, r"head\.lora_A \(8, 7\).*\(8, 6\)"),
    "another rank": (more(**{KEY: (4, 6)}), ValueError, r"head\.lora_A \(4, 6\)"),
    "a number": (more(**{KEY: ()}), ValueError, r"head\.lora_A \(\)"),
    "one dimension": (more(**{OUT.format("B"): (6,)}), ValueError, r"lora_B \(6,\)"),
    "three dimensions": (more(**{KEY: (8, 6, 1)}), ValueError, r"\(8, 6, 1\)"),
    "nothing": (lambda d: edit_weights(d, dict.clear), ValueError, "no adapter"),
    "r": (lambda d: edit_config(d, r=4), ValueError, r"fc\.lora_A is \(8, 5\), but r.* is 4"),
    "r of another type": (lambda d: edit_config(d, r="8"), ValueError, "r='8'"),
    "alpha": (lambda d: edit_config(d, lora_alpha=float("nan")), ValueError, "lora_alpha"),
    "alpha_pattern": (lambda d: edit_config(d, alpha_pattern={"fc": "1"}), ValueError, "alpha_pattern"),
    "rank_pattern": (lambda d: edit_config(d, rank_pattern={"(": 1}), ValueError, "no regular expression"),
    "exclude_modules": (lambda d: edit_config(d, exclude_modules="["), ValueError, "no regular expression"),
    "no targets": (lambda d: edit_config(d, target_modules=None), ValueError, "target_modules=None"),
    "peft_type": (lambda d: edit_config(d, peft_type="LOHA"), ValueError, "peft_type is 'LOHA'"),
}  # fmt: skip
UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["head"],
    "fan_in_fan_out": True,
    "trainable_token_indices": [1],
    "target_parameters": ["w"],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
}
BROKEN |= {
    field: ((lambda d, f=field, v=value: edit_config(d, **{f: v})), ValueError, f"not supported: {field}=")
    for field, value in UNSUPPORTED.items()
}
BROKEN |= {
    f"init {init}": ((lambda d, v=init: edit_config(d, init_lora_weights=v)), ValueError, f"init_lora_weights='{init}'")
    for init in ("pissa", "olora", "loftq", "corda", "lora_ga", "of the future")
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, case, plain):
    breaks, error, words = BROKEN[case]
    save_adapter(adapted(net()), tmp_path)
    if case == "no targets" and not plain:
        words = "target_modules"
    breaks(tmp_path)
    model = net() if plain else adapted(net())
    before = state(model)
    with pytest.raises(error, match=words):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@settings(deadline=None, max_examples=60)
@given(at=hs.floats(0, 1, exclude_max=True))
def test_no_part_of_a_file_loads(tmp_path_factory, at):
    directory = tmp_path_factory.mktemp("adapter")
    model = adapted(net())
    save_adapter(model, directory)
    name = WEIGHTS if at < 0.5 else CONFIG
    os.truncate(directory / name, int(2 * (at % 0.5) * (directory / name).stat().st_size))
    before = state(model)
    with pytest.raises(ValueError, match="cut short"):
        load_adapter(model, directory)
    assert_unchanged(model, before)


def test_lora_elsewhere_or_of_another_rank_is_named(tmp_path):
    save_adapter(adapted(net()), tmp_path)
    for rules, words in [
        ({"target_modules": ["head"]}, r"not to get any: fc|no place for fc, inner\.fc, inner\.out"),
        ({"rank_pattern": {"head": 2}}, r"head\.lora_A \(8, 6\) and lora_B \(4, 8\) should be \(2, 6\)"),
    ]:
        model = adapted(net(), **rules)
        before = state(model)
        with pytest.raises(ValueError, match=words):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_a_merged_model_is_refused(tmp_path):
    model = adapted(net())
    save_adapter(model, tmp_path)
    model.fc.merge()
    before = state(model)
    with pytest.raises(ValueError, match=r"merged: fc\. unmerge"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_pefts_adapter_of_what_is_no_linear_is_refused(tmp_path):
    base = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), conv=nn.Conv1d(4, 4, 1)))
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["fc", "conv"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv"):
        load_adapter(base, tmp_path)


def test_pefts_dora_is_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["head"], use_dora=True)
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use_dora=True.*PEFT"):
        load_adapter(net(), tmp_path)


def test_a_field_of_the_future_is_told(tmp_path):
    model = adapted(net())
    save_adapter(model, tmp_path)
    edit_config(tmp_path, use_something=True, something_off=False)
    with pytest.warns(UserWarning, match="not known here, are ignored: use_something$"):
        load_adapter(model, tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    model = adapted(net())
    save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ImportError, match=r"pip install lora_kernels\[adapters\]"):
            call(model, tmp_path)


# --- loralib ---


def loralib_state(model: nn.Module, bias: str = "none") -> dict[str, torch.Tensor]:
    """What loralib.lora_state_dict gives."""
    wanted = {"none": ("lora_",), "all": ("lora_", "bias")}[bias]
    return {key: value.clone() for key, value in model.state_dict().items() if any(w in key for w in wanted)}


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_loralib(tmp_path, from_file, plain):
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
def test_loralib_that_does_not_fit(change, alpha, words):
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
