"""`shared_lora_linear` computes s · diag(v) B diag(u) A over sliced A and B, with every gradient, and saves h alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import judging
from torch.utils.checkpoint import checkpoint

from lora_kernels.core import dropout
from lora_kernels.ops.shared import folded, shared_lora_linear
from lora_kernels.quant.weight import quantize_weight

M, N, K, R = 37, 24, 40, 5
NAMES = ("x", "a", "b", "u", "v", "bias")


def operands(dtype=torch.float64, adapters=None, shape=(M,), N=N, K=K, R=R):
    """Return leaves, with an A and a B that are wider than the layer, and the frozen weight."""
    adapters = adapters or dtype
    wide = torch.randn(R, K + 7) / K**0.5, torch.randn(N + 3, R) / R**0.5
    made = {
        "x": torch.randn(*shape, K).to(dtype),
        "a": wide[0].to(adapters),
        "b": wide[1].to(adapters),
        "u": torch.randn(R).to(adapters),
        "v": torch.randn(N).to(adapters),
        "bias": torch.randn(N).to(dtype),
    }
    return {name: t.requires_grad_() for name, t in made.items()}, (torch.randn(N, K) / K**0.5).to(dtype)


def run(leaves, w, **settings):
    x, a, b, u, v, bias = (leaves[name] for name in NAMES)
    return shared_lora_linear(x, w, a, b, u, v, bias=bias, **{"scale": 0.75, **settings})


def dy_of(y):
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


def gradients(y, leaves):
    return dict(zip(NAMES, torch.autograd.grad(y, [leaves[name] for name in NAMES], dy_of(y)), strict=True))


def exact(leaves, w, p=0.0, seed=None, scale=0.75):
    """Return y and every gradient in fp64, by sums that are written out."""
    x, a, b, u, v, bias = (leaves[name].detach().double() for name in NAMES)
    N, K = v.shape[0], x.shape[-1]
    rows, w = x.reshape(-1, K), w.double()
    keep = torch.ones_like(rows)
    if p:
        keep = dropout.keep_mask(seed, *rows.shape, p).double() * dropout.rescale(p)
    own_a, own_b, dropped = a[:, :K], b[:N], rows * keep
    h = dropped @ own_a.T
    z = (h * u) @ own_b.T
    y = rows @ w.T + bias + scale * z * v
    dy = dy_of(y.view(*x.shape[:-1], N)).view(-1, N)
    g = (dy * v) @ own_b
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    da[:, :K] = scale * (g * u).T @ dropped
    db[:N] = scale * (dy * v).T @ (h * u)
    grads = {
        "x": (dy @ w + scale * keep * ((g * u) @ own_a)).view(x.shape),
        "a": da,
        "b": db,
        "u": scale * (h * g).sum(0),
        "v": scale * (dy * z).sum(0),
        "bias": dy.sum(0),
    }
    return y.view(*x.shape[:-1], N), grads


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(M,), (2, 3), (0,), (1, 1), ()], ids=str)
def test_values_and_gradients_are_those_of_the_equation(p, shape, backend):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    leaves, w = operands(dtype, shape=shape)
    seed = torch.tensor(5) if p else None
    y = run(leaves, w, dropout_p=p, seed=seed, backend=backend)
    want, grads = exact(leaves, w, p, seed)
    tolerance = 1e-5 if backend == "cpu" else 1e-12
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    for name, got in gradients(y, leaves).items():
        torch.testing.assert_close(got.double(), grads[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 17, 9), (8, 65, 70)], ids=str)
def test_odd_sizes_and_ranks_above_them_are_computed(sizes):
    N, K, R = sizes
    leaves, w = operands(torch.float32, N=N, K=K, R=R)
    y = run(leaves, w)
    want, grads = exact(leaves, w)
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=2e-5)
    for name, got in gradients(y, leaves).items():
        torch.testing.assert_close(got.double(), grads[name], rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_errors_are_within_those_of_plain_torch(dtypes):
    dtype, adapters = dtypes
    leaves, w = operands(dtype, adapters, shape=(300,))
    x, a, b, u, v, bias = (leaves[name] for name in NAMES)
    y = run(leaves, w)
    update = F.linear(F.linear(x.to(adapters), a[:, :K]) * u, b[:N]) * v * 0.75
    plain = F.linear(x, w, bias) + update.to(dtype)
    want, grads = exact(leaves, w)
    mine, theirs = gradients(y, leaves), gradients(plain, leaves)
    for name, truth in {"y": want, **grads}.items():
        got, other = (y, plain) if name == "y" else (mine[name], theirs[name])
        assert got.dtype == other.dtype
        rms = [float((t.double() - truth).square().mean().sqrt()) for t in (got, other)]
        floor = torch.finfo(got.dtype).eps * float(truth.square().mean().sqrt())
        assert rms[0] <= 1.25 * rms[1] + floor, name


def test_gradcheck():
    leaves, w = operands(shape=(3,), N=4, K=3, R=2)
    tensors = [leaves[name] for name in NAMES]
    assert torch.autograd.gradcheck(
        lambda *ts: run(dict(zip(NAMES, ts, strict=True)), w, dropout_p=0.4, seed=3), tensors
    )


def test_only_what_needs_a_gradient_gets_one():
    leaves, w = operands(torch.float32)
    _, grads = exact(leaves, w)
    for asked in NAMES:
        given = {name: t.detach().clone().requires_grad_(name == asked) for name, t in leaves.items()}
        y = run(given, w)
        y.backward(dy_of(y))
        assert {name for name, t in given.items() if t.grad is not None} == {asked}
        torch.testing.assert_close(given[asked].grad.double(), grads[asked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_h_alone_is_saved_and_x_only_for_a_trained_a(dtypes, p):
    """No M×N tensor, no mask, no x̂, and no B' [N, R]."""
    dtype, adapters = dtypes
    leaves, w = operands(dtype, adapters, shape=(256,))
    frozen = {name: torch.nn.Parameter(t.detach(), name in ("x", "u", "v")) for name, t in leaves.items()}
    frozen["x"] = leaves["x"]
    w = torch.nn.Parameter(w, requires_grad=False)
    h_bytes = 256 * R * adapters.itemsize
    slices = sum(frozen[name].untyped_storage().nbytes() for name in ("a", "b"))  # views of what is there anyway
    assert judging.saved_bytes(lambda: run(frozen, w, dropout_p=p)) <= slices + h_bytes + 64
    frozen["a"].requires_grad_()
    x_bytes = 256 * K * dtype.itemsize
    saved = judging.saved_bytes(lambda: run(frozen, w, dropout_p=p))
    assert slices + x_bytes < saved <= slices + x_bytes + h_bytes + 64
    for name in ("a", "u", "v"):
        frozen[name].requires_grad_(False)
    assert judging.saved_bytes(lambda: run(frozen, w, dropout_p=p)) <= slices + 64


