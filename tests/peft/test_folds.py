"""The kinds of PEFT's adapters that fold into A' and B' give what PEFT gives, and what their formulas say."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import PeftModel, get_peft_model  # noqa: E402
from support import fold_models  # noqa: E402
from support.fold_models import KINDS, config_of, delta, layers_of, make  # noqa: E402
from support.peft_models import (  # noqa: E402
    Conv1DNet,
    MaskOfSeed,
    Net,
    config,
    fused_equals_peft,
    fused_layers,
    run,
    same,
)

import lora_kernels  # noqa: E402
from lora_kernels.core import dropout  # noqa: E402

every_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.bfloat16, torch.float16]


@every_kind
def test_values_and_all_gradients_are_pefts(kind: str):
    """In fp64, for values of the adapter that training has changed, over an x with three dimensions."""
    fused_equals_peft(make(kind, torch.float64), torch.randn(2, 5, 24, dtype=torch.float64))


@every_kind
def test_a_new_adapter_gives_pefts_values_and_gradients(kind: str):
    """B, or E, is zero there. DeLoRA divides by a norm of B that is 0, and the rank's terms get large gradients."""
    fused_equals_peft(fold_models.new(kind, torch.float64), torch.randn(3, 24, dtype=torch.float64))


@every_kind
@pytest.mark.parametrize("rows", [(0, 24), (1, 24), (3, 0, 24), (24,)], ids=str)
def test_odd_shapes_of_x_give_pefts_values(kind: str, rows: tuple[int, ...]):
    model, x = make(kind, torch.float64), torch.randn(rows, dtype=torch.float64)
    if 0 not in rows:
        fused_equals_peft(model, x)
        return
    lora_kernels.fuse(model, strict=True)  # PEFT's BD-LoRA cannot compute an x without rows
    got = run(model, x)
    assert got["y"].shape == (*rows[:-1], 3) and all(not value.any() for value in got.values())


@every_kind
def test_the_update_is_that_of_the_formula(kind: str):
    """The oracle is W + ΔW in fp64, written down from the paper and not from PEFT's forward."""
    model = make(kind, torch.float64)
    lora_kernels.fuse(model, strict=True)
    for layer in layers_of(model):
        x = torch.randn(4, layer.in_features, dtype=torch.float64)
        base = layer.base_layer
        torch.testing.assert_close(layer(x), F.linear(x, base.weight + delta(kind, layer), base.bias))


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bits_are_as_near_to_the_truth_as_pefts(kind: str, dtype: torch.dtype, adapters: str):
    model = make(kind, dtype)
    if adapters == "same":
        model.to(dtype)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    errors = Counter[str](), Counter[str]()
    for _ in range(24):  # the error of a gradient with one element, as that of λ, says little about one x alone
        x, dy = torch.randn(6, 24, dtype=dtype), torch.randn(6, 40, dtype=dtype)
        truth, theirs, ours = (
            layer_run(layers_of(each)[0], x.to(wide), dy.to(wide))
            for each, wide in ((exact, torch.float64), (plain, dtype), (model, dtype))
        )
        assert ours.keys() == theirs.keys() == truth.keys()
        for name, want in truth.items():
            assert ours[name].dtype == theirs[name].dtype
            for each, error in zip((ours, theirs), errors, strict=True):
                error[name] += float((each[name].double() - want).square().sum())
    assert layers_of(model)[0].fused_calls == 24
    for name, its in errors[1].items():
        assert errors[0][name] <= 1.5**2 * its, name


