"""Block shortcuts in files of PEFT: every reader computes the same, and training goes on from them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.residual_models import Blocks, adapters, by_formula, fill, made

from lora_kernels import (
    FusedLoRALinear,
    apply_lora,
    apply_reslora,
    load_adapter,
    load_reslora,
    merge_and_unload,
    save_adapter,
    save_reslora,
)

X = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return Blocks().double()


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"rank_pattern": {"blocks.1.q": 5}, "lora_alpha": 7}], ids=str
)
@pytest.mark.parametrize("previous", [0, 1, None])
def test_peft_and_load_adapter_compute_the_same_from_the_file(tmp_path, previous, more):
    peft = pytest.importorskip("peft")
    model = made("bs", previous, **more)
    save_reslora(model, tmp_path)
    y = model(X)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path).double()(X), y, rtol=1e-6, atol=1e-6)
    plain = base()
    report = load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(X), y, rtol=1e-12, atol=1e-12)
    assert type(plain.blocks[2].q) is FusedLoRALinear
    assert max(layer.r for layer in report.layers) == {0: 3, 1: 6, None: 9}[previous] + 2 * ("rank_pattern" in more) * (
        True if previous != 0 else 1
    )


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"blocks.1.q": 5}}], ids=str)
def test_training_goes_on_from_the_file_with_equal_bits(tmp_path, more):
    model = made("bs", None, **more)
    save_reslora(model, tmp_path)
    other = fill(made("bs", None, **more), 9)
    for layer in other.modules():
        if isinstance(layer, FusedLoRALinear):
            layer.scaling = 0.5
    report = load_reslora(other, tmp_path)
    assert torch.equal(other(X), model(X))
    assert all(torch.equal(p, adapters(model)[name]) for name, p in adapters(other).items())
    assert [layer.r for layer in report.layers] == [layer.r for layer in model.modules() if hasattr(layer, "lora_A")]
    assert all(
        a.scaling == b.scaling
        for a, b in zip(model.blocks.modules(), other.blocks.modules(), strict=True)
        if hasattr(a, "lora_A")
    )


def test_the_config_is_that_of_a_plain_lora_of_the_summed_ranks(tmp_path):
    save_reslora(made("bs", 1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 8)
    assert set(config["rank_pattern"]) == {f"blocks.0.{kind}" for kind in ("q", "up", "down")}


def test_a_save_that_fails_leaves_the_old_files(tmp_path):
    model = made("bs")
    save_reslora(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    model.blocks[0].q.lora_A = torch.nn.Parameter(model.blocks[0].q.lora_A.detach().to("meta"))
    with pytest.raises(ValueError, match=r"meta device"):
        save_reslora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def other_settings(tmp_path):
    save_reslora(made("bs", None), tmp_path)
    return made("bs", 1)


def plain_lora(tmp_path):
    model = base()
    apply_lora(model, r=9, lora_alpha=12, exclude_modules=["head"], rank_pattern={r"blocks\.0.*": 3, r"blocks\.1.*": 6})
    save_adapter(fill(model), tmp_path)
    return made("bs", None)


def fewer_layers(tmp_path):
    model = base()
    apply_reslora(model, r=3, target_modules=["q"])
    save_reslora(model, tmp_path)
    return made("bs")


def merged(tmp_path):
    save_reslora(made("bs"), tmp_path)
    model = made("bs")
    model.blocks[1].q.merge()
    return model


def cut_short(tmp_path):
    save_reslora(made("bs"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    return made("bs")


def of_activations(tmp_path):
    save_reslora(made("bs"), tmp_path)
    return made("is")


def without_shortcuts(tmp_path):
    save_reslora(made("bs"), tmp_path)
    return base()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            other_settings,
            r"of blocks\.2\.q should be \(6, 7\) and \(7, 6\) here: another base, rank or number of earlier",
        ),
        (plain_lora, r"factors of blocks\.0\.q have two values, its own and those that blocks\.1\.q computes with"),
        (fewer_layers, r"no lora_A and lora_B for blocks\.0\.down"),
        (merged, r"these layers are merged: blocks\.1\.q"),
        (cut_short, "cut short"),
        (of_activations, r'structure="bs"\), and these layers are not so: blocks\.0\.q \(structure=\'is\'\)'),
        (without_shortcuts, "has no layer with an adapter"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, case, message):
    model = case(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_reslora(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config\.json"):
        load_reslora(made("bs"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("structure", "way_out"), [("bs", r"save_reslora\(model, directory\)"), ("ms", r"reslora_to_lora\(model, inputs\)")]
)
def test_the_functions_for_plain_lora_are_refused_and_name_the_way_out(tmp_path, structure, way_out):
    model = made(structure)
    with pytest.raises(ValueError, match=way_out):
        save_adapter(model, tmp_path)
    plain = base()
    apply_lora(plain, r=3, exclude_modules=["head"])
    save_adapter(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=way_out):
        load_adapter(model, tmp_path / "plain")
    if structure == "ms":
        with pytest.raises(ValueError, match=r"not so: blocks\.0\.q \(structure='ms'\).*reslora_to_lora"):
            save_reslora(model, tmp_path)


def test_a_merged_model_and_the_file_of_it_agree(tmp_path):
    model = made("bs", None)
    want, _, _ = by_formula(model, X, "bs", None)
    save_reslora(model, tmp_path)
    plain = base()
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(merge_and_unload(plain)(X), want, rtol=1e-12, atol=1e-12)


def test_the_scale_becomes_that_of_the_file(tmp_path):
    save_reslora(made("bs", None, lora_alpha=5), tmp_path)
    model = made("bs", None, lora_alpha=2, use_rslora=True)
    load_reslora(model, tmp_path)
    layer = model.blocks[2].q
    assert (layer.lora_alpha, layer.scaling, layer.use_rslora) == (pytest.approx(5), pytest.approx(5 / 3), False)
