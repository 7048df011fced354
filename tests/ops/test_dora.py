"""DoRA agrees with PEFT and with the equation in fp64, allocates nothing large, and its cache follows the weight."""

from __future__ import annotations

import copy
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
import torch._inductor.config
from support import judging
from support.dora_problems import NAMES, Storages, magnitude, plain_torch, run, trained, truth
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, reference
from lora_kernels.core import dropout
from lora_kernels.ops.dora import DoRALinearFunction, dora_linear
from lora_kernels.testing import judge

# --- values and gradients ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_values_and_gradients_equal_pefts(bias, rslora, training):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, use_rslora=rslora, target_modules=["0"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(48, 40, bias=bias)), config).train(training).double()
    layer = theirs.base_model.model[0]
    adapter = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight
    with torch.no_grad():
        adapter[2].mul_(0.5 + torch.rand(40))
    base = copy.deepcopy(layer.base_layer)
    ours = FusedLoRALinear.from_linear(base, r=4, lora_alpha=8, use_dora=True, use_rslora=rslora)
    mine = ours.train(training).lora_A, ours.lora_B, ours.lora_magnitude_vector
    with torch.no_grad():
        for own, other in zip(mine, adapter, strict=True):
            own.copy_(other)
    x, dy = torch.randn(3, 7, 48, dtype=torch.float64), torch.randn(3, 7, 40, dtype=torch.float64)

    def results(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = model.to(dtype)(leaf)
        parameters = adapter if model is theirs else mine
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], dy.to(dtype))]

    exact = results(theirs, torch.float64)
    torch.testing.assert_close(results(ours, torch.float64), exact)  # rtol and atol 1e-7
    torch.testing.assert_close(ours.to_linear().weight, copy.deepcopy(theirs).merge_and_unload()[0].weight)
    for got, peers, want in zip(results(ours, torch.float32), results(theirs, torch.float32), exact, strict=True):
        error, allowed = (got - want).abs().max(), (peers - want).abs().max()
        assert error <= 2 * allowed + 2**-22 * want.abs().max()


