"""Wrappers around a model, or around parts of it, change no name: in reports, in rules and in files."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from support import adapter_models
from support.adapter_models import CONFIG, WEIGHTS, adapted, assert_unchanged, edit_weights, run, state
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from lora_kernels import apply_lora, load_adapter, load_loralib, merge_and_unload, save_adapter
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import bare, plain_name, plain_names, plain_rules

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return adapter_models.net()


class DeepSpeedEngine(nn.Module):
    """A wrapper that is known by the name of its class, because its package is not installed here."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class FabricModule(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self._forward_module = self._original_module = module

    def forward(self, x):
        return self._forward_module(x)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "torch.compile": compiled,
    "checkpointing": checkpoint_wrapper,
    "offloaded activations": offload_wrapper,
    "DataParallel": nn.DataParallel,
    "an average": AveragedModel,
    "DeepSpeed": DeepSpeedEngine,
    "Fabric": FabricModule,
    "several": lambda module: nn.DataParallel(checkpoint_wrapper(compiled(checkpoint_wrapper(module)))),
}
LAYERS = ["fc", "inner.fc", "inner.out", "head"]


def wrapped(model: nn.Module, name: str, where: str) -> nn.Module:
    """Return the model with a wrapper around all of it, around a block, or around both."""
    if where != "all":
        model.inner = WRAPPERS[name](model.inner)
    return WRAPPERS[name](model) if where != "a block" else model


@pytest.mark.parametrize("where", ["all", "a block", "both"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_files_of_wrapped_and_plain_models_are_the_same(tmp_path, name, where):
    model = adapted(net(), rank_pattern={"inner.fc": 3}, alpha_pattern={"out": 5})
    want = run(model)
    save_adapter(model, tmp_path / "plain")
    model = wrapped(model, name, where)
    assert list(lora_layers(model)) == LAYERS
    save_adapter(model, tmp_path / "wrapped")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "wrapped" / file).read_bytes()
    for target in (wrapped(net(), name, where), wrapped(adapted(net(), rank_pattern={"inner.fc": 3}), name, where)):
        report = load_adapter(target, tmp_path / "plain")
        assert [layer.name for layer in report.layers] == LAYERS
        torch.testing.assert_close(run(bare(target)), want)


def test_a_distributed_model_is_saved_and_loaded_under_plain_names(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted(net())
        want = run(model)
        model.inner = nn.parallel.DistributedDataParallel(model.inner)
        save_adapter(model, tmp_path)
        for plain in (net(), adapted(net())):
            ddp = nn.parallel.DistributedDataParallel(compiled(plain))
            if lora_layers(plain):
                load_adapter(ddp, tmp_path)
            else:
                with pytest.warns(UserWarning, match="will not reduce the gradients of new adapters"):
                    load_adapter(ddp, tmp_path)
            torch.testing.assert_close(run(plain), want)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
def test_rules_match_the_plain_names(name):
    rules = {"target_modules": r"fc|inner\.(fc|out)", "rank_pattern": {"^inner.out": 3}, "exclude_modules": ["x"]}
    model = wrapped(net(), name, "both")
    report = apply_lora(model, **rules)
    assert [(layer.name, layer.r) for layer in report.layers] == [("fc", 8), ("inner.fc", 8), ("inner.out", 3)]
    assert report.passed_over == {"head": "not in target_modules"} and not report.unused
    assert list(lora_layers(merge_and_unload(model))) == []


def test_a_wrapped_name_matches_too():
    model = net()
    model.inner = compiled(model.inner)
    rules = {"rank_pattern": {"_orig_mod.out": 3}, "exclude_modules": ["inner._orig_mod.fc"]}
    report = apply_lora(model, target_modules=["inner._orig_mod.out", "fc"], **rules)
    assert [(layer.name, layer.r) for layer in report.layers] == [("fc", 8), ("inner.out", 3)] and not report.unused


def test_a_layer_that_is_compiled_on_its_own_is_not_replaced():
    """Its wrapper would go on calling the old layer."""
    model = net()
    model.head = compiled(model.head)
    report = apply_lora(model)
    assert [layer.name for layer in report.layers] == LAYERS[:3]
    assert "apply LoRA, then compile" in report.passed_over["head"]
    model = net()
    model.head = compiled(model.head)
    with pytest.raises(ValueError, match=r"head \(torch\.compile has compiled this layer on its own"):
        apply_lora(model, target_modules=["head"])


def test_a_fused_layer_that_is_compiled_on_its_own_is_not_merged_away():
    model = adapted(net())
    want = run(model)
    model.head = compiled(model.head)
    with pytest.raises(ValueError, match=r"compiled these layers on their own.*: head\. Put"):
        merge_and_unload(model)
    torch.testing.assert_close(run(model), want)
    model.head = model.head._orig_mod
    torch.testing.assert_close(run(merge_and_unload(model)), want)


def test_a_file_of_a_module_around_or_inside_the_model_is_told(tmp_path):
    save_adapter(named("model", adapted(net())), tmp_path / "around")
    save_adapter(adapted(net()), tmp_path / "inside")
    with pytest.raises(ValueError, match="from a module that holds this one as 'model'"):
        load_adapter(adapted(net()), tmp_path / "around")
    with pytest.raises(ValueError, match=r"modules inside 'model' \(a Sequential\)"):
        load_adapter(named("model", adapted(net())), tmp_path / "inside")


def test_the_output_head_of_a_wrapped_model_is_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), checkpoint_wrapper(nn.Linear(4, 8))

        def get_output_embeddings(self):
            return self.head

    assert apply_lora(nn.DataParallel(Model())).passed_over == {"head": "the output head"}


def named(top: str, model: nn.Module) -> nn.Module:
    outer = nn.Module()
    outer.add_module(top, model)
    return outer


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    model = named("module", adapted(net()))
    save_adapter(nn.DataParallel(model), tmp_path)
    assert list(lora_layers(model)) == [f"module.{layer}" for layer in LAYERS]
    target = nn.DataParallel(named("module", net()))
    load_adapter(target, tmp_path)
    torch.testing.assert_close(run(target.module.module), run(model.module))
    theirs = peft.PeftModel.from_pretrained(named("module", net()), tmp_path)
    torch.testing.assert_close(run(theirs.base_model.model.module), run(model.module))


def _old(directory, prefix: str, inner: str, entries: list[str] | str, patterns: dict[str, int]) -> torch.Tensor:
    """Save an adapter, rename its keys as an older version did for a wrapped model, and return the model's output."""
    model = adapted(net(), rank_pattern={"inner.fc": 3})
    save_adapter(model, directory)
    names = {name: f"{inner}{name.removeprefix('inner')}" if name.startswith("inner") else name for name in LAYERS}

    def rename(tensors) -> None:
        for name, new in names.items():
            for part in "AB":
                old = f"base_model.model.{name}.lora_{part}.weight"
                tensors[f"{prefix.format(new)}.lora_{part}.weight"] = tensors.pop(old)

    edit_weights(directory, rename)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"target_modules": entries, "rank_pattern": patterns}))
    return run(model)


