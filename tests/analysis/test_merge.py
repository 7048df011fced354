"""`merge_adapters` against the sum of PEFT's ΔW in fp64, and against PEFT's add_weighted_adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
from support.adapter_models import edit_config  # noqa: E402
from support.rank_files import IDS, Mixed, bits, deltas, loaded, ranks, relative, saved, truncated  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.analysis import merge_adapters, resize_adapter  # noqa: E402

STEP = 2.0**-24
WEIGHTS = [0.7, -1.3]


def two(tmp_path, **settings):
    """Return the updates of two adapters of different ranks, scales and layers, weighted and added up."""
    first = saved(tmp_path / "a", **settings)
    second = saved(tmp_path / "b", 1, r=4, lora_alpha=6, use_rslora=True, target_modules=["q", "v", "head"], **settings)
    mine, theirs = deltas(first), deltas(second)
    return {
        name: WEIGHTS[0] * mine.get(name, torch.zeros(())) + WEIGHTS[1] * theirs.get(name, torch.zeros(()))
        for name in mine.keys() | theirs.keys()
    }


def paths(tmp_path):
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_concatenation_is_the_sum_of_adapters_of_different_ranks_and_layers(dtype, tmp_path):
    wanted = two(tmp_path, dtype=dtype)
    report = merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "sum", how="concat")
    after = loaded(tmp_path / "sum")
    assert ranks(after) == {"emb": 6, "conv": 6, "mlp.q": 10, "mlp.v": 10, "head": 4}
    # Only B is rounded, once; A has the bits of the files.
    step = STEP if dtype == torch.float32 else 2.0**-8
    got = deltas(after)
    assert got.keys() == wanted.keys()
    assert all(relative(got[name], wanted[name]) < step for name in wanted)
    for layer in report.layers:
        assert layer.error == pytest.approx(relative(got[layer.name], wanted[layer.name]), rel=1e-3, abs=1e-9)
        assert layer.norm == pytest.approx(wanted[layer.name].norm().item(), rel=1e-9)


@pytest.mark.parametrize("keep", [{}, {"r": 3}, {"energy": 0.9}, {"r": 5, "energy": 0.9}], ids=str)
def test_the_svd_is_the_nearest_update_to_the_sum(keep, tmp_path):
    wanted = two(tmp_path)
    report = merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "sum", **keep)
    after = loaded(tmp_path / "sum")
    got, found = deltas(after), ranks(after)
    for layer in report.layers:
        s = torch.linalg.svdvals(wanted[layer.name])
        largest = 4 if layer.name == "head" else 6  # of the two adapters
        most = min(layer.before, len(s))
        k = min(keep.get("r", largest if "energy" not in keep else most), most)
        if "energy" in keep:
            k = min(k, int((s.square().cumsum(0) / s.square().sum() < keep["energy"]).sum()) + 1)
        assert found[layer.name] == layer.r == k
        assert relative(got[layer.name], truncated(wanted[layer.name], k)) < 2 * STEP
        assert layer.error == pytest.approx(relative(got[layer.name], wanted[layer.name]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("how", "theirs"), [("concat", "cat"), ("svd", "svd"), ("weights", "linear")])
def test_peft_merges_the_same_in_memory(how, theirs, tmp_path):
    if how == "svd" and tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20):
        pytest.skip("PEFT 0.19 multiplies with s twice")
    settings = {"target_modules": ["q", "v"]}
    model = saved(tmp_path / "a", **settings)
    saved(tmp_path / "b", 1, **settings)
    model.load_adapter(tmp_path / "b", "other")
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "merged", combination_type=theirs)
    merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "sum", how=how)
    got = deltas(loaded(tmp_path / "sum"))
    for name, delta in got.items():
        wanted = model.base_model.model.get_submodule(name).get_delta_weight("merged")
        assert relative(delta, wanted.detach()) < 1e-5  # PEFT computes in fp32
    with torch.no_grad():
        model.set_adapter("merged")
        torch.testing.assert_close(loaded(tmp_path / "sum")(IDS), model(IDS))


def test_adding_matrices_is_told_to_be_far_from_the_sum_of_the_updates(tmp_path):
    first, second = (deltas(saved(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    report = merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "sum", how="weights")
    got = deltas(loaded(tmp_path / "sum"))
    for layer in report.layers:
        wanted = WEIGHTS[0] * first[layer.name] + WEIGHTS[1] * second[layer.name]
        assert layer.error == pytest.approx(relative(got[layer.name], wanted), rel=1e-6)
        assert layer.error > 0.5
    assert "not the sum" in str(report)


def test_a_merged_adapter_of_opposite_weights_is_nothing(tmp_path):
    saved(tmp_path / "a")
    report = merge_adapters([tmp_path / "a"] * 2, [1.0, -1.0], tmp_path / "none", energy=0.99)
    assert {layer.r for layer in report.layers} == {1} and report.error == 0.0
    assert not any(delta.any() for delta in deltas(loaded(tmp_path / "none")).values())


def test_one_adapter_keeps_its_rules_and_a_merge_reads_a_merge(tmp_path):
    model = saved(tmp_path / "a", rank_pattern={"q": 3}, alpha_pattern={"v": 4})
    report = merge_adapters([tmp_path / "a"], [2.0], tmp_path / "b", how="concat")
    assert sorted(report.config["target_modules"]) == ["conv", "emb", "q", "v"]
    merge_adapters([tmp_path / "b", tmp_path / "a"], [1.0, -1.0], tmp_path / "c", how="concat")
    wanted, got = deltas(model), deltas(loaded(tmp_path / "c"))
    assert all(relative(got[name], wanted[name]) < 1e-6 for name in wanted)


def test_rules_that_have_no_union_become_the_names_of_the_layers(tmp_path):
    first = saved(tmp_path / "a", target_modules=r".*\.q|conv")
    second = saved(tmp_path / "b", 1, target_modules=["v", "q"], exclude_modules=["q"])
    report = merge_adapters(paths(tmp_path), [1.0, 1.0], tmp_path / "sum", how="concat")
    assert report.config["target_modules"] == r"conv|mlp\.q|mlp\.v"
    after = deltas(loaded(tmp_path / "sum"))
    assert after.keys() == deltas(first).keys() | deltas(second).keys()
    torch.manual_seed(0)
    ours = Mixed()
    lora_kernels.load_adapter(ours, tmp_path / "sum")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), loaded(tmp_path / "sum")(IDS))


def test_experts_are_merged_one_by_one(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from support.experts import STACKS, E, model_of

    targets = [f"experts.{name}" for name in STACKS]

    def trained(name, r, seed):
        model = model_of("Qwen3Moe")
        lora_kernels.apply_lora(model, r=r, lora_alpha=5, target_modules=[], target_parameters=targets)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.normal_()
        lora_kernels.save_adapter(model, tmp_path / name)
        return model

    one, two = trained("a", 2, 1), trained("b", 3, 2)
    merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "sum", how="concat")
    merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "low", r=2)
    merged, low = model_of("Qwen3Moe"), model_of("Qwen3Moe")
    lora_kernels.load_adapter(merged, tmp_path / "sum")
    lora_kernels.load_adapter(low, tmp_path / "low")

    def products(model, name, stack):
        layer = model.get_submodule(name)
        a, b = (getattr(layer, f"lora_{x}_{stack}").detach().double() for x in "AB")
        return layer.scaling * (b @ a)

    names = [name for name, m in merged.named_modules() if isinstance(m, lora_kernels.FusedLoRAExperts)]
    for name in names:
        for stack in STACKS:
            wanted = sum(w * products(m, name, stack) for w, m in zip(WEIGHTS, (one, two), strict=True))
            assert relative(products(merged, name, stack), wanted) < STEP * 2
            for expert in range(E):
                got = products(low, name, stack)[expert]
                assert relative(got, truncated(wanted[expert], 2)) < 1e-6


def test_what_has_no_sum_is_refused_by_name_and_nothing_is_written(tmp_path):
    for name, settings in {
        "a": {},
        "b": {"r": 3},
        "dora": {"use_dora": True},
        "bias": {"target_modules": ["q"], "modules_to_save": ["head"]},
        "stack": {"target_modules": ["q"]},
    }.items():
        saved(tmp_path / name, **settings)
    edit_config(tmp_path / "stack", target_parameters=["q.weight"], target_modules=[])
    saved(tmp_path / "other", model=nn.Sequential(nn.Identity(), nn.Linear(5, 7)), target_modules=["1"])
    saved(tmp_path / "size", model=nn.Sequential(nn.Identity(), nn.Linear(5, 8)), target_modules=["1"])
    out = tmp_path / "out"
    saved(out)
    before = bits(out)
    a, b = tmp_path / "a", tmp_path / "b"
    for told, args in (
        ("a weight for each adapter", ([a, b], [1.0])),
        ("a weight for each adapter", (str(a), [1.0])),
        ("a weight for each adapter", ([], [])),
        ("finite numbers, got nan", ([a], [float("nan")])),
        ("how must be one of 'svd', 'concat', 'weights', got 'ties'", ([a], [1.0], "ties")),
        ('go with how="svd"', ([a], [1.0], "concat", 3)),
        ("r must be an integer", ([a], [1.0], "svd", 0)),
        (r"conv: its ranks are \[3, 6\]", ([a, b], [1.0, 1.0], "weights")),
        ("dora is of DoRA", ([a, tmp_path / "dora"], [1.0, 1.0])),
        ("tensors beside A and B", ([a, tmp_path / "bias"], [1.0, 1.0])),
        ("different target_parameters", ([a, tmp_path / "stack"], [1.0, 1.0])),
        ("1 is 5 → 7 in .*other and 5 → 8 in .*size", ([tmp_path / "other", tmp_path / "size"], [1.0, 1.0])),
    ):
        given, weights, *more = args
        with pytest.raises(ValueError, match=told):
            merge_adapters(given, weights, out, *more)
    assert bits(out) == before


def test_a_merge_can_be_cut_afterwards(tmp_path):
    two(tmp_path)
    merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "sum", how="concat")
    resize_adapter(tmp_path / "sum", tmp_path / "cut", r=3)
    merge_adapters(paths(tmp_path), WEIGHTS, tmp_path / "low", r=3)
    one, other = deltas(loaded(tmp_path / "cut")), deltas(loaded(tmp_path / "low"))
    assert all(relative(one[name], other[name]) < 1e-5 for name in one)
