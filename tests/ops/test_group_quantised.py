"""`lora_linear_group` over weights in 4 and 8 bits gives the bits of single calls, and saves x once and codes only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging
from torch import Tensor

from lora_kernels import lora_linear, quantize_weight
from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.ops.weights import each_weight, each_weight_parts
from lora_kernels.testing import judge

FP32, BF16 = torch.float32, torch.bfloat16
KINDS = [
    {"format": "nf4", "double_quant": True},
    None,  # a dense weight among the others
    {"format": "nf4"},
    {"format": "int8"},
    {"format": "fp8", "scaling": "block"},
]


def problems(M: int, K: int, *sizes: tuple[int, int], p: float = 0.0, kinds=KINDS, **kwargs) -> list[judge.Problem]:
    """Return problems of layers over the same x, each with a weight of another kind."""
    qs = [judging.problem(M, N, K, R, p=p * i, seed=i, **kwargs) for i, (N, R) in enumerate(sizes, 1)]
    return [
        replace(q, x=qs[0].x, w=q.w if kind is None else quantize_weight(q.w.float(), **kind))
        for q, kind in zip(qs, kinds, strict=False)
    ]


def run(qs: list[judge.Problem], used: list[int], how=lora_linear_group) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return dx, and for each layer y, da, db and dbias. Only the layers in `used` take part in the backward."""
    x = qs[0].x.detach().requires_grad_()
    leaves = [{name: getattr(q, name).detach().requires_grad_() for name in ("a", "b", "bias")} for q in qs]
    layers = [Layer(q.w, t["a"], t["b"], q.scale, t["bias"], q.p, q.seed) for q, t in zip(qs, leaves, strict=True)]
    ys = how(x, layers)
    torch.autograd.backward([ys[i] for i in used], [qs[i].dy for i in used])
    results = [
        {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in t.items()} for y, t in zip(ys, leaves, strict=True)
    ]
    return x.grad, results


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(97, 130, (88, 8), (40, 8), (52, 8), (64, 8), (40, 8)), (3, 66, (7, 3), (9, 2))], ids=str
)
def test_values_and_gradients_have_the_bits_of_single_layers(size, dtypes, p, backend):
    qs = problems(*size, p=p, dtype=dtypes[0], adapter_dtype=dtypes[1])

    def group(x, layers):
        return lora_linear_group(x, layers, backend=backend)

    dx, results = run(qs, list(range(len(qs))), group)
    want = []
    for q, got in zip(qs, results, strict=True):
        single = judge.evaluate(q, lora_linear, backend=backend)
        want.append(single["dx"])
        for name, value in got.items():
            assert torch.equal(value, single[name]), name
    eps = torch.finfo(dtypes[0]).eps
    exact = sum(each.double() for each in want)
    largest = sum(each.double().abs().max() for each in want)
    assert (dx.double() - exact).abs().max() <= len(want) * eps * largest
    again, _ = run(qs, list(range(len(qs))), group)
    assert torch.equal(again, dx)


def test_layers_whose_output_is_not_used_have_no_gradient():
    qs = problems(33, 66, (40, 4), (24, 3), (16, 2), p=0.2)
    dx, results = run(qs, used=[2])
    assert torch.equal(dx, judge.evaluate(qs[2], lora_linear)["dx"])
    assert [got["da"] is None for got in results] == [True, True, False]


def test_a_bias_of_another_dtype_autocast_and_leading_dimensions_are_served():
    qs = problems(12, 66, (16, 4), (8, 2), kinds=[KINDS[0], KINDS[3]], p=0.1)
    x = qs[0].x.view(3, 2, 2, 66)
    layers = [Layer(q.w, q.a, q.b, torch.tensor(q.scale), q.bias.bfloat16(), q.p, q.seed) for q in qs]
    for autocast in (False, True):
        with torch.autocast("cpu", BF16, enabled=autocast):
            for y, each in zip(lora_linear_group(x.clone().requires_grad_(), layers), layers, strict=True):
                want = lora_linear(
                    x, each.weight, each.lora_a, each.lora_b, scale=each.scale, bias=each.bias,
                    dropout_p=each.dropout_p, seed=each.seed,
                )  # fmt: skip
                assert y.shape == (3, 2, 2, each.weight.shape[0]) and torch.equal(y, want)
                assert y.dtype == (BF16 if autocast else FP32)