def test_dropout_acts_where_peft_has_it():
    """PEFT's layer is given our mask in place of its own dropout."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.3, use_dora=True, target_modules=["0"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(48, 40)), config).train()
    layer = theirs.base_model.model[0]
    m = layer.lora_magnitude_vector.default.weight
    with torch.no_grad():
        m.mul_(0.5 + torch.rand(40))

    class OurMask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dropout.dropout(x, 0.3, torch.tensor(11))

    layer.lora_dropout["default"] = OurMask()
    adapter = [layer.lora_A.default.weight, layer.lora_B.default.weight, m]
    x, dy = torch.randn(20, 48), torch.randn(20, 40)
    leaf = x.clone().requires_grad_()
    want = theirs(leaf)
    want_grads = torch.autograd.grad(want, [leaf, *adapter], dy)
    leaf, (a, b, m) = x.clone().requires_grad_(), [p.detach().clone().requires_grad_() for p in adapter]
    base = layer.base_layer
    got = dora_linear(leaf, base.weight.detach(), a, b, m, scale=2.0, bias=base.bias.detach(), dropout_p=0.3, seed=11)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, [leaf, a, b, m], dy), want_grads)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_errors_are_no_larger_than_plain_torchs(dtypes, p, backend):
    q = judging.problem(211, 1100, 187, 8, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    m = magnitude(q)
    got, plain, want = run(q, m, backend=backend), plain_torch(q, m), truth(q, m)
    for name in NAMES:
        verdict = judge.against_plain(name, got[name], want[name], plain[name])
        assert verdict.fault is None, verdict.fault
    assert got["da"].dtype == got["db"].dtype == got["dm"].dtype == dtypes[1]


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", judging.SHAPES, ids=str)
def test_values_and_gradients_hold_for_every_shape(shape, strided, p, backend, poison):
    q = judging.problem(*shape, p=p, strided=strided)
    m = magnitude(q)
    got, want = run(q, m, backend=backend), truth(q, m)
    for name in NAMES:
        assert got[name].shape == want[name].shape
        if want[name].numel():
            worst = (got[name].double() - want[name]).abs().max().item()
            # 2⁻¹⁹ is 16 eps of fp32. A wrong term is far above it, and plain torch reaches a quarter of it.
            assert worst <= 2**-19 * max(want[name].abs().max().item(), 1.0), (name, worst)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_pass_gradcheck(bias, p):
    """The test checks the autograd Function, which takes d as an operand, because DoRA treats the norm as a
    constant."""
    q = judging.problem(5, 4, 9, 2, dtype=torch.float64, p=p, bias=bias)
    d = torch.rand(4, dtype=torch.float64) + 0.5
    leaves = [None if t is None else t.requires_grad_() for t in (q.x, q.a, q.b, d, q.bias)]

    def function(x, a, b, d, bias):
        return DoRALinearFunction.apply(x, q.w, a, b, d, bias, q.seed, (q.scale, p, "eager", "dense", 0))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("asks", [("x",), ("a",), ("b",), ("m",), ("bias",), ("x", "m"), ("b", "m")], ids=str)
def test_only_what_needs_a_gradient_gets_one(asks, p):
    q = judging.problem(6, 5, 16, 2, p=p)
    m = magnitude(q)
    want = truth(q, m)
    leaves = {
        name: t.clone().requires_grad_(name in asks)
        for name, t in {"x": q.x, "a": q.a, "b": q.b, "m": m, "bias": q.bias}.items()
    }
    x, a, b, m, bias = leaves.values()
    dora_linear(x, q.w, a, b, m, scale=q.scale, bias=bias, dropout_p=p, seed=q.seed).backward(q.dy)
    assert {name for name, t in leaves.items() if t.grad is not None} == set(asks)
    for name in asks:
        torch.testing.assert_close(leaves[name].grad.double(), want[f"d{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_tensor_scale_gets_its_gradient(p):
    q = judging.problem(6, 5, 8, 2, p=p)
    m, scale = magnitude(q), torch.tensor(q.scale, requires_grad=True)
    want = truth(q, m)
    y = dora_linear(q.x, q.w, q.a, q.b, m, scale=scale, bias=q.bias, dropout_p=p, seed=q.seed)
    torch.testing.assert_close(y.double(), want["y"], rtol=1e-5, atol=1e-5)
    y.backward(q.dy)
    torch.testing.assert_close(scale.grad.double(), (want["db"] * q.b).sum() / q.scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [Fraction(1, 2), Decimal("0.5")])
def test_a_scale_of_any_type_of_number_counts_as_its_float(scale):
    q = judging.problem(6, 5, 8, 2)
    got = dora_linear(q.x, q.w, q.a, q.b, magnitude(q), scale=scale)
    assert torch.equal(got, dora_linear(q.x, q.w, q.a, q.b, magnitude(q), scale=0.5))


def test_the_gradient_of_an_fp32_magnitude_is_not_rounded_to_bf16():
    q = judging.problem(64, 48, 80, 4, dtype=torch.bfloat16)
    got = run(q, magnitude(q, torch.float32))
    assert got["dm"].dtype == torch.float32 and not torch.equal(got["dm"], got["dm"].bfloat16().float())


# --- the norm ---


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), *judging.DTYPES], ids=str)
@pytest.mark.parametrize("size", [(1100, 187, 8), (1, 1, 1), (7, 13, 3), (25, 2051, 65), (3, 1024, 300)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_factored_norm_is_exact_to_a_few_eps(dtypes, size, strided, isa, poison):
    q = judging.problem(1, *size, dtype=dtypes[0], adapter_dtype=dtypes[1], strided=strided)
    exact = torch.linalg.vector_norm(q.w.double() + q.scale * q.b.double() @ q.a.double(), dim=1)
    norm = torch.ops.lora_kernels.dora_norm(q.w, q.a, q.b, q.scale)
    assert norm.dtype == torch.promote_types(q.w.dtype, torch.float32)
    error = ((norm.double() - exact) / exact).abs().max().item()
    assert error <= 8 * torch.finfo(norm.dtype).eps


def test_the_norm_is_an_operator_that_torch_can_trace():
    q = judging.problem(1, 20, 30, 4)
    torch.library.opcheck(torch.ops.lora_kernels.dora_norm, (q.w, q.a, q.b, q.scale))


def test_d_is_finite_where_the_adapter_cancels_a_row():
    """W + s·B A is 0 in every row, and W and B are 0 in the first row. d stays finite, and m = 0 gives y = 0."""
    a, b = torch.randn(3, 16), torch.randn(6, 3)
    w = -0.5 * b @ a
    w[0] = b[0] = 0
    m = torch.linalg.vector_norm(w, dim=1)
    y = dora_linear(torch.randn(4, 16), w, a, b, m, scale=0.5)
    assert torch.isfinite(y).all() and y[:, 0].count_nonzero() == 0


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_nothing_of_the_weights_size_is_allocated(dtypes, p, backend):
    """No tensor of N×K or K×K elements is allocated in forward or backward, neither in the first step, which fills the
    cache, nor in later ones."""
    M, N, K = 2, 1536, 640
    layer = trained(K, N, r=2, lora_dropout=p, dtype=dtypes[0], adapter_dtype=dtypes[1], backend=backend)
    x = torch.randn(M, K, dtype=dtypes[0], requires_grad=True)
    with Storages([*layer.parameters()]) as seen:
        for _ in range(2):
            layer(x).sum().backward()
    # A 16-bit W is converted 512 rows at a time, and an fp32 W is not converted.
    allowed = max(2 * N, 8 * K) if dtypes[0] == torch.float32 else 512 * K
    assert len(seen.sizes) > 20 and max(seen.sizes) <= 4 * allowed < 4 * K * K


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_more_than_x_h_and_z_is_saved(p):
    M, N, K, R = 64, 96, 80, 8
    layer, x = trained(K, N, r=R, lora_dropout=p), torch.randn(M, K, requires_grad=True)
    rows = 4 * 4 * N + 64  # m, the norm, d and other vectors of N elements
    assert judging.saved_bytes(lambda: layer(x)) <= 4 * (M * K + M * R + M * N) + rows
    layer.lora_magnitude_vector.requires_grad_(False)
    assert judging.saved_bytes(lambda: layer(x)) <= 4 * (M * K + M * R) + rows
    layer.lora_A.requires_grad_(False), layer.lora_B.requires_grad_(False)
    assert judging.saved_bytes(lambda: layer(x)) <= rows


# --- W may change between two calls ---


BEHIND = {
    "data": lambda w: w.data.mul_(3),
    "view of data": lambda w: w.data[1].zero_(),
    "numpy": lambda w: w.detach().numpy().fill(0.5),
    "set": lambda w: w.data.set_(torch.randn(5, 7).untyped_storage()),
    "storage": lambda w: w.untyped_storage().copy_(torch.randn(5, 7).untyped_storage()),
    "swap": lambda w: torch.utils.swap_tensors(w, nn.Parameter(torch.randn(5, 7), requires_grad=False)),
    "new data": lambda w: setattr(w, "data", torch.randn(5, 7)),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
}
"""Writes into W that PyTorch does not count in its version, and some that change the tensor's memory."""


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("write", BEHIND)
def test_a_write_that_torch_does_not_count_is_seen(write, train):
    layer, x = trained(7, 5, r=2).train(train), torch.randn(3, 7)
    layer(x)
    BEHIND[write](layer.weight)
    want = reference.dora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, scale=layer.scaling, bias=layer.bias
    )
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("change", ["in place", "load", "assign", "double", "merge", "swap"])
def test_the_module_follows_its_weight(change):
    layer, x = trained(7, 5, r=2), torch.randn(3, 7)
    layer(x)
    if change == "in place":
        with torch.no_grad():
            layer.weight.mul_(3)
    elif change in ("load", "assign"):
        other = {**layer.state_dict(), "weight": torch.randn(5, 7)}
        layer.load_state_dict(other, assign=change == "assign")
    elif change == "double":
        layer, x = layer.double(), x.double()
    elif change == "merge":
        layer.merge()
        layer(x)
        layer.unmerge()
    else:
        layer.weight = nn.Parameter(torch.randn(5, 7), requires_grad=False)
    want = reference.dora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, scale=layer.scaling, bias=layer.bias
    )
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_may_have_another_dtype_than_the_magnitude(dtype, own, adapter):
    x, w, m = torch.randn(3, 8, dtype=own), torch.randn(6, 8, dtype=own), torch.rand(6, dtype=torch.float32).to(own)
    a, b = torch.randn(2, 8).to(adapter), torch.randn(6, 2).to(adapter)
    m.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = dora_linear(x, w, a, b, m, scale=0.5)
    y.sum().backward()
    assert y.dtype == dtype and m.grad.dtype == own
    wide = [t.detach().double() for t in (x, w, a, b, m)]
    torch.testing.assert_close(y.double(), reference.dora_linear(*wide, scale=0.5), rtol=0.05, atol=0.1)
