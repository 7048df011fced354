"""`lora_linear_group` gives every layer the values and gradients of a call of its own, and dx is the sum of theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import lora_linear
from lora_kernels.ops import registered
from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.testing import judge

SIZES = [  # M, K, then N and R of each layer
    (5, 7, (3, 2), (1, 1)),
    (0, 24, (16, 4), (8, 4)),
    (1, 40, (24, 8), (12, 8), (12, 8)),
    (33, 130, (129, 17), (31, 3), (64, 70)),
    (211, 187, (193, 8), (97, 8), (64, 16)),
]
"""The last size is large enough for statistics. Some ranks are too large for the CPU kernels to take in one pass."""


def problems(size, *, dtype=torch.float32, adapter_dtype=None, p=0.0, strided=False) -> list[judge.Problem]:
    """Return problems of layers that read the same x."""
    M, K, *layers = size
    qs = [
        judging.problem(M, N, K, R, dtype=dtype, adapter_dtype=adapter_dtype, p=p * i, strided=strided, seed=i)
        for i, (N, R) in enumerate(layers, 1)
    ]
    return [replace(q, x=qs[0].x, bias=q.bias if i else None) for i, q in enumerate(qs)]


def run(qs: list[judge.Problem], used: list[int] | None = None, **kwargs) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return dx, and for each layer y, da, db and dbias. Only the layers in `used` take part in the backward."""
    x = qs[0].x.detach().requires_grad_()
    leaves = [
        {name: t.detach().requires_grad_() for name in ("a", "b", "bias") if (t := getattr(q, name)) is not None}
        for q in qs
    ]
    layers = [Layer(q.w, t["a"], t["b"], q.scale, t.get("bias"), q.p, q.seed) for q, t in zip(qs, leaves, strict=True)]
    ys = lora_linear_group(x, layers, **kwargs)
    used = list(range(len(qs))) if used is None else used
    torch.autograd.backward([ys[i] for i in used], [qs[i].dy for i in used])
    results = [
        {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in t.items()} for y, t in zip(ys, leaves, strict=True)
    ]
    return x.grad, results


