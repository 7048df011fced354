"""An adapter file that does not fit the model raises an error that names the fault, and changes nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import hypothesis.strategies as hs
import pytest
import torch
from hypothesis import given, settings
from support.adapter_models import CONFIG, WEIGHTS, adapted, assert_unchanged, edit_config, edit_weights, net, state

from lora_kernels import FusedLoRALinear
from lora_kernels.models.adapters import load_adapter, save_adapter

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")

KEY = "base_model.model.head.lora_A.weight"
OUT = "base_model.model.inner.out.lora_{}.weight"


def drop_out(tensors) -> None:
    for part in "AB":
        del tensors[OUT.format(part)]


def rename_out(tensors) -> None:
    for part in "AB":
        tensors[f"base_model.model.other.lora_{part}.weight"] = tensors.pop(OUT.format(part))


def more(**shapes):
    """Return a function that adds tensors of ones to the file in a directory, or replaces its tensors by them."""
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
    "weights of the base": (
        more(**{"base_model.model.head.base_layer.weight": (4, 6)}), ValueError, r"save_embedding_layers=False"
    ),
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
    "target_parameters": (lambda d: edit_config(d, target_parameters="w"), ValueError, "target_parameters='w'"),
    "peft_type": (lambda d: edit_config(d, peft_type="LOHA"), ValueError, "peft_type is 'LOHA'"),
}  # fmt: skip
UNSUPPORTED = {
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"samples": 4},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
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
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(tmp_path, case, plain):
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
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path_factory, at):
    directory = tmp_path_factory.mktemp("adapter")
    model = adapted(net())
    save_adapter(model, directory)
    name = WEIGHTS if at < 0.5 else CONFIG
    os.truncate(directory / name, int(2 * (at % 0.5) * (directory / name).stat().st_size))
    before = state(model)
    with pytest.raises(ValueError, match="cut short"):
        load_adapter(model, directory)
    assert_unchanged(model, before)


def test_layers_elsewhere_or_of_another_rank_are_named(tmp_path):
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


def test_an_unknown_field_is_refused_unless_it_is_off(tmp_path):
    save_adapter(adapted(net()), tmp_path)
    edit_config(tmp_path, something_off=False, nothing=None, empty={}, zero=0, runtime_config={"a": 1})
    load_adapter(net(), tmp_path)
    edit_config(tmp_path, use_something={"x": 1})
    with pytest.raises(ValueError, match=r"not known here.*use_something=\{'x': 1\}\. Load it with a PEFT that knows"):
        load_adapter(net(), tmp_path)


def test_without_safetensors_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    model = adapted(net())
    save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ImportError, match=r"pip install lora_kernels\[adapters\]"):
            call(model, tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("lora_alpha", odd) for odd in (float("nan"), float("inf"), "4", None, True, torch.tensor(3.0))],
        *[("lora_dropout", odd) for odd in (1.0, -0.1, float("nan"), torch.tensor(0.1))],
    ],
)
def test_settings_that_no_reader_takes_are_not_saved(tmp_path, setting, value):
    model = adapted(net())
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    layer = next(each for each in model.modules() if isinstance(each, FusedLoRALinear))
    setattr(layer, setting, value)
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match=f"{setting}.*nothing was saved"):
            save_adapter(model, directory)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_whose_name_is_a_path_is_saved(tmp_path):
    model = adapted(net())
    model.name_or_path = Path("/models/base")
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "/models/base"
