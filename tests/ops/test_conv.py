"""A convolution with LoRA agrees with the equation in fp64, whatever its shape, dtype, padding and place in memory."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from support.conv_problems import Problem, equation, evaluate, keep_mask, plain_torch, problem
from torch import Tensor

from lora_kernels import lora_conv
from lora_kernels.core import accuracy, dropout

ENOUGH = 1024
"""The number of roundings from which two RMS errors can be compared, as in `lora_kernels.testing.judge`."""


def ours(q: Problem, **kwargs) -> Tensor:
    return lora_conv(
        q.x, q.w, q.a, q.b, scale=q.scale, bias=q.bias, dropout_p=q.p, seed=q.seed, magnitude=q.m, **q.moves, **kwargs
    )


def agrees(q: Problem, **kwargs) -> None:
    """Check y and all gradients against the equation in fp64."""
    want, got = evaluate(q, equation), evaluate(q, ours, **kwargs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def as_good_as_torch(q: Problem, **kwargs) -> None:
    """Check y and all gradients: their errors may be those of torch's convolutions in the same dtypes."""
    dy = evaluate(q, plain_torch)["y"]
    dy = torch.randn(dy.shape, generator=torch.Generator().manual_seed(3)).to(q.x.dtype)
    want = evaluate(q.to(torch.float64), equation, dy)
    got, plain = evaluate(q, ours, dy, **kwargs), evaluate(q, plain_torch, dy)
    for name, value in want.items():
        assert got[name].dtype == plain[name].dtype
        errors = accuracy.errors_beside(got[name], value, plain[name])
        if value.numel() >= ENOUGH:
            assert errors.fault is None, f"{name}: {errors.fault}"
        else:  # the fewer numbers there are, the further may two RMS errors of the same kind lie apart
            allowed = errors.rms_allowed / accuracy.RATIO * accuracy.RATIO ** (ENOUGH / value.numel()) ** 0.5
            assert errors.rms <= allowed, f"{name}: RMS error {errors.rms:.3g}, allowed {allowed:.3g}"


# --- the equation ---

SIZES = {1: (9,), 2: (7, 8), 3: (5, 6, 7)}


def combinations() -> list[tuple]:
    """Return a sample of the arguments of a convolution, the same in every run, with every value of each of them."""
    values = (
        (1, 2, 3),  # dimensions
        (1, 2, 3),  # kernel
        (1, 2),  # stride
        (0, 1, (1, 2, 0), "same", "valid"),  # padding
        (1, 2),  # dilation
        ("zeros", "reflect", "replicate", "circular"),
        ((1, False), (2, False), (2, True)),  # groups, and whether A is in them
        (False, True),  # channels_last
    )
    every = [each for each in itertools.product(*values) if not (each[3] == "same" and each[2] > 1)]
    return random.Random(1).sample(every, 150)


def test_values_and_gradients_equal_the_equation():
    for n, k, stride, padding, dilation, mode, (groups, grouped), last in combinations():
        sides = padding[:n] if isinstance(padding, tuple) else padding
        moves = {"stride": stride, "padding": sides, "dilation": dilation, "padding_mode": mode}
        q = problem((2, 4, *SIZES[n]), 6, (k,) * n, groups=groups, grouped=grouped, channels_last=last, **moves)
        agrees(q)