def judge_dx(dx: Tensor, qs: list[judge.Problem]) -> None:
    """Judge dx by the sum of the layers' dx in fp64. Plain torch, the comparison, adds up rounded terms."""
    want = [judge.truth(q)["dx"] for q in qs]
    exact, eps = sum(want), torch.finfo(dx.dtype).eps
    if min(q.x.shape[0] * q.a.shape[0] * (1 - q.p) for q in qs) >= 1024:
        plain = sum(judge.evaluate(q)["dx"] for q in qs)
        fault = judge.against_plain("dx", dx, exact, plain).fault
    else:
        magnitudes = [judge.truth(q.absolute())["dx"] for q in qs]
        bound = sum(judge.rounding_bound("dx", q, w, m) + eps * m for q, w, m in zip(qs, want, magnitudes, strict=True))
        fault = judge.against_bound("dx", dx, exact, bound).fault
    assert fault is None, fault


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_are_those_of_single_layers(size, dtypes, p, backend):
    qs = problems(size, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    dx, results = run(qs, backend=backend)
    judge_dx(dx, qs)
    for q, got in zip(qs, results, strict=True):
        judge.check(got, q)


@pytest.mark.usefixtures("poison")
def test_strided_operands_and_fp64_are_served():
    for dtype in (torch.float32, torch.float64):
        qs = problems(SIZES[3], dtype=dtype, p=0.2, strided=True)
        dx, results = run(qs)
        judge_dx(dx, qs)
        for q, got in zip(qs, results, strict=True):
            judge.check(got, q)


def test_each_layer_has_the_mask_of_its_seed_and_gradients_repeat(backend):
    """Axolotl shares one mask among q, k and v. The bits can be equal because with equal ranks every sum has the order
    that a single call has."""
    qs = problems((211, 187, (193, 8), (97, 8)), p=0.2)
    dx, results = run(qs, backend=backend)
    for q, got in zip(qs, results, strict=True):
        want = judge.evaluate(q, lora_linear, backend=backend)
        for name, value in got.items():
            assert torch.equal(value, want[name]), name
    again_dx, again = run(qs, backend=backend)
    assert torch.equal(again_dx, dx)
    assert all(torch.equal(u[name], v[name]) for u, v in zip(again, results, strict=True) for name in u)


def test_seeds_are_drawn_in_the_order_of_the_layers():
    qs = [replace(q, seed=None) for q in problems(SIZES[4], p=0.2)]
    torch.manual_seed(5)
    _, results = run(qs)
    torch.manual_seed(5)
    for q, got in zip(qs, results, strict=True):
        y = lora_linear(q.x, q.w, q.a, q.b, scale=q.scale, bias=q.bias, dropout_p=q.p)
        assert torch.equal(got["y"], y)


def test_layers_whose_output_is_not_used_have_no_gradient():
    qs = problems(SIZES[3], p=0.2)
    dx, results = run(qs, used=[1])
    assert torch.equal(dx, judge.evaluate(qs[1], lora_linear)["dx"])
    assert [got["da"] is None for got in results] == [True, False, True]


def test_only_what_needs_a_gradient_is_saved_and_computed(monkeypatch):
    cpu = pytest.importorskip("lora_kernels.backends.cpu", reason="the native CPU kernels are not built")

    qs = problems(SIZES[3])
    asked = []
    inner = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: asked.append(args) or inner(*args))
    x, a = qs[0].x.requires_grad_(), qs[1].a.detach().requires_grad_()
    layers = [Layer(q.w, a if i == 1 else q.a, q.b, q.scale) for i, q in enumerate(qs)]
    sum(y.sum() for y in lora_linear_group(x.detach(), layers)).backward()
    (dys, saved_x, _, _, hs, needs), *_ = asked
    assert len(dys) == 1 and saved_x is not None and hs == [None] and needs == (False, (True,), (False,))
    sum(
        y.sum() for y in lora_linear_group(x, [layer._replace(lora_a=q.a) for layer, q in zip(layers, qs, strict=True)])
    ).backward()
    assert asked[1][1] is None and asked[1][5].dx is True  # x is not saved, and dx is wanted


