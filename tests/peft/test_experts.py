"""PEFT's adapters on the parameters of experts: values, gradients, files and merging of the fused path are PEFT's."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from support.experts import FAMILIES, STACKS, Inputs, experts_of, inputs, model_of, same  # noqa: E402
from support.peft_experts import BEFORE_20, Holder, config, outer_of, randomise, step, wrapped  # noqa: E402
from support.replicas import replica  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft.experts import FusedExperts  # noqa: E402

several = pytest.mark.skipif(BEFORE_20, reason="this PEFT has one adapter on parameters")


def by_delta_weight(model: Any, given: Inputs) -> dict[str, Tensor]:
    """Return y and every gradient from F.linear for each expert, with W plus what PEFT's get_delta_weight gives."""
    outer = outer_of(model)
    base = outer.get_base_layer()
    deltas = {wrapper.parameter_name: wrapper.get_delta_weight("default") for wrapper in (outer, outer.base_layer)}
    x, weights = given.x.clone().requires_grad_(), given.weights.clone().requires_grad_()
    y = 0 * x
    for e in range(base.num_experts):
        tokens, places = (given.ids == e).nonzero(as_tuple=True)
        z = x[tokens]
        for name in STACKS:
            w = (getattr(base, name) + deltas[name])[e]
            z = F.linear(
                z, w.t() if base.is_transposed else w, getattr(base, f"{name}_bias")[e] if base.has_bias else None
            )
            z = base._apply_gate(z) if name == "gate_up_proj" else z
        y = y.index_add(0, tokens, z * weights[tokens, places, None])
    names, trained = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad], strict=True)
    grads = torch.autograd.grad(y, (x, weights, *trained), given.dy)
    return {"y": y.detach()} | dict(zip(("x", "weights", *names), grads, strict=True))


