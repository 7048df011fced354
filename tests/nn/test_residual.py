"""ResLoRA computes the formulas of its paper, with all gradients, in every kind of layer and mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.judging import saved_bytes
from support.residual_models import K, N, adapters, by_formula, fill, gradients, made
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, apply_reslora, merge_and_unload
from lora_kernels.core import dropout
from lora_kernels.core.dropout import draw_seed
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.nn.residual import ResLoRALinear

STRUCTURES = [("bs", 0), ("bs", 1), ("bs", 2), ("bs", None), ("is", 1), ("ms", 0), ("ms", 1), ("ms", 2), ("ms", None)]
EACH = [("bs", 1), ("is", 1), ("ms", 2)]


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def results(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), gradients(y, x, adapters(model))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,)], ids=str)
@pytest.mark.parametrize(("structure", "previous"), STRUCTURES)
def test_values_and_all_gradients_are_those_of_the_formula(structure, previous, shape):
    model = made(structure, previous)
    y, got = results(model, rows(*shape))
    want_y, x, leaves = by_formula(model, rows(*shape), structure, previous)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    for name, want in gradients(want_y, x, leaves).items():
        torch.testing.assert_close(got[name], want, rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
    assert got.keys() == {"x", *adapters(model)}


@pytest.mark.parametrize(("structure", "previous"), EACH)
def test_a_new_model_computes_what_its_base_computes(structure, previous):
    model = made(structure, previous)
    with torch.no_grad():
        for name, p in adapters(model).items():
            p.zero_() if "lora_B" in name else None
    want, _, _ = by_formula(model, rows(4), "bs", 0)
    torch.testing.assert_close(model(rows(4)), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "adapter"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize(("structure", "previous"), EACH)
def test_errors_in_other_dtypes_are_those_of_plain_torch(structure, previous, dtype, adapter):
    model = made(structure, previous, dtype, sizes=(33, 65), adapter_dtype=adapter)
    x = torch.randn(48, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    y, got = results(model, x)
    truth_y, *truth = by_formula(model, x, structure, previous)
    eager_y, *eager = by_formula(model, x, structure, previous, dtype)
    true, plain = gradients(truth_y, *truth), gradients(eager_y, *eager)

    def error(y, grads):
        off = [(y.double() - truth_y) / truth_y.norm()]
        off += [(grads[name].double() - true[name].double()) / true[name].double().norm() for name in true]
        return torch.cat([each.flatten() for each in off]).norm().item()

    assert y.dtype == dtype
    assert {got[name].dtype for name in adapters(model)} == {adapter or torch.float32}
    assert error(y, got) <= 1.25 * error(eager_y, plain)


@pytest.mark.parametrize(("structure", "previous"), EACH)
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_base_is_that_of_its_dequantised_weights(structure, previous, quant):
    model = made(structure, previous, torch.float32, sizes=(32, 64), quant=quant)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    dense = copy.deepcopy(model)
    for block in dense.blocks:
        for kind in ("q", "up", "down"):
            layer = block.get_submodule(kind)
            assert isinstance(layer, QuantizedLoRALinear)
            stand_in = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            stand_in.weight = nn.Parameter(layer.frozen_weight().dequantize(torch.float32), False)
            stand_in.bias = layer.bias
            stand_in.lora_A, stand_in.lora_B = layer.lora_A, layer.lora_B
            setattr(block, kind, stand_in)
    y, got = results(model, x)
    want_y, leaf, leaves = by_formula(dense, x, structure, previous)
    torch.testing.assert_close(y.double(), want_y, rtol=2e-5, atol=2e-5)
    for name, want in gradients(want_y, leaf, leaves).items():
        assert ((got[name] - want).norm() / want.norm()).item() < 2e-5, name


@pytest.mark.parametrize(("structure", "previous"), EACH)
def test_autocast_computes_in_its_dtype_and_keeps_fp32_adapters(structure, previous):
    model = made(structure, previous, torch.float32)
    x = rows(9, dtype=torch.float32)
    want, _, _ = by_formula(model, x, structure, previous)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - want).norm() / want.norm()).item() < 2**-6
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapters(model).values())


def test_block_shortcuts_are_one_lora_of_the_summed_rank_with_one_mask():
    layer = made("bs", None, lora_dropout=0.4).blocks[2].up
    plain = layer.as_lora()
    assert type(plain) is FusedLoRALinear
    assert (plain.r, plain.scaling, plain.lora_alpha, plain.lora_dropout) == (9, 4 / 3, 12, 0.4)
    for mode in (True, False):
        layer.train(mode), plain.train(mode)
        torch.manual_seed(8)
        y = layer(rows(50))
        torch.manual_seed(8)
        assert torch.equal(plain(rows(50)), y)
    layer.train()
    assert not torch.equal(layer(rows(50)), layer(rows(50)))


@pytest.mark.parametrize("structure", ["is", "ms"])
def test_dropout_takes_one_mask_for_the_sum_of_inputs_and_the_mask_of_its_block_for_h(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)).double()
    apply_reslora(model, structure, r=2, lora_alpha=2, lora_dropout=0.5)
    fill(model)
    torch.manual_seed(5)
    seeds = [draw_seed(torch.device("cpu")) for _ in range(2)]
    torch.manual_seed(5)
    leaf = rows(40).requires_grad_()
    y = model(leaf)
    x, (a0, b0, a1, b1) = rows(40).requires_grad_(), (p.detach().requires_grad_() for p in adapters(model).values())
    base = [lambda t, one=one: t @ one.weight.T + one.bias for one in model]
    if structure == "is":
        first = base[0](x) + dropout.dropout(x + x, 0.5, seeds[0]) @ a0.T @ b0.T
        want = base[1](first) + dropout.dropout(first + x, 0.5, seeds[1]) @ a1.T @ b1.T
    else:
        h = dropout.dropout(x, 0.5, seeds[0]) @ a0.T
        first = base[0](x) + h @ b0.T
        want = base[1](first) + (dropout.dropout(first, 0.5, seeds[1]) @ a1.T + h) @ b1.T
    torch.testing.assert_close(y, want)
    got = gradients(y, leaf, adapters(model))
    want = gradients(want, x, dict(zip(adapters(model), (a0, b0, a1, b1), strict=True)))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    model.eval()
    assert torch.equal(model(rows(40)), model(rows(40)))


def test_block_shortcuts_save_x_once_and_h_of_the_summed_rank():
    x = rows(64).requires_grad_()
    layer = made("bs", None).blocks[2].up
    factors = 9 * (K + N) * 8  # the stacked A and B
    assert saved_bytes(lambda: layer(x)) == saved_bytes(lambda: layer.as_lora()(x)) + factors
    assert saved_bytes(lambda: layer(x)) == 64 * (K + 9) * 8 + factors


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("structure", ["is", "ms"])
def test_shortcuts_of_activations_save_one_more_h_than_lora_and_no_sum_and_no_mask(structure, p):
    x = rows(64).requires_grad_()
    plain, model = (nn.Sequential(*(nn.Linear(K, K) for _ in range(3))).double() for _ in range(2))
    apply_lora(plain, r=2, lora_dropout=p)
    apply_reslora(model, structure, r=2, lora_dropout=p)
    h, one = 64 * 2 * 8, 2 * 2 * 8
    matrices = 0 if structure == "is" else 3 * one  # in every layer
    assert saved_bytes(lambda: model(x)) == saved_bytes(lambda: plain(x)) + 2 * h + matrices


def test_the_scale_of_a_layer_is_that_of_all_its_terms():
    model = made("bs", None)
    layer = model.blocks[2].q
    x, zero = rows(3), torch.zeros(())
    update = layer(x) - x @ layer.weight.T
    layer.scaling = 2.0
    torch.testing.assert_close(layer(x) - x @ layer.weight.T, update * 2 / (4 / 3))
    layer.scaling = 0.0
    assert (layer(x) - x @ layer.weight.T).abs().max() <= zero
    model.blocks[0].q.scaling = 0.0
    layer.scaling = 4 / 3
    torch.testing.assert_close(layer(x) - x @ layer.weight.T, update)


def test_the_state_has_every_factor_once_and_loads_into_another_model():
    model, other = made("bs", None), fill(made("bs", None), 9)
    state = model.state_dict()
    assert [name for name in state if "lora_" in name] == list(adapters(model))
    assert len(adapters(model)) == len({id(p) for p in adapters(model).values()}) == 18
    other.load_state_dict(state)
    assert torch.equal(other(rows(4)), model(rows(4)))
    assert not any(isinstance(child, ResLoRALinear) for child in model.blocks[2].q.children())


@pytest.mark.parametrize(("structure", "previous"), EACH)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_references_inside_of_itself(structure, previous, copied):
    model = made(structure, previous)
    other = copied(model)
    y = model(rows(4))
    assert torch.equal(other(rows(4)), y)
    own = set(map(id, other.modules()))
    for name, layer in other.named_modules():
        if isinstance(layer, ResLoRALinear):
            assert all(id(each) in own for each in layer.earlier), name
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(rows(4)), y)
    other(rows(4)).sum().backward()
    assert all(p.grad is not None for p in adapters(other).values())
    assert all(p.grad is None for p in model.parameters())


def test_one_layer_is_copied_with_those_before_it():
    layer = made("bs", None).blocks[2].up
    other = copy.deepcopy(layer)
    assert torch.equal(other(rows(4)), layer(rows(4)))
    assert other.earlier[0] is not layer.earlier[0]


def test_a_model_that_is_moved_and_converted_moves_its_shortcuts():
    model = made("bs", None).float()
    assert model(rows(4, dtype=torch.float32)).dtype == torch.float32
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    x = rows(4, dtype=torch.float32)
    assert torch.equal(empty(x), model(x))


def test_a_swap_of_parameters_for_one_call_reaches_the_shortcuts():
    model, other = made("bs", None), fill(made("bs", None), 9)
    y = torch.func.functional_call(model, adapters(other), rows(4))
    assert torch.equal(y, other(rows(4)))


@pytest.mark.parametrize("previous", [0, 1, 2, None])
def test_block_shortcuts_merge_without_an_error(previous):
    model = made("bs", previous)
    y, x = model(rows(6)), rows(6)
    for block in model.blocks:
        block.up.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    before = {n: p for n, p in model.named_parameters() if n.endswith("up.weight")}
    for block in model.blocks:
        block.up.unmerge()
    assert all(p is not before[n] for n, p in model.named_parameters() if n in before)
    assert torch.equal(model(x), y)
    merge_and_unload(model)
    assert {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_a_quantised_layer_merges_all_of_its_terms_and_tells_the_loss():
    model = made("bs", None, torch.float32, sizes=(32, 64), quant="int8")
    layer = model.blocks[2].up
    x = torch.randn(5, 32)
    want, w = layer(x), layer.frozen_weight().dequantize(torch.float32).double()
    torch.testing.assert_close(layer.to_linear()(x), want, rtol=1e-4, atol=1e-5)
    a, b = layer.factors()
    merged = w + 4 / 3 * b.double() @ a.double()
    report = layer.merge(lossy=True)
    stored = layer.quantized_weight().dequantize(torch.float32).double()
    assert report.error == pytest.approx(((stored - merged).norm() / merged.norm()).item(), rel=1e-4)
    assert report.update == pytest.approx(((merged - w).norm() / merged.norm()).item(), rel=1e-4)
    layer.unmerge()
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize(("structure", "previous"), [("is", 1), ("ms", 1)])
def test_shortcuts_of_activations_are_not_merged(structure, previous):
    model = made(structure, previous)
    before = copy.deepcopy(model.state_dict())
    for change in (lambda: model.blocks[1].q.merge(), model.blocks[1].q.to_linear, lambda: merge_and_unload(model)):
        with pytest.raises(
            ValueError, match=rf'structure="{structure}" reads activations.*reslora_to_lora\(model, inp'
        ):
            change()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_replicas_of_data_parallel_are_refused():
    with pytest.raises(RuntimeError, match="take DistributedDataParallel"):
        made("bs").blocks[1].q._replicate_for_data_parallel()


def test_a_factor_that_is_a_part_of_itself_or_without_values_is_refused():
    model = made("bs")
    first, second = model.blocks[0].q, model.blocks[1].q
    whole = first.lora_A
    first.lora_A = nn.Parameter(whole.detach()[:2])
    with pytest.raises(ValueError, match=r"factor \(3, 7\) of an earlier layer is sharded here, Parameter \(2, 7\)"):
        second(rows(2))
    first.lora_A = nn.Parameter(whole.detach().to("meta"))
    with pytest.raises(ValueError, match="on the meta device"):
        second(rows(2))


def test_the_settings_are_shown():
    assert repr(made("ms", 2).blocks[2].q).endswith("scaling=1.33333, structure='ms', earlier=2)")
