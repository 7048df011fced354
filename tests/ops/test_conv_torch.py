"""A convolution with LoRA saves little, and works with what torch has: autocast, compilers, transforms, checkpointing,
tracers, counters; and it refuses what it cannot compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.conv_problems import Problem, equation, evaluate, plain_torch, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import lora_conv


def ours(q: Problem, **kwargs) -> Tensor:
    return lora_conv(
        q.x, q.w, q.a, q.b, scale=q.scale, bias=q.bias, dropout_p=q.p, seed=q.seed, magnitude=q.m, **q.moves, **kwargs
    )


def leaves(q: Problem, wanted: str = "xab") -> Problem:
    return replace(q, **{name: getattr(q, name).detach().requires_grad_(name in wanted) for name in "xab"})


# --- memory ---


class Made(TorchDispatchMode):
    """Counts the tensors that operators make, views left out, by their number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return out


def saved_by(q: Problem) -> tuple[Tensor, list[Tensor]]:
    """Return y, and what autograd keeps beside the operands, x included, each storage once."""
    kept: dict[int, Tensor] = {}
    operands = {t.untyped_storage().data_ptr() for t in (q.w, q.a, q.b, q.bias, q.m) if t is not None}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in operands:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ours(q)
    return y, list(kept.values())


@pytest.mark.parametrize("last", [False, True])
def test_a_folded_call_saves_x_alone_and_makes_nothing_of_the_size_of_y_beside_it(last):
    q = leaves(problem((2, 8, 24, 24), 12, (3, 3), padding=1, channels_last=last))
    y, kept = saved_by(q)
    assert [t.data_ptr() for t in kept] == [q.x.data_ptr()]
    with Made() as forward:
        ours(q)
    assert forward.sizes.count(y.numel()) == 1 and q.x.numel() not in forward.sizes
    dy = torch.ones_like(y)
    with Made() as backward:
        y.backward(dy)
    # dx alone has x's size, W' that of W: there is no dW.
    assert backward.sizes.count(q.x.numel()) == 1 and y.numel() not in backward.sizes
    assert backward.sizes.count(q.w.numel()) == 1


@pytest.mark.parametrize("moves", [{"padding": 1}, {"padding": 1, "groups": 2}])
def test_with_dropout_x_and_the_seed_are_saved_and_neither_the_mask_nor_x_hat(moves):
    q = leaves(problem((2, 8, 24, 24), 12, (3, 3), p=0.1, **moves))
    _, kept = saved_by(replace(q, seed=None))
    assert sorted(t.numel() for t in kept) == [1, q.x.numel()]
    few = leaves(problem((2, 64, 10, 10), 12, (3, 3), p=0.1, **moves))  # h is small beside x, and saved
    _, kept = saved_by(few)
    assert sorted(t.numel() for t in kept) == [1, 2 * 4 * 10 * 10 if moves == {"padding": 1} else 800, few.x.numel()]


@pytest.mark.parametrize("positions", [16, 40])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_with_a_frozen_a_only_h_is_saved(positions, p):
    q = leaves(problem((2, 8, positions, positions), 12, (3, 3), padding=1, p=p), "xb")
    _, kept = saved_by(q)
    assert sorted(t.numel() for t in kept) == [1] * bool(p) + [2 * 4 * positions**2]


def test_dora_saves_x_and_one_tensor_of_the_size_of_y():
    for p in (0.0, 0.2):
        q = leaves(problem((2, 16, 9, 9), 12, (3, 3), p=p, padding=1, dora=True))
        y, kept = saved_by(replace(q, m=q.m.requires_grad_()))
        large = sorted(t.numel() for t in kept if t.numel() > 1000)
        assert large == sorted([q.x.numel(), y.numel()])


