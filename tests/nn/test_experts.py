"""`FusedLoRAExperts` computes the experts of transformers' models with an adapter each: values and all gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from support import experts
from support.experts import (
    FAMILIES,
    STACKS,
    UNUSUAL,
    Adapter,
    E,
    Inputs,
    experts_of,
    inputs,
    same,
    truth,
    unusual_experts,
)
from support.replicas import replica

from lora_kernels import FusedLoRAExperts
from lora_kernels.core import dropout

RAGGED = {"hidden_size": 13, "moe_intermediate_size": 7, "intermediate_size": 7}
MOST = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


def layer_of(module: nn.Module, **settings) -> FusedLoRAExperts:
    """Return a layer whose adapters differ from zero."""
    layer = FusedLoRAExperts.from_experts(module, **({"r": 3, "lora_alpha": 4} | settings))
    torch.manual_seed(2)
    for name in layer.target_parameters:
        nn.init.normal_(layer.pair(name)[1], 0, 0.3)
    return layer


def adapters_of(layer: FusedLoRAExperts) -> dict[str, Adapter]:
    return {name: Adapter(*layer.pair(name), layer.scaling) for name in layer.target_parameters}


def step(layer: FusedLoRAExperts, given: Inputs, run=None) -> dict[str, torch.Tensor]:
    """Return y and every gradient, by the names of `truth`."""
    x, weights = given.x.clone().requires_grad_(), given.weights.clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(x, given.ids, weights)
    y.backward(given.dy.to(y.dtype))
    got = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    for name in layer.target_parameters:
        a, b = layer.pair(name)
        got |= {f"a {name}": a.grad, f"b {name}": b.grad}
    return got


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_each_expert_with_its_update(family, implementation):
    sizes = RAGGED if implementation == "eager" else {}
    layer = layer_of(experts_of(family, torch.float64, implementation, **sizes))
    given = inputs(torch.float64, hidden=sizes.get("hidden_size", experts.H))
    got = step(layer, given)
    same(got, truth(layer, given, adapters_of(layer)), 1e-12)
    for name in STACKS:  # nobody asks for expert 1
        assert all(p.grad[1].count_nonzero() == 0 and p.grad.count_nonzero() for p in layer.pair(name))


@pytest.mark.parametrize("kind", UNUSUAL)
def test_experts_without_a_gate_with_a_norm_and_transposed_without_biases(kind):
    try:
        module = unusual_experts(kind)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {kind}")
    if not hasattr(module, "has_gate"):
        pytest.skip(f"this transformers lets nobody choose an implementation of {kind}")
    normed = getattr(module, "has_post_expert_norm", False)
    layer, given = layer_of(module), inputs(torch.float64)
    got = step(layer, given)
    same(got, truth(layer, given, adapters_of(layer)), 1e-6 if normed else 1e-12)  # a norm in fp32
    layer.merge()
    torch.testing.assert_close(layer(*given[:3]), got["y"], rtol=1e-6, atol=1e-6)
    assert layer.size == f"{E} × ({experts.H} → {experts.I * (1 + module.has_gate)}, {experts.I} → {experts.H})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_other_dtypes_differ_by_rounding(family, dtype):
    layer, given = layer_of(experts_of(family, dtype, **RAGGED)), inputs(dtype, hidden=13)
    assert layer.lora_A_gate_up_proj.dtype == torch.float32  # fp32 beside 16 bits, as in PEFT
    got = step(layer, given)
    assert got["y"].dtype == got["x"].dtype == dtype and got["a down_proj"].dtype == torch.float32
    same(got, truth(layer, given, adapters_of(layer)), MOST[dtype])
    low = layer_of(experts_of(family, dtype, **RAGGED), adapter_dtype=dtype)
    assert low.lora_B_down_proj.dtype == dtype
    same(step(low, given), truth(low, given, adapters_of(low)), MOST[dtype])


def test_routing_weights_in_fp32_stay_so_beside_sixteen_bits():
    layer, given = layer_of(experts_of("DeepseekV3", torch.bfloat16)), inputs(torch.bfloat16)
    given = given._replace(weights=torch.rand(given.ids.shape))
    got = step(layer, given)
    assert got["y"].dtype == torch.bfloat16 and got["weights"].dtype == torch.float32
    same(got, truth(layer, given, adapters_of(layer)), MOST[torch.bfloat16])


@pytest.mark.parametrize("name", STACKS)
def test_one_stack_alone_may_have_an_adapter(name):
    layer, given = layer_of(experts_of("Mixtral", torch.float64), parameters=[name]), inputs(torch.float64)
    assert layer.target_parameters == (name,) and set(adapters_of(layer)) == {name}
    same(step(layer, given), truth(layer, given, adapters_of(layer)), 1e-12)


@pytest.mark.parametrize(
    ("tokens", "k", "ids"),
    [
        pytest.param(0, 2, None, id="no tokens"),
        pytest.param(1, 1, None, id="one token"),
        pytest.param(6, 3, "one expert", id="all rows in one expert, and duplicates"),
        pytest.param(7, E, "all", id="every expert"),
    ],
)
@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
def test_odd_routings(family, tokens, k, ids):
    layer, given = layer_of(experts_of(family, torch.float64)), inputs(torch.float64, tokens, k)
    if ids == "one expert":
        given = given._replace(ids=torch.full((tokens, k), 2))
    elif ids == "all":
        given = given._replace(ids=torch.arange(E).expand(tokens, E).flip(1), weights=torch.rand(tokens, E).double())
    got = step(layer, given)
    want = truth(layer, given, adapters_of(layer))
    if tokens:
        same(got, want, 1e-12)
    else:
        assert all(torch.equal(got[name], want[name]) for name in want)  # nothing, and gradients of zeros


@pytest.mark.parametrize("transposed", [False, True])
def test_a_single_expert(transposed):
    module = experts_of("GptOss" if transposed else "Qwen3Moe", torch.float64, num_local_experts=1, num_experts=1)
    layer, given = layer_of(module), inputs(torch.float64, k=1, experts=1)
    same(step(layer, given), truth(layer, given, adapters_of(layer)), 1e-12)


def test_ids_of_no_expert_add_nothing():
    """Expert parallelism gives the rows of other processes an id beyond the last expert."""
    layer, given = layer_of(experts_of("Qwen3Moe", torch.float64)), inputs(torch.float64)
    ids = given.ids.clone()
    ids[::2, 0], ids[1, 1], ids[4] = E, E + 3, E
    given = given._replace(ids=ids)
    got, want = step(layer, given), truth(layer, given, adapters_of(layer))
    same(got, want, 1e-12)
    assert got["y"][4].count_nonzero() == 0 and got["x"][4].count_nonzero() == 0
    assert got["weights"][ids >= E].count_nonzero() == 0


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_dropout_is_our_mask_and_acts_only_while_training(family, monkeypatch):
    layer, given = layer_of(experts_of(family, torch.float64), lora_dropout=0.4), inputs(torch.float64)
    seeds, draw = [], dropout.draw_seed

    def recorded(device):
        seeds.append(draw(device))
        return seeds[-1]

    monkeypatch.setattr("lora_kernels.ops.prepare_experts.draw_seed", recorded)
    got = step(layer.train(), given)
    assert len(seeds) == 2 and seeds[0] != seeds[1]  # each stack has a mask of its own

    def mask(seed):
        return lambda x, rows: (
            torch.where(dropout.keep_mask(seed, given.ids.numel(), x.shape[1], 0.4)[rows], x, 0.0)
            * dropout.rescale(0.4)
        )

    masks = dict(zip(STACKS, map(mask, seeds), strict=True))
    same(got, truth(layer, given, adapters_of(layer), masks), 1e-12)
    same(step(layer.eval(), given), truth(layer, given, adapters_of(layer)), 1e-12)


def test_checkpointing_replays_dropout_and_gradients_are_the_same_from_run_to_run():
    from torch.utils.checkpoint import checkpoint

    layer, given = layer_of(experts_of("Qwen3Moe"), lora_dropout=0.3), inputs()

    def run(how):
        torch.manual_seed(5)
        return step(layer, given, how)

    first = run(layer)
    for how in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        again = run(how)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_fresh_module_computes_its_base():
    for family, implementation in (("GptOss", "eager"), ("Qwen3Moe", "grouped_mm"), ("Mixtral", "batched_mm")):
        module, given = experts_of(family, implementation=implementation), inputs()
        want = module(given.x, given.ids, given.weights)
        layer = FusedLoRAExperts.from_experts(module, r=4)
        torch.testing.assert_close(layer(given.x, given.ids, given.weights), want)
        assert layer.lora_B_down_proj.count_nonzero() == 0


def test_the_names_of_arguments_are_those_of_the_plain_module():
    layer, (x, ids, weights, _) = layer_of(experts_of("GptOss")), inputs()
    want = layer(x, ids, weights)
    assert torch.equal(layer(x, router_indices=ids, routing_weights=weights), want)
    assert torch.equal(layer(hidden_states=x, top_k_index=ids, top_k_weights=weights), want)
    with pytest.raises(TypeError, match="needs the experts of each token and their weights"):
        layer(x)
    with pytest.raises(ValueError, match=r"got \(3, 3, 12\), \(9, 2\), \(9, 2\)"):
        layer(x.view(3, 3, 12), ids, weights)


def test_no_grad_and_inference_mode():
    layer, (x, ids, weights, _) = layer_of(experts_of("GptOss")), inputs()
    want = layer(x, ids, weights).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x, ids, weights)
        assert torch.equal(y, want) and not y.requires_grad
    with torch.inference_mode():
        made = FusedLoRAExperts.from_experts(experts_of("GptOss"), r=2)
    assert not made.lora_A_down_proj.is_inference()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast_acts_as_in_the_implementation_that_is_chosen(implementation):
    layer, given = layer_of(experts_of("Qwen3Moe", implementation=implementation)), inputs()
    want = truth(layer, given, adapters_of(layer))
    with torch.autocast("cpu", torch.bfloat16):
        got = step(layer, given)
    assert got["y"].dtype == torch.float32
    same(got, want, 1e-5 if implementation == "grouped_mm" else 0.03)  # it computes in the dtype of the weights
    error = (got["y"] - want["y"]).abs().max() / want["y"].abs().max()
    assert (error < 1e-5) == (implementation == "grouped_mm")


def test_an_x_in_fp32_beside_weights_in_sixteen_bits_under_autocast():
    layer, given = layer_of(experts_of("Qwen3Moe", torch.bfloat16, "grouped_mm")), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = step(layer, given)
    assert got["y"].dtype == got["x"].dtype == torch.float32
    same(got, truth(layer, given, adapters_of(layer)), 0.03)


def test_torch_func_and_vmap_see_through_the_layer():
    layer, (x, ids, weights, dy) = layer_of(experts_of("Qwen3Moe", torch.float64)), inputs(torch.float64)
    values = dict(layer.named_parameters())

    def loss(values, x):
        return (torch.func.functional_call(layer, values, (x, ids, weights)) * dy).sum()

    grads = torch.func.grad(loss)(values, x)
    want = truth(layer, Inputs(x, ids, weights, dy), adapters_of(layer))
    torch.testing.assert_close(grads["lora_A_down_proj"], want["a down_proj"])
    torch.testing.assert_close(grads["lora_B_gate_up_proj"], want["b gate_up_proj"])
    _, tangent = torch.func.jvp(lambda x: layer(x, ids, weights), (x,), (dy,))
    eps = 1e-6
    slope = (layer(x + eps * dy, ids, weights) - layer(x - eps * dy, ids, weights)) / (2 * eps)
    torch.testing.assert_close(tangent, slope.detach(), rtol=1e-5, atol=1e-6)


def test_gradcheck():
    layer = layer_of(experts_of("GptOss", torch.float64, hidden_size=4, intermediate_size=3))
    x, ids, weights, _ = inputs(torch.float64, tokens=3, hidden=4)
    names = [f"lora_{which}_{name}" for name in STACKS for which in "AB"]

    def run(x, weights, *values):
        with_values = copy.copy(layer)
        with_values._parameters = layer._parameters | dict(zip(names, values, strict=True))
        return with_values(x, ids, weights)

    leaves = [x, weights, *(getattr(layer, name).detach() for name in names)]
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in leaves])


def test_biases_of_the_base_can_be_trained():
    layer, (x, ids, weights, dy) = layer_of(experts_of("GptOss", torch.float64)), inputs(torch.float64)
    layer.gate_up_proj_bias.requires_grad_()
    layer(x, ids, weights).backward(dy)
    got, layer.gate_up_proj_bias.grad = layer.gate_up_proj_bias.grad, None
    layer.merge()
    with pytest.warns(UserWarning, match="gets no gradient"):
        layer(x, ids, weights).backward(dy)
    torch.testing.assert_close(got, layer.gate_up_proj_bias.grad)
    assert got[1].count_nonzero() == 0 and got.count_nonzero()


def test_replicas_of_data_parallel_compute_and_train():
    layer, (x, ids, weights, dy) = layer_of(experts_of("GptOss")), inputs()
    want = step(layer, Inputs(x, ids, weights, dy))
    layer.zero_grad()
    y = replica(layer)(x, ids, weights)
    y.backward(dy)
    assert torch.equal(y, want["y"]) and torch.equal(layer.lora_A_down_proj.grad, want["a down_proj"])


def test_traces_and_exports_compute_the_same_for_other_routings():
    layer, (x, ids, weights, _) = layer_of(experts_of("Qwen3Moe")).eval(), inputs()
    other = ids.flip(0)
    with torch.no_grad():
        want = layer(x, other, weights)
        traced = torch.jit.trace(layer, (x, ids, weights), check_trace=False)
        torch.testing.assert_close(traced(x, other, weights), want)
        program = torch.export.export(layer, (x, ids, weights))
        torch.testing.assert_close(program.module()(x, other, weights), want)


def test_second_derivatives_are_refused():
    layer, (x, ids, weights, _) = layer_of(experts_of("Qwen3Moe")), inputs()
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x, ids, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_compiled_layers_give_the_same(family):
    torch._dynamo.reset()
    layer, given = layer_of(experts_of(family)), inputs()
    want = truth(layer, given, adapters_of(layer))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(step(layer, given, compiled), want, 1e-5)
    other = given._replace(ids=given.ids.flip(0))
    same(step(layer, other, compiled), truth(layer, other, adapters_of(layer)), 1e-5)