def layer_run(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return y of a layer, and every gradient for a dy."""
    layer.zero_grad(set_to_none=True)
    x = x.requires_grad_()
    x.grad = None
    y = layer(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


@every_kind
def test_dropout_is_pefts_with_our_mask(kind: str, monkeypatch: pytest.MonkeyPatch):
    model, x = make(kind, torch.float64, p=0.3), torch.randn(3, 7, 24, dtype=torch.float64)
    plain, seeds = copy.deepcopy(model), [torch.tensor(100 + i) for i in range(2)]
    for seed, layer in zip(seeds, layers_of(plain), strict=True):
        masks = layer.delora_dropout if kind == "delora" else layer.lora_dropout
        masks["default"] = MaskOfSeed(0.3, seed)
    drawn = iter(seeds)
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: next(drawn))
    want = run(plain, x)
    lora_kernels.fuse(model, strict=True, backend="eager")
    same(run(model, x), want)
    assert next(drawn, None) is None
    same(run(model.eval(), x), run(plain.eval(), x))


@every_kind
def test_autocast_gives_pefts_values_and_dtypes(kind: str):
    model, x = make(kind), torch.randn(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, x)
        lora_kernels.fuse(model, strict=True)
        got = run(model, x)
    same(got, want, rtol=0.03)
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


@every_kind
def test_no_gradients_and_inference_mode_give_the_same_values(kind: str):
    model, x = make(kind).eval(), torch.randn(3, 24)
    lora_kernels.fuse(model, strict=True)
    want = model(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(x), want)
    assert all(layer.fused_calls == 3 for layer in fused_layers(model))


@every_kind
def test_a_change_of_any_parameter_is_seen_by_the_next_call(kind: str):
    model, x = make(kind, torch.float64), torch.randn(3, 24, dtype=torch.float64)
    lora_kernels.fuse(model, strict=True)
    for _ in range(2):
        lora_kernels.unfuse(plain := copy.deepcopy(model))
        same(run(model, x), run(plain, x))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
        for layer in layers_of(model):
            if kind != "delora":
                layer.scaling["default"] *= 2


@every_kind
def test_disabling_merging_and_unfusing_are_as_pefts(kind: str):
    model, x = make(kind).eval(), torch.randn(3, 24)
    classes = [type(layer) for layer in layers_of(model)]
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    for each in (model, plain):
        each.merge_adapter()
    torch.testing.assert_close(model(x), plain(x))
    bases = [layer.base_layer.weight for layer in layers_of(model)]
    for each in (model, plain):
        each.unmerge_adapter()
    for merged, layer, other in zip(bases, layers_of(model), layers_of(plain), strict=True):
        assert merged is not layer.base_layer.weight
        other.base_layer.weight.data = layer.base_layer.weight.data  # PEFT's own has drifted
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x), plain(x))
    torch.testing.assert_close(model(x), plain(x))
    lora_kernels.unfuse(model)
    assert [type(layer) for layer in layers_of(model)] == classes
    assert [layer.__dict__.keys() for layer in layers_of(model)] == [
        layer.__dict__.keys() for layer in layers_of(plain)
    ]
    assert torch.equal(model(x), plain(x))
    lora_kernels.fuse(model)
    torch.testing.assert_close(model.merge_and_unload()(x), plain(x))


@every_kind
def test_files_hold_what_pefts_hold_and_load(kind: str, tmp_path: Path):
    base = Net()
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config_of(kind))
    fold_models.randomise(model)
    lora_kernels.fuse(model, strict=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    lora_kernels.fuse(loaded, strict=True)
    x = torch.randn(3, 24)
    torch.testing.assert_close(loaded(x), model.eval()(x))


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_stay_fused(kind: str, copied):
    model, x = make(kind), torch.randn(3, 24)
    lora_kernels.fuse(model, strict=True)
    other = copied(model)
    same(run(other, x), run(model, x))
    assert all(layer.fused_calls == 1 for layer in fused_layers(other))


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_mask_again(kind: str, reentrant: bool):
    model, x = make(kind, p=0.5), torch.randn(4, 24)
    lora_kernels.fuse(model, strict=True, backend="eager")
    torch.manual_seed(1)
    want = run(model, x)
    torch.manual_seed(1)
    same(run(partial(checkpoint, model, use_reentrant=reentrant), x, of=model), want)


@every_kind
def test_a_compiled_model_gives_the_same_values_and_gradients(kind: str):
    model, x = make(kind), torch.randn(4, 24)
    lora_kernels.fuse(model, strict=True)
    want = run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    same(run(compiled, x, of=model), want)


@every_kind
def test_what_is_saved_is_what_plain_lora_saves_and_the_adapter(kind: str):
    """Beyond plain LoRA's x, h and parameters, only tensors of the sizes [R, K] and [N, R] are saved for the fold."""
    model, x = make(kind), torch.randn(512, 24, requires_grad=True)
    lora_kernels.fuse(model, strict=True)
    layer, sizes = layers_of(model)[0], []
    pack = lambda t: sizes.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    big = [size for size in sizes if size > 40 * 24]
    assert sorted(big) == sorted(size for size in (512 * 24, 512 * 4) if size in big) and len(big) <= 2
    del y


@every_kind
def test_gradients_are_the_same_bits_in_every_run(kind: str):
    model, x = make(kind), torch.randn(50, 24)
    lora_kernels.fuse(model, strict=True)
    first, second = run(model, x), run(model, x)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", ["kasa", "mica", "bdlora", "delora"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_active_adapters_give_pefts_sum(kind: str, p: float, monkeypatch: pytest.MonkeyPatch):
    """Without dropout they are one call. With dropout each has a mask of its own."""
    model = make(kind, torch.float64, p)
    same_kind = kind in ("kasa", "delora")  # which PEFT refuses beside others
    model.add_adapter("second", config_of(kind, p) if same_kind else config(r=3, lora_dropout=p))
    fold_models.randomise(model)
    model.base_model.set_adapter(["default", "second"])
    fused_equals_peft(model.train(p == 0), torch.randn(5, 24, dtype=torch.float64))
    if not p:
        return
    for i, place in enumerate(("prepare", "around")):
        monkeypatch.setattr(f"lora_kernels.ops.{place}.draw_seed", lambda device, i=i: torch.tensor(5 + i))
    lora_kernels.fuse(model, backend="eager")
    layer, x = layers_of(model.train())[0], torch.randn(5, 24, dtype=torch.float64)
    want = layer.base_layer(x) + dropout.dropout(x, p, torch.tensor(5)) @ delta(kind, layer).T
    want += dropout.dropout(x, p, torch.tensor(6)) @ delta(kind if same_kind else "lora", layer, "second").T
    torch.testing.assert_close(layer(x), want)


def test_adalora_is_pruned_between_the_steps_as_in_peft():
    """`update_and_allocate` sets elements of E to zero in place, by the gradients that the fused layers have given."""
    models = [make("adalora", torch.float64) for _ in range(2)]
    lora_kernels.fuse(models[0], strict=True)
    optimisers = [torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05) for model in models]
    for model in models:
        model.peft_config["default"].tinit, model.peft_config["default"].tfinal = 2, 4
        model.base_model.rankallocator.peft_config.deltaT = 1
    x, goal = torch.randn(8, 24, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    for step in range(12):
        for model, optimiser in zip(models, optimisers, strict=True):
            (model(x) - goal).square().mean().backward()
            optimiser.step()
            model.base_model.update_and_allocate(step)
            optimiser.zero_grad()
    ours, theirs = (model.state_dict() for model in models)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9)
    assert any(int((layer.lora_E["default"] == 0).sum()) > 0 for layer in layers_of(models[0])), "nothing was pruned"
    assert all(layer.fused_calls == 12 and not layer.passed_over for layer in fused_layers(models[0]))