OLD = {
    "compiled block": ("base_model.model.{}", "inner._orig_mod", ["fc", "out", "head"], {"inner._orig_mod.fc": 3}),
    "regular expression": (
        "base_model.model.{}", "inner._orig_mod", r"fc|inner\._orig_mod\.(fc|out)|head", {r"^inner\._orig_mod\.fc": 3}
    ),
    "whole names": (
        "base_model.model.{}", "inner._checkpoint_wrapped_module",
        ["fc", "inner._checkpoint_wrapped_module.fc", "inner._checkpoint_wrapped_module.out", "head"],
        {"inner._checkpoint_wrapped_module.fc": 3},
    ),
    "DDP inside": ("base_model.model.module.{}", "inner", [f"module.{n}" for n in LAYERS], {"module.inner.fc": 3}),
    "DDP around PEFT": ("module.base_model.model.{}", "inner", LAYERS, {"inner.fc": 3}),
    "compiled PEFT, FSDP": (
        "_orig_mod.base_model.model._fsdp_wrapped_module.{}", "inner._fsdp_wrapped_module", ["fc", "out", "head"],
        {"inner._fsdp_wrapped_module.fc": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD)
def test_files_with_the_names_of_wrappers_are_loaded(tmp_path, case):
    want = _old(tmp_path, *OLD[case])
    for model in (net(), adapted(net(), rank_pattern={"inner.fc": 3}), checkpoint_wrapper(net())):
        load_adapter(model, tmp_path)
        torch.testing.assert_close(run(model), want)


def test_a_file_with_and_without_the_name_of_a_wrapper_is_refused(tmp_path):
    save_adapter(adapted(net()), tmp_path)
    key = "base_model.model.{}head.lora_A.weight"
    edit_weights(tmp_path, lambda t: t.update({key.format("_orig_mod."): t[key.format("")].clone()}))
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match=r"two values for head\.lora_A"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_loralib_checkpoint_goes_into_a_wrapped_model_and_out_of_one():
    source = adapted(net(), target_modules=["head"], r=2)
    saved = {f"module.{k}": v for k, v in source.state_dict().items() if "lora_" in k or k == "head.bias"}
    for target in (net(), wrapped(net(), "several", "all")):
        load_loralib(target, saved, lora_alpha=8)
        assert torch.equal(run(bare(target)), run(source))


def test_stored_names_are_found_in_the_model():
    names = {"a.module.b", "a.b", "c.module.d", "e"}
    assert plain_name("module.a._orig_mod.b", names) == "a.b"
    assert plain_name("a.module.b", names) == "a.module.b"
    assert plain_name("module.c.module.d._checkpoint_wrapped_module", names) == "c.module.d"
    assert plain_name("module.x", names) == "module.x"
    plain = plain_rules({"a.b"})
    for rule, want in {
        r".*\._orig_mod\.(q|v)": r".*\.(q|v)",
        "module.a": "a",
        "a.module": "a",
        "submodule.a": "submodule.a",
        "x_orig_mod.a": "x_orig_mod.a",
    }.items():
        assert plain(rule) == want
    assert plain_rules(names)("module._orig_mod.a") == "module.a"


def test_every_module_is_yielded_once_and_no_wrapper():
    model = wrapped(net(), "several", "both")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(plain_names(model))
    assert [name for name, _, _ in found] == [name for name, _ in net().named_modules()]
    assert all(model.get_submodule(own) is module for _, own, module in found)