def test_x_is_saved_once_and_no_weight_but_its_codes():
    qs = problems(64, 96, (40, 4), (48, 4), (24, 4), kinds=[KINDS[0], KINDS[2], KINDS[3]])
    x = qs[0].x.requires_grad_()
    layers = [Layer(q.w, q.a.requires_grad_(), q.b.requires_grad_(), 0.5) for q in qs]
    own = sum(q.w.nbytes + q.a.nbytes + q.b.nbytes for q in qs)
    saved = judging.saved_bytes(lambda: lora_linear_group(x, layers))
    assert saved <= own + x.nbytes + 3 * 64 * 4 * 4


def test_weights_are_taken_apart_and_put_together_again():
    qs = problems(3, 66, *[(8, 2)] * 5)
    whole = [q.w for q in qs]
    back = each_weight(*each_weight_parts(whole), FP32)
    for one, other in zip(whole, back, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Tensor):
            assert one is other
        else:
            assert all(a is b for a, b in zip(one.tensors, other.tensors, strict=True))
            assert (one.format, one.blocksize, one.shape) == (other.format, other.blocksize, other.shape)
    dense = [q.w for q in qs if isinstance(q.w, Tensor)]
    assert each_weight_parts(dense) == (dense, None, None, None)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_operators_pass_opcheck(p):
    qs = problems(4, 66, (5, 2), (3, 1), (4, 2), p=p)
    columns = [[getattr(q, name) for q in qs] for name in ("a", "b", "bias", "scale", "p", "seed")]
    a, b, bias, scale, rates, seed = columns
    w, *last = each_weight_parts([q.w for q in qs])
    args = (qs[0].x, w, a, b, bias, scale, rates, seed, None, [True, False, True], *last)
    torch.library.opcheck(torch.ops.lora_kernels.forward_group.default, args)
    h = torch.ops.lora_kernels.forward_group(*args)[3:]
    needs = True, [True, True, False], [True, False, True]
    back = ([q.dy for q in qs], qs[0].x, w, a, b, h, scale, rates, seed, None, *needs, *last)
    torch.library.opcheck(torch.ops.lora_kernels.backward_group.default, back)
    with pytest.raises(TypeError, match="one floating dtype"):
        torch.ops.lora_kernels.forward_group(qs[0].x, [w[0], w[1].half(), w[2]], *args[2:])


def test_a_group_compiles_without_a_break():
    qs = problems(6, 66, (5, 2), (3, 1), (4, 2))
    leaves = [t.detach().requires_grad_() for q in qs for t in (q.a, q.b)]

    def step(x, *ab):
        ys = lora_linear_group(x, [Layer(q.w, a, b, 0.5) for q, a, b in zip(qs, ab[::2], ab[1::2], strict=True)])
        return ys[0].square().sum() + ys[1].sum() + ys[2].sum()

    x = qs[0].x.requires_grad_()
    want = torch.autograd.grad(step(x, *leaves), (x, *leaves))
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(x, *leaves), (x, *leaves))
    assert all(map(torch.equal, got, want))


def test_the_flops_are_those_of_dense_weights():
    from torch.utils.flop_counter import FlopCounterMode

    qs = problems(6, 66, (5, 2), (3, 1))
    counts = []
    for each in (qs, [replace(q, w=q.w if isinstance(q.w, Tensor) else q.w.dequantize(FP32)) for q in qs]):
        with FlopCounterMode(display=False) as counter:
            run(each, [0, 1])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_trace_computes_it_in_plain_torch():
    qs = problems(6, 66, (5, 2), (3, 1), kinds=[KINDS[0], KINDS[3]])
    layers = [Layer(q.w.check(), q.a, q.b, 0.5, q.bias) for q in qs]
    traced = torch.jit.trace(lambda x: lora_linear_group(x, layers), (qs[0].x,), check_trace=False)
    for got, want in zip(traced(qs[0].x), lora_linear_group(qs[0].x, layers), strict=True):
        torch.testing.assert_close(got, want)