def fused_calls(model: nn.Module) -> list[int]:
    return [each.fused_calls for each in model.modules() if isinstance(each, FusedExperts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_pefts_delta_weight(family):
    sizes = {"hidden_size": 13, "moe_intermediate_size": 7, "intermediate_size": 7}
    model, given = wrapped(family, sizes=sizes), inputs(torch.float64, hidden=13)
    want, peft_own = by_delta_weight(model, given), step(model, given)
    same(peft_own, want, 1e-12)
    assert lora_kernels.fuse(model, strict=True).not_fused == {}
    same(step(model, given), want, 1e-12)
    assert fused_calls(model) == [1, 1]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_give_what_peft_gives(family, implementation):
    model = randomise(peft.get_peft_model(model_of(family, implementation), config())).train()
    ids = torch.randint(3, 32, (2, 6))

    def run() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"y": out.logits.detach().double()} | {name: g.double() for name, g in grads.items()}

    want = run()
    lora_kernels.fuse(model, strict=True)
    same(run(), want, 2e-4)
    assert set(fused_calls(model)) == {1}
    assert len(want) == 1 + 2 * len(fused_calls(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bit_stacks_are_as_near_to_the_truth_as_pefts(dtype, adapters):
    # With gpt-oss a rounded value may lie on the other side of a limit, and one such element outweighs all others.
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    model, given = wrapped("Qwen3Moe", dtype, sizes=sizes), inputs(dtype, tokens=200, hidden=64)
    if adapters == "same":
        model.to(dtype)
    exact = copy.deepcopy(model).double()
    want = by_delta_weight(exact, Inputs(given.x.double(), given.ids, given.weights.double(), given.dy.double()))
    of_peft = step(model, given)
    lora_kernels.fuse(model, strict=True)
    got = step(model, given)
    for name, value in want.items():
        assert got[name].dtype == of_peft[name].dtype
        errors = [(t[name].double() - value).square().mean().sqrt().item() for t in (got, of_peft)]
        assert errors[0] <= 1.25 * errors[1], (name, errors)


@pytest.mark.parametrize("names", [("gate_up_proj",), ("down_proj",)])
def test_one_stack_alone(names):
    model, given = wrapped("GptOss", names=names), inputs(torch.float64)
    want = step(model, given)
    report = lora_kernels.fuse(model, strict=True)
    same(step(model, given), want, 1e-12)
    (text,) = report.fused.values()
    assert text.startswith(names[0]) and fused_calls(model) == [1]


def test_ranks_and_scales_of_their_own():
    patterns = {"rank_pattern": {"experts.gate_up_proj": 5}, "alpha_pattern": {"experts.down_proj": 1}}
    model, given = wrapped(use_rslora=False, **patterns), inputs(torch.float64)
    assert outer_of(model).base_layer.r["default"] == 5 and outer_of(model).r["default"] == 3
    want = step(model, given)
    lora_kernels.fuse(model, strict=True)
    same(step(model, given), want, 1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_single_expert(transposed):
    """PEFT adds B·A [N, K] to a transposed W [1, K, N] as it is: an error, or with N = K silently another function."""
    model = wrapped(
        "GptOss" if transposed else "Qwen3Moe", sizes={"num_local_experts": 1, "num_experts": 1, "intermediate_size": 6}
    )
    given = inputs(torch.float64, k=1, experts=1)
    if transposed:
        report = lora_kernels.fuse(model)
        assert not report.fused and all("a single expert" in why for why in report.not_fused.values())
        outer = outer_of(model).base_layer  # N = K = 12: PEFT's W is off by ΔW - ΔWᵀ, and merging too
        delta = outer.get_delta_weight("default")
        assert delta.shape == (12, 12) and not torch.allclose(delta, delta.t())
        before = outer.get_param().detach().clone()
        outer.merge()
        torch.testing.assert_close(outer.get_param() - before, delta[None])
        return
    want = step(model, given)
    lora_kernels.fuse(model, strict=True)
    same(step(model, given), want, 1e-12)


def test_biases_that_are_trained_get_pefts_gradients():
    model, given = wrapped("GptOss"), inputs(torch.float64)
    for name in STACKS:
        getattr(outer_of(model).get_base_layer(), f"{name}_bias").requires_grad_()
    want = step(model, given)
    assert sum("proj_bias" in name for name in want) == 2
    lora_kernels.fuse(model, strict=True)
    same(step(model, given), want, 1e-12)


def test_replicas_of_data_parallel_are_fused():
    model, given = wrapped("GptOss"), inputs(torch.float64)
    want = model(*given[:3]).detach()
    lora_kernels.fuse(model, strict=True)
    other = replica(model)
    torch.testing.assert_close(other(*given[:3]).detach(), want)
    assert outer_of(other).fused_calls == 1


def test_threads_with_adapters_of_their_own_do_not_meet():
    models = [wrapped(sizes={"hidden_size": 16}) for _ in range(4)]
    given, want = inputs(torch.float64, hidden=16), []
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        lora_kernels.fuse(model, strict=True)
        want.append(step(model, given))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, one in zip(pool.map(lambda model: step(model, given), models), want, strict=True):
                assert all(torch.equal(got[name], value) for name, value in one.items())


def test_pefts_b_has_the_expert_fastest():
    """Reading B as [N, E, r] is wrong: whole adapters have been trained so."""
    model, given = wrapped(dtype=torch.float64), inputs(torch.float64)
    lora_kernels.fuse(model, strict=True)
    before = model(*given[:3]).detach()
    b = outer_of(model).lora_B["default"].weight
    with torch.no_grad():
        b.view(b.shape[0], 3, -1)[:, :, 1] += 1  # of the expert that nobody asks for
    assert torch.equal(model(*given[:3]), before)
    with torch.no_grad():
        b.view(b.shape[0], 3, -1)[:, :, 2] += 1
    changed = (model(*given[:3]) != before).any(1)
    assert torch.equal(changed, (given.ids == 2).any(1))


@several
def test_several_adapters_and_every_switch():
    model, given = wrapped(), inputs(torch.float64)
    model.add_adapter("other", config(r=2, lora_alpha=6))
    randomise(model)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)

    def check(calls: int = 1) -> None:
        before = fused_calls(model)
        same(step(model, given), step(plain, given), 1e-12)
        assert fused_calls(model) == [n + calls for n in before]

    check()
    for each in (model, plain):
        each.set_adapter("other")
    check()
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])
        outer_of(each).scaling["other"] *= 3
    check()
    for each in (model, plain):
        outer_of(each).merge(adapter_names=["default"])  # the outer wrapper has nothing left to compute, the inner has
    check()
    for each in (model, plain):
        outer_of(each).unmerge()
        each.delete_adapter("other")
    check()
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(*given[:3]), plain(*given[:3]), rtol=1e-12, atol=1e-12)
    assert not any(each.passed_over for each in model.modules() if isinstance(each, FusedExperts))
    for each in (model, plain):
        each.merge_adapter()
    torch.testing.assert_close(model(*given[:3]), plain(*given[:3]), rtol=1e-12, atol=1e-12)