def test_under_autocast_no_copy_of_w_is_saved():
    q = leaves(problem((2, 64, 24, 24), 16, (3, 3), dtype=torch.float32, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        y, kept = saved_by(q)
    assert y.dtype == torch.bfloat16 and q.w.numel() not in [t.numel() for t in kept]
    y.float().sum().backward()
    assert q.x.grad.dtype == q.a.grad.dtype == torch.float32


# --- autocast ---


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("moves", [{"padding": 1}, {"padding": 1, "padding_mode": "circular"}, {"stride": 3}])
def test_autocast_gives_what_it_gives_for_torchs_convolutions(last, dora, moves):
    q = problem((2, 8, 12, 12), 12, (3, 3), dtype=torch.float32, channels_last=last, dora=dora, **moves)
    want = evaluate(q.to(torch.float64), equation)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(q, ours)
    assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == got["da"].dtype == torch.float32
    for name, value in want.items():
        assert (got[name].double() - value).abs().max() < 0.04 * value.abs().max(), name


# --- compilers, transforms, tracers ---

CALLS = {
    "folded": ((2, 8, 24, 24), {"padding": 1}),
    "two branches": ((2, 8, 9, 9), {"padding": 1}),
    "padded before": ((2, 8, 9, 9), {"padding": "same", "padding_mode": "reflect"}),
    "groups": ((2, 8, 9, 9), {"padding": 1, "groups": 2}),
    "channels_last": ((2, 8, 9, 9), {"padding": 1, "channels_last": True}),
    "patches": ((2, 8, 9, 9), {"stride": 3}),
}


@pytest.mark.parametrize(
    ("call", "p"),
    [
        ("folded", 0.0),
        ("two branches", 0.2),
        ("padded before", 0.2),
        ("groups", 0.0),
        ("channels_last", 0.0),
        ("patches", 0.2),
    ],
)
def test_a_compiler_traces_the_whole_call(call, p):
    torch._dynamo.reset()
    shape, moves = CALLS[call]
    q = problem(shape, 12, (3, 3), dtype=torch.float32, p=p, dora=call == "two branches", **moves)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    want, got = evaluate(q, ours), evaluate(q, compiled)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("call", ["groups", "two branches"])
def test_a_compiler_traces_every_size_at_once(call):
    torch._dynamo.reset()
    shape, moves = CALLS[call]
    q = problem(shape, 12, (3, 3), dtype=torch.float32, **moves)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for name, value in evaluate(q, ours).items():
        torch.testing.assert_close(evaluate(q, compiled)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_same_results():
    torch._dynamo.reset()
    shape, moves = CALLS["channels_last"]
    q = problem(shape, 12, (3, 3), dtype=torch.float32, p=0.2, **moves)
    want, got = evaluate(q, ours), evaluate(q, torch.compile(ours, fullgraph=True))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("call", CALLS)
def test_transforms_give_the_gradients_of_autograd(call):
    shape, moves = CALLS[call]
    q = problem(shape, 12, (3, 3), **moves)
    want = evaluate(q, ours)["da"]
    dy = torch.randn(ours(q).shape, generator=torch.Generator().manual_seed(7)).bfloat16().double()

    def loss(a: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (ours(replace(q, x=x, a=a)) * dy).sum()

    torch.testing.assert_close(torch.func.grad(loss)(q.a, q.x, dy), want)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(q.a, q.x, dy)
    torch.testing.assert_close(each.sum(0), want)
    _, tangent = torch.func.jvp(lambda a: ours(replace(q, a=a)), (q.a,), (q.a,))
    torch.testing.assert_close(tangent, ours(q) - ours(replace(q, scale=0.0)))


@pytest.mark.parametrize("call", CALLS)
def test_tracers_record_operations_of_torch(call):
    shape, moves = CALLS[call]
    q = problem(shape, 12, (3, 3), dtype=torch.float32, dora=call == "padded before", **moves)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours(replace(q, x=x))

    traced = torch.jit.trace(Layer(), q.x)
    assert "lora_kernels::" not in str(traced.inlined_graph) and "^" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(q.x), ours(q), rtol=1e-4, atol=1e-4)


def test_export_records_operations_of_torch():
    q = problem((2, 8, 9, 9), 12, (3, 3), dtype=torch.float32, padding=1)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b, self.bias = map(torch.nn.Buffer, (q.w, q.a, q.b, q.bias))  # torch 2.6 wants that

        def forward(self, x: Tensor) -> Tensor:
            return ours(replace(q, x=x, w=self.w, a=self.a, b=self.b, bias=self.bias))

    program = torch.export.export(Layer(), (q.x,))
    assert all("lora_kernels" not in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q.x), ours(q))


@pytest.mark.parametrize("call", ["two branches", "channels_last", "patches"])
def test_plain_operations_draw_the_mask_of_a_seed_where_they_can(call):
    shape, moves = CALLS[call]
    q = problem(shape, 12, (3, 3), p=0.3, rows=call == "patches", **moves)
    if call != "patches":
        torch.testing.assert_close(torch.func.functionalize(ours)(q), ours(q))
        grad = torch.func.grad(lambda x: ours(replace(q, x=x)).sum())(q.x)
        leaf = q.x.detach().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(ours(replace(q, x=leaf)).sum(), leaf)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_checkpointing_draws_the_same_mask_again(use_reentrant, call):
    shape, moves = CALLS[call]
    q = replace(problem(shape, 12, (3, 3), p=0.5, **moves), seed=None)

    def run(q: Problem) -> Tensor:
        return checkpoint(lambda x, a, b: ours(replace(q, x=x, a=a, b=b)), q.x, q.a, q.b, use_reentrant=use_reentrant)

    torch.manual_seed(3)
    want = evaluate(q, ours)
    torch.manual_seed(3)
    got = evaluate(q, run)
    assert all(torch.equal(got[name], want[name]) for name in ("y", "dx", "da", "db"))


def test_a_second_derivative_is_refused():
    q = leaves(problem((2, 8, 9, 9), 12, (3, 3), padding=1))
    for each in (q, replace(q, p=0.2), replace(q, m=torch.ones(1, 12, 1, 1, dtype=torch.float64))):
        (dx,) = torch.autograd.grad(ours(each).square().sum(), q.x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            dx.sum().backward()


def test_the_counter_of_flops_sees_the_convolutions():
    x, N, R = (2, 8, 24, 24), 12, 4
    q = problem(x, N, (3, 3), dtype=torch.float32, padding=1)
    M, K = 2 * 24 * 24, 8 * 9

    def flops(q: Problem) -> int:
        with FlopCounterMode(display=False) as counter:
            ours(q)
        return counter.get_total_flops()

    assert flops(q) == 2 * M * N * K + 2 * N * K * R
    assert flops(replace(q, p=0.2)) == 2 * M * N * K + 2 * M * R * (K + N)
    patches = problem((2, 8, 9, 9), N, (3, 3), dtype=torch.float32, stride=3)
    assert flops(patches) == 2 * 18 * N * K + 2 * 18 * R * (K + N)


def test_an_upstream_gradient_that_is_expanded_or_lazily_negated_is_right():
    q = problem((2, 8, 9, 9), 12, (3, 3), padding=1, p=0.3)
    y = ours(q)
    negated = torch.randn(y.shape, dtype=torch.complex128).conj().imag
    assert negated.is_neg()
    for dy in (torch.ones((), dtype=torch.float64).expand(y.shape), negated):
        one, two = evaluate(q, ours, dy), evaluate(q, equation, dy.clone())
        for name, value in two.items():
            torch.testing.assert_close(one[name], value)


# --- refusals ---

ERRORS = {
    "x has other channels": ({"x": torch.zeros(2, 5, 9, 9)}, "channels"),
    "x has too few dimensions": ({"x": torch.zeros(9, 9)}, "one to three dimensions"),
    "A has another kernel": ({"a": torch.zeros(4, 8, 3, 2)}, "kernel of weight"),
    "A has other channels": ({"a": torch.zeros(4, 4, 3, 3)}, "kernel of weight and C = 8"),
    "B has another rank": ({"b": torch.zeros(12, 3, 1, 1)}, "lora_b"),
    "B has two dimensions": ({"b": torch.zeros(12, 4)}, "lora_b"),
    "the bias is of another size": ({"bias": torch.zeros(3)}, "bias must be"),
    "the magnitude is of another shape": ({"m": torch.zeros(12)}, "magnitude must be"),
    "dtypes differ": ({"w": torch.zeros(12, 8, 3, 3, dtype=torch.bfloat16)}, "weight must have x's dtype"),
    "A is in fp64": ({"a": torch.zeros(4, 8, 3, 3, dtype=torch.float64)}, "lora_a and lora_b"),
    "p is 1": ({"p": 1.0}, "dropout_p"),
    "scale is not finite": ({"scale": float("nan")}, "finite"),
    "W is trained": ({"w": torch.zeros(12, 8, 3, 3, requires_grad=True)}, "requires a gradient"),
    "a rank of 0": ({"a": torch.zeros(0, 8, 3, 3), "b": torch.zeros(12, 0, 1, 1)}, "may be 0"),
    "padding mode": ({"moves": {"padding_mode": "mirror"}}, "padding_mode"),
    "padding text": ({"moves": {"padding": "full"}}, "padding must be"),
    "same with a stride": ({"moves": {"padding": "same", "stride": 2}}, "stride of 1"),
    "a negative padding": ({"moves": {"padding": -1}}, "padding must be"),
    "three strides": ({"moves": {"stride": (1, 2, 3)}}, "stride must be"),
    "groups of 0": ({"moves": {"groups": 0}}, "groups"),
    "groups that do not divide": ({"moves": {"groups": 3}}, "channels"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_operands_that_do_not_fit_are_refused_with_their_values(what):
    change, text = ERRORS[what]
    q = replace(problem((2, 8, 9, 9), 12, (3, 3), dtype=torch.float32), **change)
    with pytest.raises((ValueError, TypeError), match=text):
        ours(q)


def test_ranks_and_dora_that_do_not_go_with_groups_are_refused():
    q = problem((2, 8, 9, 9), 12, (3, 3), groups=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="multiple of groups"):
        ours(replace(q, a=torch.zeros(3, 8, 3, 3), b=torch.zeros(12, 1, 1, 1)))
    with pytest.raises(ValueError, match="Give A in groups"):
        ours(replace(q, m=torch.ones(1, 12, 1, 1)))


def test_back_ends_are_named_or_refused():
    q = problem((2, 8, 9, 9), 12, (3, 3), dtype=torch.float32, p=0.4)
    with pytest.raises(ValueError, match="no back-end 'torch'"):
        ours(q, backend="torch")
    torch.testing.assert_close(ours(q, backend="eager"), ours(q))
    with pytest.raises(ValueError, match="forward-mode AD"):
        torch.func.grad(lambda x: ours(replace(q, x=x), backend="eager").sum())(q.x)


def test_a_half_precision_plain_torch_is_what_the_judge_compares_with():
    q = problem((2, 8, 9, 9), 12, (3, 3), dtype=torch.float64, padding=1, groups=2, p=0.3)
    want, got = evaluate(q, equation), evaluate(q, plain_torch)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