def test_adalora_divides_by_its_first_rank_and_not_by_the_rank_that_is_left():
    model = make("adalora", torch.float64)
    lora_kernels.fuse(model, strict=True)
    layer, x = layers_of(model)[0], torch.randn(2, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_E["default"][1:] = 0
    update = layer(x) - layer.base_layer(x)
    a, b, e = (getattr(layer, f"lora_{part}")["default"].detach() for part in "ABE")
    torch.testing.assert_close(update, e[0] * torch.outer(x @ a[0], b[:, 0]) * 6 / (4 + 1e-5))


def test_an_adalora_layer_of_rank_0_is_left_to_peft():
    model = make("adalora")
    for layer in layers_of(model):
        layer.update_layer("default", 0, 6, config_of("adalora"))
    x, report = torch.randn(2, 24), lora_kernels.fuse(model)
    assert list(report.not_fused.values()) == ["adapter 'default' has rank 0"] * 2
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))


def test_adalora_over_a_conv1d_is_pefts():
    pytest.importorskip("transformers")
    model = get_peft_model(Conv1DNet().double(), config_of("adalora", fan_in_fan_out=True))
    fold_models.randomise(model)
    fused_equals_peft(model, torch.randn(5, 24, dtype=torch.float64))


def test_a_new_delora_in_fp16_stays_finite_where_pefts_overflows():
    """λ / (r · 1e-4) times the norms of W is above the largest fp16, and B is zero. PEFT multiplies h by the first."""
    model, x = fold_models.new("delora", torch.float16).to(torch.float16), torch.randn(8, 24).half() / 4
    for layer in layers_of(model):
        layer.delora_w_norm["default"] = 30 * layer.delora_w_norm["default"].half()
    plain, base = copy.deepcopy(model), model.base_model.model.up.base_layer
    lora_kernels.fuse(model, strict=True)
    assert plain.base_model.model.up(x).isnan().any()
    torch.testing.assert_close(model.base_model.model.up(x), base(x))
    got = run(model, x)
    assert all(got[name].isfinite().all() for name in got if "up.delora_B" not in name)