@several
def test_an_adapter_that_is_added_after_fuse_is_put_into_the_same_wrappers():
    model, given = wrapped(), inputs(torch.float64)
    lora_kernels.fuse(model, strict=True)
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    randomise(model)
    wrappers = [each for each in model.modules() if isinstance(each, ParamWrapper)]
    assert len(wrappers) == 2 and all(set(each.lora_A) == {"default", "other"} for each in wrappers)
    got = step(model, given)
    assert fused_calls(model) == [1, 1]
    lora_kernels.unfuse(model)
    assert all(type(each) is ParamWrapper for each in wrappers)
    same(got, step(model, given), 1e-12)


def test_files_go_both_ways(tmp_path):
    model, given = wrapped("GptOss", torch.float32), inputs()
    want = model(*given[:3]).detach()
    lora_kernels.fuse(model, strict=True)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Holder(experts_of("GptOss")), tmp_path)(*given[:3]), want)
    lora_kernels.enable()
    try:
        loaded = peft.PeftModel.from_pretrained(Holder(experts_of("GptOss")), tmp_path)
    finally:
        lora_kernels.disable()
    torch.testing.assert_close(loaded(*given[:3]), want)
    assert fused_calls(loaded) == [1, 1]
    # A FusedLoRAExperts takes the same tensors, under the keys that it names.
    from safetensors.torch import load_file

    file = load_file(tmp_path / "adapter_model.safetensors")
    layer = lora_kernels.FusedLoRAExperts.from_experts(experts_of("GptOss"), r=3, lora_alpha=4)
    prefix = "base_model.model.experts."
    assert set(file) == {prefix + key for key in layer.file_parts()}
    with torch.no_grad():
        for key, part in layer.file_parts().items():
            value = file[prefix + key]
            assert value.shape == part.shape
            getattr(layer, part.parameter).copy_(layer.from_file(key, value))
            assert torch.equal(layer.to_file(key, getattr(layer, part.parameter)), value)
    torch.testing.assert_close(layer(*given[:3]), want)


def test_merging_and_unloading_give_pefts_weights():
    model, given = wrapped("GptOss"), inputs(torch.float64)
    want = model(*given[:3]).detach()
    plain = copy.deepcopy(model).merge_and_unload()
    lora_kernels.fuse(model, strict=True)
    merged = model.merge_and_unload()
    assert type(merged.experts) is type(plain.experts) and not hasattr(merged.experts, "lora_A")
    for got, weight in zip(merged.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged(*given[:3]), want)


def test_the_forward_parametrises_nothing(monkeypatch):
    model, given = wrapped(), inputs(torch.float64)
    lora_kernels.fuse(model, strict=True)
    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", None)
    step(model, given)
    lora_kernels.unfuse(model)
    with pytest.raises(TypeError):
        step(model, given)


def test_copies_compute_the_same():
    model, given = wrapped(), inputs(torch.float64)
    lora_kernels.fuse(model, strict=True)
    want = model(*given[:3]).detach()
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    other = copy.deepcopy(model)
    assert type(outer_of(other)) is FusedExperts and torch.equal(other(*given[:3]), want)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast_acts_as_in_the_implementation_that_is_chosen(implementation):
    model, given = wrapped(dtype=torch.float32, implementation=implementation), inputs()
    exact, of_peft = step(model, given), step(model, given, autocast=True)
    lora_kernels.fuse(model, strict=True)
    got = step(model, given, autocast=True)
    assert all(got[name].dtype == t.dtype for name, t in of_peft.items())
    same(got, {name: t.double() for name, t in exact.items()}, 1e-5 if implementation == "grouped_mm" else 0.03)
    assert torch.equal(got["y"], exact["y"]) <= (implementation == "grouped_mm")


def test_verify_sees_both_wrappers():
    model = peft.get_peft_model(model_of("Qwen3Moe"), config())
    report = lora_kernels.fuse(model, verify={"input_ids": torch.randint(3, 32, (2, 6))})
    assert len(report.fused) == 4 and not report.not_fused
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer"
    assert report.fused[inner].startswith("gate_up_proj, 5 × (16→16)")
    assert "computes gate_up_proj of its base_layer in the same call" in report.fused[inner.removesuffix(".base_layer")]


def test_gradient_checkpointing():
    model = randomise(peft.get_peft_model(model_of("Qwen3Moe"), config())).train()
    ids = torch.randint(3, 32, (2, 6))
    lora_kernels.fuse(model, strict=True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 8
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    torch._dynamo.reset()
    model, given = wrapped(dtype=torch.float32), inputs()
    lora_kernels.fuse(model, strict=True)
    want = step(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = step(compiled, given)
    same(got, {name.replace("base_model", "_orig_mod.base_model", 1): t.double() for name, t in want.items()}, 1e-5)
