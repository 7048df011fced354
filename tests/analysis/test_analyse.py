"""`analyse` finds the same in every kind of layer, live or on disk, and what it finds is that of ΔW itself."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from support.adapter_models import edit_config, net, train
from support.kind_models import KIND_MODELS, KindModel
from support.residual_models import made
from torch import Tensor, nn

from lora_kernels import apply_lora, load_adapter, save_adapter
from lora_kernels.analysis import amplification, analyse, intruder_dimensions, plots, subspace_similarity
from lora_kernels.analysis.findings import LayerReport
from lora_kernels.analysis.report import Report
from lora_kernels.train import restart

peft = pytest.importorskip("peft")
st = pytest.importorskip("safetensors.torch")


def adapted(model: nn.Module, seed: int = 0, **rules) -> nn.Module:
    torch.manual_seed(seed)
    apply_lora(model, **{"r": 2, "lora_alpha": 3} | rules)
    return train(model)


def saved(model: nn.Module, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, directory)
    return directory


def weight_of(model: nn.Module, layer: LayerReport) -> Tensor:
    """Return the plain weight [N, K] that a layer of a report speaks of."""
    name, _, expert = layer.name.partition("[")
    if expert:
        return model.get_parameter(name)[int(expert[:-1])]
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight
    transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    return module.weight.T if transposed else module.weight.flatten(1)


def numbers(report: Report) -> list[tuple]:
    return [
        (layer.name, layer.kind, layer.shape, layer.r, layer.rank, *layer.singular_values, layer.effective_rank)
        for layer in sorted(report.layers, key=lambda layer: layer.name)
    ]


def assert_same(one: Report, other: Report) -> None:
    for mine, theirs in zip(numbers(one), numbers(other), strict=True):
        assert mine[:5] == theirs[:5]
        assert mine[5:] == pytest.approx(theirs[5:], rel=1e-9)


@pytest.fixture(params=KIND_MODELS)
def kind(request: pytest.FixtureRequest) -> KindModel:
    return KIND_MODELS[request.param]


def test_every_kind_of_layer_is_measured_as_its_merged_weight_says(kind, tmp_path):
    model = adapted(kind.plain().double(), **kind.rules)
    report = analyse(model)
    assert not report.without_weight and report.base == "its own base"
    plain, merged = kind.plain().double(), kind.plain().double()
    load_adapter(merged, saved(model, tmp_path))
    for name in kind.adapted:
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, merged.get_submodule(name).to_plain())
    for layer in report.layers:
        w, delta = weight_of(plain, layer), weight_of(merged, layer) - weight_of(plain, layer)
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        assert layer.shape == tuple(w.shape) and layer.rank == layer.r
        assert layer.singular_values == pytest.approx(s[: layer.r].tolist(), rel=1e-7)
        assert layer.norm == pytest.approx(delta.norm().item(), rel=1e-7)
        assert layer.relative_norm == pytest.approx((delta.norm() / w.norm()).item(), rel=1e-7)
        core = u[:, : layer.r].T @ w @ vt[: layer.r].T
        assert layer.amplification.factor == pytest.approx((delta.norm() / core.norm()).item(), rel=1e-6)
        _, values, directions = torch.linalg.svd(w, full_matrices=False)
        assert layer.amplification.projected_top == pytest.approx(values[: layer.r].norm().item())
        shared = (directions[: layer.r] @ vt[: layer.r].T).square().sum().item() / layer.r
        assert layer.phi_weight == pytest.approx(shared, rel=1e-6)


def test_files_and_models_of_peft_give_the_same(kind, tmp_path):
    from support.peft_experts import BEFORE_20

    if BEFORE_20 and "target_parameters" in kind.rules:
        pytest.skip(f"PEFT {peft.__version__} cannot load adapters into the experts of the latest transformers")
    model = adapted(kind.plain(), **kind.rules)
    directory = saved(model, tmp_path)
    report = analyse(model)
    assert_same(report, analyse(directory))
    theirs = peft.PeftModel.from_pretrained(kind.plain(), directory)
    assert_same(report, analyse(theirs))
    if "target_parameters" not in kind.rules:
        from_files = analyse(directory, base=kind.plain())
        for mine, other in zip(report.layers, analyse(theirs).layers, strict=True):
            named = next(layer for layer in from_files if layer.name == mine.name)
            assert mine.amplification.factor == pytest.approx(other.amplification.factor, rel=1e-4)
            assert mine.amplification.factor == pytest.approx(named.amplification.factor, rel=1e-4)


def llama(seed: int, **rules) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=11, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(9)
    return adapted(transformers.LlamaForCausalLM(config).eval(), seed, **rules)


def test_two_adapters_of_different_rank_are_compared_layer_by_layer(tmp_path):
    one, two = llama(1, r=3, target_modules=["q_proj", "v_proj"]), llama(2, r=5, target_modules=["q_proj", "o_proj"])
    report = analyse(one, saved(two, tmp_path), base=False)
    layer = report.layers[0]
    name = "model.layers.0.self_attn.q_proj"
    pairs = [(m.get_submodule(name).lora_A, m.get_submodule(name).lora_B) for m in (one, two)]
    phi = subspace_similarity(*pairs)
    assert layer.name == name and (layer.module, layer.block) == ("self_attn.q_proj", "model.layers.0")
    torch.testing.assert_close(torch.tensor(layer.comparison.phi, dtype=torch.float64), phi, rtol=0, atol=1e-12)
    assert layer.comparison.at_rank == pytest.approx(phi[2, 4].item())
    assert layer.comparison.first == pytest.approx(phi[0, 0].item())
    assert layer.comparison.mean == pytest.approx(phi.mean().item())
    assert layer.comparison.random == 5 / 16
    assert layer.comparison.mean_random == pytest.approx(49 / 15 / 16)  # Σ max(i, j) = 49
    deltas = [(b.double() @ a.double()).flatten() for a, b in pairs]
    assert layer.comparison.cosine == pytest.approx(torch.cosine_similarity(*deltas, dim=0).item(), abs=1e-9)
    assert report.layers[1].comparison is None and len(report.only_here) == len(report.only_there) == 11
    assert report.only_here[0].endswith("v_proj") and report.only_there[0].endswith("o_proj")
    text = report.table()
    assert "Only in the LlamaForCausalLM: model.layers.0.self_attn.v_proj" in text and f"Beside {tmp_path}" in text


def test_layers_of_files_come_in_the_order_of_their_numbers(tmp_path):
    report = analyse(saved(llama(1, target_modules=["q_proj"]), tmp_path))
    assert [layer.block for layer in report.layers] == [f"model.layers.{i}" for i in range(11)]


def test_the_weight_is_read_from_files_of_the_base(tmp_path):
    model = llama(1, target_modules=["q_proj", "down_proj"])
    directory = saved(model, tmp_path / "adapter")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(9)
    plain = transformers.LlamaForCausalLM(model.config)
    plain.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    plain.model.save_pretrained(tmp_path / "inner")  # whose names have no "model." in front
    want = analyse(model)
    for base in (tmp_path / "base", tmp_path / "inner", plain, plain.model):
        got = analyse(directory, base=base)
        assert [layer.amplification for layer in got] == [layer.amplification for layer in sorted_like(want, got)]


def sorted_like(report: Report, other: Report) -> list[LayerReport]:
    named = {layer.name: layer for layer in report.layers}
    return [named[layer.name] for layer in other.layers]


def test_a_weight_that_is_stored_transposed_is_found_by_the_config_where_it_is_square(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    adapted(model, target_modules=["attn.c_proj"])
    got = analyse(saved(model, tmp_path / "adapter"), base=tmp_path / "base")
    assert got.layers[0].shape == (8, 8)
    assert got.layers[0].amplification.factor == pytest.approx(analyse(model).layers[0].amplification.factor, rel=1e-5)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantised_layers_are_measured_over_what_they_compute_with(format):
    model = adapted(nn.Sequential(nn.Linear(64, 48)), target_modules=["0"], quant=format)
    layer = analyse(model).layers[0]
    own = model[0]
    w = own.frozen_weight().dequantize(torch.float64)
    want = amplification(w, own.lora_A, own.lora_B, own.scaling)
    assert layer.amplification.factor == pytest.approx(want.factor, rel=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_bitsandbytes_has_quantised_is_read_from_its_file(nested, tmp_path):
    pytest.importorskip("bitsandbytes")
    from support.bnb_models import Net, Net8, make

    for net_of in (lambda: Net(compress_statistics=nested), Net8):
        model = make(net_of())
        model.save_pretrained(tmp_path / "adapter")
        base = model.get_base_model()
        state = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora_" not in k}
        st.save_file({k: v for k, v in state.items() if isinstance(v, Tensor)}, tmp_path / "model.safetensors")
        live, got = analyse(model), analyse(tmp_path / "adapter", base=tmp_path / "model.safetensors")
        assert len(got.layers) == 2
        for mine, theirs in zip(sorted_like(live, got), got.layers, strict=True):
            assert mine.amplification.factor == pytest.approx(theirs.amplification.factor, rel=1e-5)


def test_a_checkpoint_of_loralib_needs_its_alpha(tmp_path):
    torch.manual_seed(0)
    state = {"fc.lora_A": torch.randn(2, 5), "fc.lora_B": torch.randn(8, 2), "fc.bias": torch.randn(8)}
    st.save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="does not hold lora_alpha"):
        analyse(tmp_path / "lora.safetensors")
    for source in (tmp_path / "lora.safetensors", state):
        report = analyse(source, lora_alpha=3, base=net())
        layer = report.layers[0]
        assert layer.scale == 1.5 and layer.amplification.factor > 0
        assert layer.norm == pytest.approx((1.5 * state["fc.lora_B"].double() @ state["fc.lora_A"].double()).norm())
        assert [note.partition(" holds ")[2] for note in report.notes] == [
            "more than low-rank updates, which is not looked at: fc.bias"
        ]


def test_one_of_several_adapters_is_chosen_by_name():
    config = peft.LoraConfig(r=2, target_modules=["out"])
    model = peft.get_peft_model(net(), config)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["out"]))
    train(model)
    with pytest.raises(ValueError, match="several adapters: choose one of default, other"):
        analyse(model)
    with pytest.raises(KeyError, match="no adapter is called 'third'"):
        analyse(model, adapter_name="third")
    report = analyse(model, model, adapter_name="default", other_name="other")
    assert (report.layers[0].r, len(report.layers[0].comparison.phi[0])) == (2, 3)
    assert report.adapter == "the PeftModel, adapter 'default'"


def test_dora_is_measured_by_its_direction():
    plain = adapted(net(), target_modules=["out"])
    dora = adapted(net(), target_modules=["out"], use_dora=True)
    with torch.no_grad():
        for key in ("lora_A", "lora_B"):
            getattr(dora.inner.out, key).copy_(getattr(plain.inner.out, key))
    report = analyse(dora)
    assert report.layers[0].dora and report.layers[0].norm == analyse(plain).layers[0].norm
    assert "with DoRA" in report.notes[-1]


def test_the_padding_row_of_an_embedding_has_no_update():
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2))
    adapted(model, target_modules=["0"])
    layer = model[0]
    delta = layer.to_plain().weight.double() - layer.weight.double()
    assert layer.lora_embedding_A[2].abs().sum() > 0 and delta[2].abs().sum() == 0
    assert analyse(model).layers[0].norm == pytest.approx(delta.norm().item(), rel=1e-6)


def test_names_that_would_move_the_cursor_are_shown_as_text():
    state = {"a\x1b[2J.lora_A": torch.ones(1, 3), "a\x1b[2J.lora_B": torch.ones(2, 1)}
    report = analyse(state, state, lora_alpha=1)
    assert "\x1b" not in str(report) and "a" in str(report)


def test_what_an_initialisation_took_out_of_the_base_is_said(tmp_path):
    model = adapted(net(), target_modules=["out"], init="pissa")
    assert "started with init 'pissa'" in analyse(model).notes[0]
    directory = saved(adapted(net(), target_modules=["out"]), tmp_path)
    edit_config(directory, init_lora_weights="pissa_niter_4")
    assert "started with init 'pissa_niter_4'" in analyse(directory).notes[0]


def test_what_a_restart_has_left_is_said(tmp_path):
    restart(model := adapted(net(), target_modules=["out"]))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["out"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="base weights have changed"):
        restart(theirs)
    theirs.save_pretrained(tmp_path)
    for source in (model, theirs, tmp_path):
        assert "restarted (ReLoRA): its ΔW is that of the last cycle" in analyse(source).notes[0]


@pytest.mark.parametrize("structure", ["bs", "is", "ms"])
def test_shortcuts_between_blocks_are_counted_or_said_to_be_left_out(structure):
    model = made(structure)
    report = analyse(model)
    (layer,) = [layer for layer in report.layers if layer.name == "blocks.2.q"]
    plain = model.blocks[2].q
    if structure == "bs":
        assert layer.r == 6 and not report.notes
        assert layer.norm == pytest.approx((plain.to_linear().weight - plain.weight).norm().item(), rel=1e-6)
    else:
        assert layer.r == 3 and "without these shortcuts" in report.notes[0]
        assert layer.norm == pytest.approx((plain.scaling * plain.lora_B @ plain.lora_A).norm().item(), rel=1e-6)


def test_merged_layers_and_foreign_bases_are_named_and_not_measured():
    model = adapted(net(), target_modules=["fc", "inner.out"])
    report = analyse(model, base=nn.Sequential(nn.Linear(3, 3)).add_module("fc", nn.Linear(5, 8)) or model)
    assert not report.without_weight
    other = net()
    other.fc = nn.Linear(7, 8)
    report = analyse(model, base=other)
    (name, reason), *more = report.without_weight
    assert name == "fc" and "of another base" in reason and len(more) == 0
    assert report.layers[0].weight_norm is None and report.layers[-1].weight_norm > 0
    assert "Without W: fc: W (8, 7) does not go with" in str(report)
    with pytest.raises(ValueError, match="has the weight of none of the adapter's layers"):
        analyse(model, base=nn.Sequential(nn.Linear(3, 3)))


def test_a_layer_is_not_taken_for_another_that_ends_in_its_name():
    model = adapted(net(), target_modules=["inner.fc", "head"])
    other = net()
    del other.inner.fc
    other.fc = nn.Linear(8, 8)  # as large as inner.fc, which is not there
    assert analyse(model, base=other).without_weight == (("inner.fc", "the Sequential has no inner.fc"),)


def test_weights_that_hold_no_values_are_named():
    model = adapted(net(), target_modules=["inner.fc", "head"])
    other = net()
    other.head.to("meta")
    other.inner.fc.weight = nn.Parameter(other.inner.fc.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="float8"):
        analyse(model, base=other)
    other.fc = nn.Linear(5, 8)
    report = analyse(adapted(net(), target_modules=["fc", "head"]), base=other)
    assert [name for name, reason in report.without_weight if "meta device" in reason] == ["head"]


def test_an_untrained_adapter_has_no_directions_and_says_so():
    model = net()
    apply_lora(model, r=2, target_modules=["out"])
    report = analyse(model, model)
    layer = report.layers[0]
    assert (layer.rank, layer.norm, layer.effective_rank, layer.energy_rank_99) == (0, 0.0, 0.0, 0)
    assert math.isnan(layer.comparison.at_rank) and layer.phi_weight is None
    assert "ΔW is zero, as before training, in inner.out" in str(report)
    assert json.loads(report.to_json())["layers"][0]["comparison"]["phi"][0] == [None, None]


def test_intruder_dimensions_are_counted_where_they_are_asked_for():
    model = adapted(net(), target_modules=["out"])
    own = model.inner.out
    want = intruder_dimensions(own.weight, own.lora_A, own.lora_B, own.scaling)
    layer = analyse(model, intruders=True).layers[0]
    assert layer.intruders == want and analyse(model).layers[0].intruders is None


def test_the_report_is_data_text_and_json():
    pytest.importorskip("rich")
    one, two = (llama(seed, r=seed + 1, target_modules=["q_proj", "up_proj"]) for seed in (1, 2))
    report = analyse(one, two)
    text = str(report)
    assert re.search(r"self_attn\.q_proj +11 +2", text) and "model.layers.3" not in text  # 22 layers are summed up
    assert "model.layers.3.self_attn.q_proj" in report.table(every=True)
    assert max(map(len, text.splitlines())) <= 160
    document = json.loads(report.to_json())
    assert len(document["layers"]) == 22
    entry = document["layers"][0]
    assert entry["amplification"]["factor"] == report.layers[0].amplification.factor
    assert (entry["module"], entry["block"]) == ("self_attn.q_proj", "model.layers.0")


def test_pictures_show_the_numbers_of_the_report(tmp_path, monkeypatch):
    drawn = {}
    for name in ("plot_similarity", "plot_spectra", "plot_layers"):
        monkeypatch.setattr(plots, name, lambda data, path, **more: drawn.update({path.name: (data, more)}))
    one, two = (llama(seed, r=seed + 1, target_modules=["q_proj", "up_proj"]) for seed in (1, 2))
    del one.model.layers[1].mlp.up_proj  # a block that lacks a module
    report = analyse(one, two)
    paths = report.plot(tmp_path / "plots", ".svg")
    assert [path.name for path in paths] == [*drawn] == [
        "spectra.svg", "effective_rank.svg", "relative_norm.svg", "amplification.svg", "similarity.svg",
        "similarity_self_attn_q_proj.svg", "similarity_mlp_up_proj.svg",
    ]  # fmt: skip
    values, more = drawn["relative_norm.svg"]
    assert (more["blocks"], more["modules"]) == ([str(i) for i in range(11)], ["self_attn.q_proj", "mlp.up_proj"])
    assert values[0][0] == report.layers[0].relative_norm and math.isnan(values[1][1])
    spectra, more = drawn["spectra.svg"]
    first = report.layers[0]
    assert (spectra[first.name], more["groups"][first.name]) == (first.singular_values, first.module)
    panels, more = drawn["similarity_self_attn_q_proj.svg"]
    phis = [torch.tensor(layer.comparison.phi) for layer in report if layer.module == "self_attn.q_proj"]
    assert [*panels] == ["mean of 11 layers", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 10))]
    torch.testing.assert_close(panels["mean of 11 layers"].float(), torch.stack(phis).mean(0))
    assert more["random"][1, 2].item() == 3 / 16


def test_the_same_twice_gives_the_same_bits():
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(600, 550)), target_modules=["0"])
    assert analyse(model) == analyse(model)  # min(N, K) > 512: with random vectors


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no update s·B A"):
        analyse(net())
    with pytest.raises(FileNotFoundError, match="there is no"):
        analyse(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a pickle"):
        analyse(tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="holds no adapter: its keys are weight"):
        analyse({"weight": torch.zeros(2, 2)})
    one = adapted(net(), target_modules=["out"])
    with pytest.raises(ValueError, match="no layer in common"):
        analyse(one, adapted(net(), target_modules=["head"]))
    with pytest.raises(FileNotFoundError, match="local cache of the Hub"):
        analyse(one, base="nobody/has-this-model")
    with pytest.raises(ValueError, match="files hold one adapter"):
        analyse(saved(one, tmp_path), adapter_name="default")
    with torch.no_grad():
        one.inner.out.lora_A[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the Sequential: inner\.out: A .* NaN or infinite"):
        analyse(one)