def test_a_delora_with_norms_in_16_bits_beside_fp32_is_left_to_peft_which_raises():
    model = make("delora", torch.bfloat16)
    lora_kernels.fuse(model, strict=True)
    for layer in layers_of(model):
        layer.delora_w_norm["default"] = layer.delora_w_norm["default"].bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 24, dtype=torch.bfloat16))
    assert "norms in torch.bfloat16" in next(iter(layers_of(model)[0].passed_over))


def test_kasa_whose_base_is_yet_to_be_cut_is_left_to_peft_once(tmp_path: Path):
    """An adapter that is loaded with low_cpu_mem_usage=True cuts its base in its first forward."""
    base, model = Net(), make("kasa")
    model.save_pretrained(tmp_path)
    loaded, plain = (PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True) for _ in range(2))
    report, x = lora_kernels.fuse(loaded), torch.randn(3, 24)
    assert all("KaSA, whose first forward" in why for why in report.not_fused.values()) and len(report.not_fused) == 2
    assert torch.equal(loaded(x), plain(x)), "the first forward is PEFT's"
    torch.testing.assert_close(loaded(x), plain(x))
    assert all(layer.fused_calls == 1 and layer.passed_over.total() == 1 for layer in fused_layers(loaded))


def test_rows_with_adapters_of_their_own_fold_too():
    model, x = make("bdlora", torch.float64).eval(), torch.randn(4, 3, 24, dtype=torch.float64)
    model.add_adapter("second", config(r=3))
    fold_models.randomise(model)
    plain, names = copy.deepcopy(model), ["default", "second", "__base__", "default"]
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))
    with lora_kernels.mixed(model, names):
        torch.testing.assert_close(model(x), plain(x, adapter_names=names))


@pytest.mark.parametrize("kind", ["adalora", "delora"])
def test_mixed_computes_the_rows_of_layers_of_other_methods(kind: str):
    model, x = make(kind, torch.float64).eval(), torch.randn(2, 3, 24, dtype=torch.float64)
    lora_kernels.fuse(model, strict=True)
    with lora_kernels.mixed(model, ["default", None]):
        got = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(got[1], model(x[1]))
    torch.testing.assert_close(got[0], model(x[0]))


@pytest.mark.parametrize("kind", ["adalora", "delora"])
def test_keywords_are_handed_to_pefts_forward(kind: str):
    model = make(kind)
    lora_kernels.fuse(model, strict=True)
    layer = layers_of(model)[0]
    with pytest.raises(TypeError, match="adapter_names"):
        layer(torch.randn(2, 24), adapter_names=["default", "default"])
    assert layer.passed_over == {"further arguments for the base layer": 1}


def test_layers_of_a_group_that_fold_compute_alone_and_once():
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(24, 16)

        def forward(self, x):
            return self.up(x).sum(-1) + self.down(x).sum(-1)

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(Attention()), config_of("kasa"))
    fold_models.randomise(model)
    x = torch.randn(3, 24)
    want = model(x)
    report = lora_kernels.fuse(model, group=[("up", "down")])
    torch.testing.assert_close(model(x), want)
    (group,) = report.groups.values()
    assert group.calls == 0 and "computed anew" in next(iter(group.passed_over))
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


@every_kind
def test_a_dry_forward_finds_the_adapters_in_use(kind: str):
    model = make(kind)
    report = lora_kernels.fuse(model, verify=torch.randn(2, 24))
    assert len(report.fused) == 2 and not report.not_fused, report


def test_gralora_is_reported_with_the_reason():
    model = get_peft_model(Net(), peft.GraloraConfig(r=4, gralora_k=2, target_modules=["up", "down"]))
    report = lora_kernels.fuse(model)
    assert len(report.not_fused) == 2 and all("GraLoRA" in why for why in report.not_fused.values())
    with pytest.raises(RuntimeError, match="GraLoRA"):
        lora_kernels.fuse(model, strict=True)
