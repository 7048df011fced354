"""ResLoRA as plain LoRA: α and the error are those of a direct computation."""

from __future__ import annotations

import copy

import pytest
import torch
from support.residual_models import adapters, made

from lora_kernels import FusedLoRALinear, merge_and_unload, reslora_to_lora, save_adapter
from lora_kernels.nn.quantized import QuantizedLoRALinear

X = torch.randn(9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
HOW = [
    ("is", 1, "fit"),
    ("is", 1, "inputs"),
    ("is", 1, "weights"),
    ("ms", 2, "fit"),
    ("ms", 2, "inputs"),
    ("ms", 2, "middle"),
]


def reads(model) -> dict[str, torch.Tensor]:
    """Return what each layer reads in a forward."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            handles.append(
                module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: args[0].detach()}))
            )
    model(X)
    for handle in handles:
        handle.remove()
    return found


def layer_by_hand(model, x, n, kind, alphas, how):
    """Return the exact and the approximated output of a layer, by the formulas."""
    plain = model.blocks[n].get_submodule(kind)
    a = [adapters(model)[f"blocks.{i}.{kind}.lora_A"] for i in range(3)]
    b, own, s = adapters(model)[f"blocks.{n}.{kind}.lora_B"], x[f"blocks.{n}.{kind}"], 4 / 3
    y = own @ plain.weight.T + (0 if plain.bias is None else plain.bias)
    if plain.structure == "is":
        exact = (own + x[f"blocks.{max(n - 1, 0)}.{kind}"]) @ a[n].T
        near = (1 + alphas[0]) * own @ a[n].T
    else:
        exact = sum(x[f"blocks.{i}.{kind}"] @ a[i].T for i in range(n + 1))
        terms = [a[n]] * len(alphas) if how == "middle" else [a[n - k] for k in range(1, n + 1)]
        near = own @ a[n].T + sum(alpha * own @ c.T for alpha, c in zip(alphas, terms, strict=True))
    return y, s * exact @ b.T, s * near @ b.T


@pytest.mark.parametrize(("structure", "previous", "how"), HOW)
def test_the_errors_and_the_new_layers_are_those_of_a_direct_computation(structure, previous, how):
    model = made(structure, previous)
    before, x, y = copy.deepcopy(model), reads(model), model(X).detach()
    report = reslora_to_lora(model, X, how)
    assert {type(m) for m in model.blocks.modules() if "LoRA" in type(m).__name__} == {FusedLoRALinear}
    with torch.no_grad():
        for n in range(3):
            for kind in ("q", "up", "down"):
                name = f"blocks.{n}.{kind}"
                alphas, of_output, of_update = report.layers[name]
                base, exact, near = layer_by_hand(before, x, n, kind, alphas, how)
                torch.testing.assert_close(model.get_submodule(name)(x[name]), base + near, rtol=1e-9, atol=1e-9)
                assert of_output == pytest.approx(((near - exact).norm() / (base + exact).norm()).item(), abs=1e-12)
                assert of_update == pytest.approx(((near - exact).norm() / exact.norm()).item(), abs=1e-12)
                assert model.get_submodule(name).r == 3
    assert report.of_model == pytest.approx(((model(X) - y).norm() / y.norm()).item(), rel=1e-9)
    assert report.of_model > 0.01
    assert report.layers["blocks.2.q"].of_update > 0.01
    assert report.layers["blocks.0.q"].of_update == 0
    text = str(report)
    assert f'structure "{structure}", how="{how}"; error of the model\'s output: {report.of_model:.2g}' in text
    assert f"{report.layers['blocks.2.q'].of_update:.2g}" in text


def test_alphas_are_the_ratios_that_their_names_say():
    for structure, previous, how in HOW:
        model = made(structure, previous)
        x, weights = reads(model), {name: p.detach().clone() for name, p in model.named_parameters()}
        alphas = reslora_to_lora(model, X, how).layers["blocks.2.up"].alphas
        inputs = [x[f"blocks.{i}.up"] for i in range(3)]
        norms = [each.norm().item() for each in inputs]
        middle = [(inputs[i] @ weights[f"blocks.{i}.up.lora_A"].T).norm().item() for i in range(3)]
        merged = [
            (
                weights[f"blocks.{i}.up.weight"]
                + 4 / 3 * weights[f"blocks.{i}.up.lora_B"] @ weights[f"blocks.{i}.up.lora_A"]
            )
            for i in range(3)
        ]
        want = {
            ("is", "inputs"): [norms[1] / norms[2]],
            ("is", "weights"): [(merged[0].norm() / merged[1].norm()).item()],
            ("ms", "inputs"): [norms[1] / norms[2], norms[0] / norms[2]],
            ("ms", "middle"): [middle[1] / middle[2], middle[0] / middle[2]],
        }.get((structure, how))
        if want is not None:
            assert alphas == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("structure", "previous"), [("is", 1), ("ms", 2)])
def test_fitted_alphas_make_the_error_smallest(structure, previous):
    model = made(structure, previous)
    x = reads(model)
    report = reslora_to_lora(copy.deepcopy(model), X)
    for n, kind in ((1, "q"), (2, "up"), (2, "down")):
        alphas = list(report.layers[f"blocks.{n}.{kind}"].alphas)

        def error(alphas, n=n, kind=kind):
            _, exact, near = layer_by_hand(model, x, n, kind, alphas, "fit")
            return (near - exact).norm().item()

        least = error(alphas)
        for k in range(len(alphas)):
            for step in (-1e-2, 1e-2):
                assert error([a + step * (i == k) for i, a in enumerate(alphas)]) > least
    for how in ("inputs", "weights" if structure == "is" else "middle"):
        other = reslora_to_lora(copy.deepcopy(model), X, how)
        if how != "middle":  # which has other matrices
            assert all(report.layers[n].of_update <= each.of_update + 1e-12 for n, each in other.layers.items())


def test_blocks_that_read_the_same_x_become_lora_without_an_error():
    model = made("is")
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.zero_(), block.down.bias.zero_(), block.down.lora_B.zero_()
    y = model(X)
    report = reslora_to_lora(model, X)
    assert report.layers["blocks.2.q"].alphas == pytest.approx((1.0,))
    assert report.of_model < 1e-12
    torch.testing.assert_close(merge_and_unload(model)(X), y)


def test_block_shortcuts_become_lora_of_the_summed_rank_without_inputs_or_error(tmp_path):
    model = made("bs", None, lora_dropout=0.25).eval()
    y = model(X)
    trained = {name: p.requires_grad for name, p in adapters(model).items()}
    report = reslora_to_lora(model)
    assert torch.equal(model(X), y)
    assert (report.of_model, report.layers["blocks.2.q"]) == (None, ((1.0, 1.0), 0.0, 0.0))
    assert '9 layers of structure "bs" are plain LoRA of rank Σr now, without an error' in str(report)
    assert [model.blocks[i].up.r for i in range(3)] == [3, 6, 9]
    assert {name: p.requires_grad for name, p in adapters(model).items()} == trained
    assert len({id(p) for p in adapters(model).values()}) == 18
    save_adapter(model, tmp_path)


def test_a_quantised_base_stays_as_it_is():
    model = made("is", 1, torch.float32, sizes=(32, 64), quant="int8")
    codes = model.blocks[1].q.weight
    report = reslora_to_lora(model, torch.randn(6, 32))
    assert type(model.blocks[1].q) is QuantizedLoRALinear and model.blocks[1].q.weight is codes
    assert 0 < report.layers["blocks.1.q"].of_update < 1


def test_nothing_of_the_shortcuts_is_left():
    model = made("ms", 2)
    model.blocks[0].q.eval()
    modes = [module.training for module in model.modules()]
    reslora_to_lora(model, X)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in model.modules())
    assert [module.training for module in model.modules()] == modes
    model.blocks[1](X)  # a block alone is no error any more


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1])
def test_an_error_leaves_the_model_as_it_was(after):
    model = made("is")
    before = [(name, id(module)) for name, module in model.named_modules()]
    y, forward, calls = model(X), model.forward, []

    def failing(x):
        calls.append(x)
        if len(calls) > after:
            raise Stop
        return forward(x)

    model.forward = failing
    with pytest.raises(Stop):
        reslora_to_lora(model, X)
    model.forward = forward
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(model(X), y)
    for change, message in (
        (lambda: reslora_to_lora(model), "approximately only: give inputs of the model"),
        (lambda: reslora_to_lora(model, X, "middle"), r'how must be one of fit, inputs, weights for structure "is"'),
        (lambda: reslora_to_lora(model, X * torch.nan), "read no rows, or values that are NaN"),
        (lambda: reslora_to_lora(model, X[:0]), "read no rows, or values that are NaN"),
        (lambda: reslora_to_lora(torch.nn.Linear(2, 2), X), r"no layer with ResLoRA: apply_reslora\(model\) first"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    assert torch.equal(model(X), y)


def test_outputs_of_transformers_and_others_are_compared():
    model = made("is")
    inner = type(model).forward
    for wrap, known in (
        (lambda y: {"ids": y.long(), "logits": y}, True),
        (lambda y: (y, None), True),
        (lambda y: [1], False),
    ):
        other = copy.deepcopy(model)
        other.forward = lambda x, other=other, wrap=wrap: wrap(inner(other, x))
        report = reslora_to_lora(other, X)
        assert (report.of_model is not None) is known
        assert ("unknown" in str(report)) is not known