def test_a_call_without_gradients_has_the_bits_of_one_with_them():
    leaves, w = operands(torch.float32)
    with torch.no_grad():
        alone = run(leaves, w)
    assert torch.equal(alone, run(leaves, w)) and alone.grad_fn is None


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_computed_as_its_dequantised_values(format, dtype):
    leaves, w = operands(dtype, torch.float32, K=64)
    q = quantize_weight(w, format)
    y, dense = run(leaves, q), q.dequantize(torch.float32)
    want, grads = exact(leaves, dense)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    for name, got in gradients(y, leaves).items():
        scale = float(grads[name].abs().max())
        torch.testing.assert_close(got.double() / scale, grads[name] / scale, rtol=tolerance, atol=tolerance, msg=name)


def test_autocast_computes_in_its_dtype_with_fp32_factors():
    leaves, w = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(leaves, w)
    assert y.dtype == torch.bfloat16
    want, grads = exact(leaves, w)
    torch.testing.assert_close(y.double(), want, rtol=5e-2, atol=5e-2)
    for name, got in gradients(y, leaves).items():
        assert got.dtype == torch.float32
        scale = float(grads[name].abs().max())
        torch.testing.assert_close(got.double() / scale, grads[name] / scale, rtol=5e-2, atol=5e-2, msg=name)


def test_checkpointing_recomputes_the_same_bits():
    leaves, w = operands(torch.float32)

    def step(again):
        torch.manual_seed(1)
        if again:
            y = checkpoint(lambda x: run({**leaves, "x": x}, w, dropout_p=0.3), leaves["x"], use_reentrant=False)
        else:
            y = run(leaves, w, dropout_p=0.3)
        return [y, *gradients(y, leaves).values()]

    assert all(map(torch.equal, step(False), step(True)))


def test_a_compiler_sees_one_graph_with_the_same_values():
    leaves, w = operands(torch.float32)
    compiled = torch.compile(lambda: run(leaves, w), fullgraph=True, backend="aot_eager")
    one, other = run(leaves, w), compiled()
    torch.testing.assert_close(one, other)
    for got, want in zip(gradients(other, leaves).values(), gradients(one, leaves).values(), strict=True):
        torch.testing.assert_close(got, want)


def test_transforms_of_torch_func_compute_it_in_plain_operations():
    leaves, w = operands()
    given = {name: t.detach() for name, t in leaves.items()}
    _, grads = exact(leaves, w)
    dy = dy_of(run(given, w))
    got = torch.func.grad(lambda u: (run({**given, "u": u}, w) * dy).sum())(given["u"])
    torch.testing.assert_close(got, grads["u"])
    rows = torch.vmap(lambda x: run({**given, "x": x}, w))(given["x"])
    torch.testing.assert_close(rows, run(given, w))


def test_double_backward_is_refused():
    leaves, w = operands(torch.float32)
    y = run(leaves, w)
    (du,) = torch.autograd.grad(y.square().sum(), leaves["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="shared_lora_linear has no double backward"):
        du.sum().backward()


def test_gradients_are_the_same_bits_in_every_run():
    leaves, w = operands(torch.float32, shape=(300,))
    one, other = (gradients(run(leaves, w), leaves) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)


@pytest.mark.parametrize(("name", "value", "error", "match"), [
    ("u", torch.ones(R + 1), ValueError, r"lora_u must be \[R\].*got \(6,\), \(24,\) and \(24, 5\)"),
    ("v", torch.ones(N, 1), ValueError, r"lora_v \[N\]"),
    ("u", torch.ones(R, dtype=torch.bfloat16), TypeError, "must be in torch.float32.*got torch.bfloat16"),
    ("v", torch.ones(N, device="meta"), ValueError, "must be on one device; got cpu, meta and cpu.*the whole model"),
    ("a", torch.ones(R + 1, K), ValueError, "lora_"),
])  # fmt: skip
def test_operands_that_do_not_fit_are_refused(name, value, error, match):
    leaves, w = operands(torch.float32)
    b = leaves["b"][:N]
    given = {"a": leaves["a"][:, :K], "u": leaves["u"], "v": leaves["v"], name: value}
    with pytest.raises(error, match=match):
        shared_lora_linear(leaves["x"], w, given["a"], b, given["u"], given["v"])


def test_a_folded_b_in_16_bits_is_rounded_once():
    b, u, v = (torch.randn(*shape).bfloat16() for shape in ((64, 8), (8,), (64,)))
    assert torch.equal(folded(b, u, v), (b.double() * v.double()[:, None] * u.double()).float().bfloat16())