def test_leading_dimensions_autocast_and_tensor_scales_are_served():
    qs = problems((12, 24, (16, 4), (8, 2)), p=0.1)
    x = qs[0].x.view(3, 2, 2, 24)
    layers = [Layer(q.w, q.a, q.b, torch.tensor(q.scale), None, q.p, q.seed) for q in qs]
    for y, q in zip(lora_linear_group(x, layers), qs, strict=True):
        assert y.shape == (3, 2, 2, q.w.shape[0])
        torch.testing.assert_close(
            y.view(12, -1), lora_linear(q.x, q.w, q.a, q.b, scale=q.scale, dropout_p=q.p, seed=q.seed)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y, layer in zip(lora_linear_group(x.requires_grad_(), layers), layers, strict=True):
            want = lora_linear(
                x,
                layer.weight,
                layer.lora_a,
                layer.lora_b,
                scale=layer.scale,
                dropout_p=layer.dropout_p,
                seed=layer.seed,
            )
            assert y.dtype == torch.bfloat16 and torch.equal(y, want)


def test_what_is_no_layer_is_named_in_the_error():
    (q,) = problems((4, 6, (5, 2)))
    layer = Layer(q.w, q.a, q.b, 1.0)
    for layers, kind in ((layer, "Tensor"), ({"q": layer}, "str"), ([(q.w, q.a, q.b, 1.0)], "tuple")):
        with pytest.raises(TypeError, match=f"iterable of lora_kernels.*Layer, got a {kind}"):
            lora_linear_group(q.x, layers)


def test_double_backward_is_refused():
    qs = problems((4, 6, (5, 2), (3, 2)))
    x, b = qs[0].x.requires_grad_(), qs[1].b.requires_grad_()
    ys = lora_linear_group(x, [Layer(q.w, q.a, q.b, 1.0) for q in qs])
    (dx,) = torch.autograd.grad(ys[0].sum() + ys[1].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_group has no double backward"):
        dx.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_group has no double backward"):
        torch.autograd.grad(dx.sum(), b, allow_unused=True)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_operators_pass_opcheck(p):
    qs = problems((4, 6, (5, 2), (3, 1)), p=p)
    columns = [[getattr(q, name) for q in qs] for name in ("w", "a", "b", "bias", "scale", "p", "seed")]
    w, a, b, bias, scale, rates, seed = columns
    args = (qs[0].x, w, a, b, bias, scale, rates, seed, None, [True, False])
    torch.library.opcheck(torch.ops.lora_kernels.forward_group.default, args)
    h = torch.ops.lora_kernels.forward_group(*args)[2:]
    back = ([q.dy for q in qs], qs[0].x, w, a, b, h, scale, rates, seed, None, True, [True, True], [True, False])
    torch.library.opcheck(torch.ops.lora_kernels.backward_group.default, back)


def test_a_group_compiles_without_a_break():
    qs = problems((6, 8, (5, 2), (3, 1)))
    leaves = [t.detach().requires_grad_() for q in qs for t in (q.a, q.b)]

    def step(x, a1, b1, a2, b2):
        ys = lora_linear_group(x, [Layer(qs[0].w, a1, b1, 0.5), Layer(qs[1].w, a2, b2, 2.0)])
        return ys[0].square().sum() + ys[1].sum()

    x = qs[0].x.requires_grad_()
    want = torch.autograd.grad(step(x, *leaves), (x, *leaves))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x, *leaves), (x, *leaves))
    for u, v in zip(got, want, strict=True):
        assert torch.equal(u, v)


@pytest.mark.parametrize("place", ["x", "a", "bias"])
def test_a_group_leaves_out_its_operators_only_where_nothing_observes_it(place):
    """A tensor of a subclass in any of the layers counts as an observer."""

    class Kind(torch.Tensor):
        pass

    qs = problems((4, 6, (5, 2), (3, 1)))
    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    def run(x, a, bias):
        layers = [Layer(qs[0].w, qs[0].a, qs[0].b, 0.5), Layer(qs[1].w, a, qs[1].b, 2.0, bias)]
        ys = lora_linear_group(x, layers)
        return torch.autograd.grad(sum(y.sum() for y in ys), x)

    operands = {"x": qs[0].x.clone().requires_grad_(), "a": qs[1].a, "bias": qs[1].bias}
    want = run(**operands)
    with Seen():
        got = run(**operands)
    assert torch.equal(got[0], want[0])
    assert [name for name in names if name.startswith("lora_kernels::")] == [
        "lora_kernels::forward_group", "lora_kernels::backward_group"]  # fmt: skip
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        way = registered.forward_group
        patch.setattr(registered, "forward_group", lambda *args: calls.append(1) or way(*args))
        run(**operands)
        assert not calls
        run(**operands | {place: operands[place].as_subclass(Kind)})
    assert calls == [1]


def test_errors_name_the_values():
    q, other = problems((4, 6, (5, 2), (3, 2)))
    with pytest.raises(ValueError, match="at least one layer, got none"):
        lora_linear_group(q.x, [])
    with pytest.raises(ValueError, match="differ in K"):
        lora_linear_group(q.x, [Layer(q.w, q.a, q.b, 1.0), Layer(q.w[:, :5], q.a, q.b, 1.0)])
    halves = [other.a.bfloat16(), other.b.bfloat16()]
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32, torch.bfloat16"):
        lora_linear_group(q.x, [Layer(q.w, q.a, q.b, 1.0), Layer(other.w, *halves, 1.0)])