@pytest.mark.parametrize("groups", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("last", [False, True])
def test_a_call_that_is_folded_equals_the_equation(groups, last):
    q = problem((4, 4, 17, 16), 6, (3, 3), groups=groups[0], grouped=groups[1], channels_last=last, padding=1)
    assert q.x.shape[0] * 17 * 16 >= 1024
    agrees(q)


@pytest.mark.parametrize(
    ("x", "kernel", "moves"),
    [
        ((2, 5, 6, 8), (2, 4), {"stride": (2, 4)}),
        ((2, 5, 7, 9), (2, 4), {"stride": (2, 4), "padding": "valid"}),  # a rest that no patch holds
        ((2, 3, 4, 6, 6), (2, 3, 3), {"stride": (2, 3, 3)}),
        ((2, 3, 12), (4,), {"stride": 4}),
        ((2, 3, 5, 8), (1, 4), {"stride": (2, 4)}),
        ((2, 5, 7, 9), (1, 1), {"stride": (2, 3)}),
        ((2, 5, 1, 1), (1, 1), {}),
        ((2, 5, 6, 7), (1, 1), {}),
    ],
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_patches_and_single_positions_equal_the_equation(x, kernel, moves, last, dora):
    agrees(problem(x, 6, kernel, channels_last=last, dora=dora, **moves))


@pytest.mark.parametrize("bias", [False, True])
def test_one_sample_an_empty_batch_and_a_strided_x(bias):
    q = problem((2, 4, 7, 8), 6, (3, 3), padding=1, bias=bias)
    whole = ours(q)
    torch.testing.assert_close(ours(replace(q, x=q.x[1])), whole[1])
    strided = torch.stack((q.x, q.x), -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(ours(replace(q, x=strided)), whole)
    for moves in ({}, {"stride": 3}, {"padding_mode": "circular"}):
        empty = replace(q, x=q.x[:0], moves=q.moves | moves)
        got = evaluate(empty, ours)
        assert got["y"].shape[0] == 0 and not got["da"].any() and not got["db"].any()
        assert got["da"].shape == q.a.shape and got["dx"].shape == empty.x.shape


# --- dropout ---


@pytest.mark.parametrize(
    "moves", [{"padding": 1}, {"padding": 2, "padding_mode": "circular", "stride": 2}, {"padding": "same"}]
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [(1, False), (2, False), (2, True)])
def test_dropout_is_the_mask_of_x_as_it_lies_in_memory(moves, last, groups):
    for kernel in ((3, 3), (2, 2)):
        q = problem((3, 4, 7, 8), 6, kernel, p=0.4, groups=groups[0], grouped=groups[1], channels_last=last, **moves)
        assert 0.4 < keep_mask(q).double().mean() < 0.8
        agrees(q)


@pytest.mark.parametrize(
    ("kernel", "moves", "last"),
    [
        ((1, 1), {"stride": 2}, False),
        ((1, 1), {"stride": 2}, True),
        ((1, 1), {}, True),
        ((3, 4), {"stride": (3, 4)}, False),
    ],
)
def test_dropout_of_rows_is_the_mask_of_the_rows(kernel, moves, last):
    agrees(problem((3, 4, 6, 8), 6, kernel, p=0.4, rows=True, channels_last=last, **moves))


def test_each_call_draws_a_mask_that_the_seed_of_torch_repeats():
    q = replace(problem((3, 4, 7, 8), 6, (3, 3), p=0.5), seed=None)
    torch.manual_seed(5)
    one, two = ours(q), ours(q)
    torch.manual_seed(5)
    assert torch.equal(ours(q), one) and not torch.equal(one, two)


# --- dtypes ---

SHAPES = {
    "folded": {"x": (2, 16, 24, 24), "padding": 1},
    "two branches": {"x": (2, 16, 20, 20), "padding": 1},
    "channels_last": {"x": (2, 16, 20, 20), "padding": 1, "channels_last": True},
    "dropout": {"x": (2, 16, 20, 20), "padding": 1, "p": 0.2},
    "dropout, channels_last": {"x": (2, 16, 20, 20), "padding": 1, "p": 0.2, "channels_last": True},
    "groups": {"x": (2, 16, 20, 20), "padding": 1, "groups": 2},
}
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32),
    "fp16, fp32 adapters": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_those_of_torchs_convolutions(shape, dtype):
    kind, adapter = DTYPES[dtype]
    as_good_as_torch(problem(N=24, kernel=(3, 3), R=8, dtype=kind, adapter_dtype=adapter, **SHAPES[shape]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_errors_of_dora_are_those_of_torchs_convolutions(dtype, p):
    kind, adapter = DTYPES[dtype]
    as_good_as_torch(
        problem((2, 16, 20, 20), 24, (3, 3), 8, dtype=kind, adapter_dtype=adapter, padding=1, dora=True, p=p)
    )


def test_an_update_far_below_the_rounding_of_w_is_not_lost_in_16_bits():
    q = problem((2, 16, 24, 24), 24, (3, 3), 8, dtype=torch.bfloat16, padding=1, bias=False)
    small = replace(q, w=q.w * 0, b=q.b)
    base = replace(q, scale=0.0)
    moved = (ours(replace(q, scale=2**-6)).double() - ours(base).double()).mean(0)
    alone = ours(replace(small, scale=2**-6)).double().mean(0)
    assert (moved * alone).sum() / alone.square().sum() == pytest.approx(1, abs=0.1)


# --- DoRA ---


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("groups", [(1, False), (2, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_equals_the_equation(p, groups, bias):
    in_groups = {"groups": groups[0], "grouped": groups[1]}
    for n, moves in (
        (1, {"padding": 1}),
        (2, {"padding": "same", "dilation": 2}),
        (2, {"padding": 1, "padding_mode": "reflect"}),
    ):
        agrees(problem((2, 4, *SIZES[n]), 6, (3,) * n, dora=True, p=p, bias=bias, **in_groups, **moves))


# --- which gradients ---


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("positions", [16, 40])
def test_gradients_do_not_depend_on_which_others_are_wanted(p, positions):
    q = problem((2, 4, positions, positions), 6, (3, 3), padding=1, p=p)
    whole = evaluate(q, ours)
    for wanted in itertools.chain.from_iterable(itertools.combinations("xab", r) for r in (1, 2)):
        leaves = {name: getattr(q, name).clone().requires_grad_(name in wanted) for name in "xab"}
        y = ours(replace(q, **leaves))
        torch.testing.assert_close(y.detach(), whole["y"])
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().double())
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, whole[f"d{name}"])
            else:
                assert leaf.grad is None


def test_gradients_are_bit_identical_from_run_to_run():
    for shape in ("folded", "dropout", "groups"):
        q = problem(N=24, kernel=(3, 3), R=8, dtype=torch.float32, **SHAPES[shape])
        one, two = evaluate(q, ours), evaluate(q, ours)
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_gradients_the_values_are_the_same(p):
    q = problem((2, 4, 24, 24), 6, (3, 3), padding=1, p=p)
    with_graph = ours(replace(q, a=q.a.clone().requires_grad_()))
    with torch.no_grad():
        assert torch.equal(ours(q), with_graph)
    with torch.inference_mode():
        assert torch.equal(ours(q), with_graph)


def test_a_scale_that_is_a_tensor_gets_its_gradient():
    q = problem((2, 4, 7, 8), 6, (3, 3))
    s = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    y = ours(replace(q, scale=s))
    torch.testing.assert_close(y.detach(), ours(q))
    (grad,) = torch.autograd.grad(y.sum(), s)
    torch.testing.assert_close(grad, (ours(replace(q, scale=1.0)) - ours(replace(q, scale=0.0))).sum())


def test_the_factor_of_dropout_is_exact():
    q = problem((2, 4, 7, 8), 6, (1, 1), p=0.3, bias=False)
    kept = ours(replace(q, w=q.w * 0)) / (q.scale * dropout.rescale(0.3))
    torch.testing.assert_close(kept, torch.conv2d(torch.conv2d(q.x * keep_mask(q), q.a), q.b))
