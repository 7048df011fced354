"""`lora_linear` works under torch.compile, checkpointing and autocast, saves little, and its operators pass opcheck."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, explain, fuse, lora_linear
from lora_kernels.backends import cpu
from lora_kernels.core import dropout
from lora_kernels.group import Layer, lora_linear_group
from lora_kernels.ops import check

ops = torch.ops.lora_kernels


def run(q: judging.Problem, **kwargs):
    return judging.evaluate(q, lora_linear, **kwargs)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
def test_x_may_have_any_leading_dimensions(lead):
    q = judging.problem(1, 5, 7, 2)
    x = torch.randn(*lead, 7, requires_grad=True)
    y = lora_linear(x, q.w, q.a, q.b, scale=0.5, bias=q.bias)
    assert y.shape == (*lead, 5)
    flat = lora_linear(x.reshape(-1, 7), q.w, q.a, q.b, scale=0.5, bias=q.bias)
    assert torch.equal(y.reshape(-1, 5), flat)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_only_what_needs_a_gradient_gets_one():
    q = judging.problem(6, 5, 7, 2)
    for asks in ("x", "a", "b", "bias"):
        leaves = {n: getattr(q, n).clone().requires_grad_(n == asks) for n in ("x", "a", "b", "bias")}
        lora_linear(leaves["x"], q.w, leaves["a"], leaves["b"], scale=q.scale, bias=leaves["bias"]).backward(q.dy)
        assert {n for n, t in leaves.items() if t.grad is not None} == {asks}
        judging.check({f"d{asks}": leaves[asks].grad}, q)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_no_more_than_x_and_h_is_saved(dtypes, p):
    M, N, K, R = 64, 96, 80, 8
    layer = FusedLoRALinear(K, N, r=R, lora_dropout=p, dtype=dtypes[0], adapter_dtype=dtypes[1])
    x = torch.randn(M, K, dtype=dtypes[0], requires_grad=True)
    x_bytes, h_bytes = M * K * x.element_size(), M * R * layer.lora_A.element_size()
    assert x_bytes < judging.saved_bytes(lambda: layer(x)) <= x_bytes + h_bytes + 64
    layer.lora_A.requires_grad_(False)  # as in LoRA-FA: only h is saved, M×r numbers
    assert judging.saved_bytes(lambda: layer(x)) <= h_bytes + 64
    layer.lora_B.requires_grad_(False)
    assert judging.saved_bytes(lambda: layer(x)) <= 64


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_every_kind_of_layer_saves_x_and_h_in_the_adapters_dtype(dtypes):
    M, N, K, R = 64, 96, 128, 8
    dtype, adapter_dtype = dtypes
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    x_bytes, h_bytes = M * K * dtype.itemsize, M * R * adapter_dtype.itemsize
    linear = nn.Linear(K, N, dtype=dtype)
    for format in ("nf4", "fp4", "int8", "fp8"):
        layer = FusedLoRALinear.from_linear(linear, r=R, adapter_dtype=adapter_dtype, quant=format)
        codes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
        assert judging.saved_bytes(lambda layer=layer: layer(x)) <= x_bytes + h_bytes + sum(codes.values()) + 64
    a, b = torch.randn(R, K, dtype=adapter_dtype), torch.randn(N, R, dtype=adapter_dtype)
    a, b, w = nn.Parameter(a), nn.Parameter(b), nn.Parameter(linear.weight, requires_grad=False)
    group = [Layer(w, a, b, 1.0, None, 0.1)] * 3
    assert judging.saved_bytes(lambda: lora_linear_group(x, group)) <= x_bytes + 3 * (h_bytes + 64)


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_a_fused_layer_of_peft_saves_x_and_h_in_the_adapters_dtype(dtypes):
    peft = pytest.importorskip("peft")
    M, N, K, R = 64, 96, 80, 8
    model = nn.Sequential(nn.Linear(K, N, dtype=dtypes[0]))
    config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=dtypes[1] == torch.float32)
    fuse(model)
    x = torch.randn(M, K, dtype=dtypes[0], requires_grad=True)
    allowed = M * K * dtypes[0].itemsize + M * R * dtypes[1].itemsize + 64
    assert judging.saved_bytes(lambda: model(x)) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_in_a_tensor_is_not_rounded_to_16_bits(dtype):
    """1.3 lies 0.25 % beside the nearest number of bf16."""
    b, s = torch.randn(64, 8).to(dtype).requires_grad_(), torch.tensor(1.3)
    assert check.scale(s, b) == (s.item(), b)
    one, scaled = check.scale(s.requires_grad_(), b)
    assert one == 1.0 and torch.equal(scaled, (b.float() * 1.3).to(dtype))
    scaled.sum().backward()
    assert torch.equal(b.grad, torch.full_like(b, 1.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_scale_in_a_tensor_gives_the_gradients_of_the_same_number(dtype):
    """s·B would be rounded, and the gradient of s·B overflows in fp16."""
    q = judging.problem(128, 96, 160, 8, dtype=dtype)
    q = replace(q, x=40 * q.x, dy=600 * q.dy, scale=1 / 1024)
    want = judging.evaluate(q, lora_linear)
    got = judging.evaluate(replace(q, scale=torch.tensor([1 / 1024])), lora_linear)
    assert all(torch.equal(got[name], want[name]) and torch.isfinite(want[name]).all() for name in want)


def test_a_scale_that_is_not_finite_is_refused_in_a_tensor_too():
    x, w, a, b = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        lora_linear(x, w, a, b, scale=torch.tensor(float("nan")))


def test_no_h_is_kept_where_no_gradient_is_wanted():
    layer, x = FusedLoRALinear(80, 96, r=8, adapter_dtype=torch.float32, dtype=torch.bfloat16), torch.randn(64, 80)
    asked = []

    def forward(x, bases, adapters, save_h):
        asked.extend(save_h)
        return cpu_forward(x, bases, adapters, save_h)

    cpu_forward = cpu.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "forward", forward)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                layer(x.bfloat16())
    assert asked == [False] * 2


def test_no_copy_of_the_weight_is_saved_under_autocast():
    layer, x = FusedLoRALinear(80, 96, r=8), torch.randn(64, 80, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert judging.saved_bytes(lambda: layer(x)) <= 64 * 80 * 2 + 64 * 8 * 4 + 64  # h is fp32, as the adapters


@pytest.mark.parametrize("dy_requires_grad", [False, True])
def test_double_backward_is_refused(dy_requires_grad):
    q = judging.problem(4, 5, 6, 2)
    x, a = q.x.requires_grad_(), q.a.requires_grad_()
    y = lora_linear(x, q.w, a, q.b.requires_grad_(), scale=1.0)
    dy = q.dy.requires_grad_(dy_requires_grad)
    dx, da = torch.autograd.grad(y, (x, a), dy, create_graph=True)
    for first in (dx, da):
        with pytest.raises(RuntimeError, match="no double backward"):
            first.square().sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):  # not None: dx and da depend on a, on x and on dy
            torch.autograd.grad(first.sum(), x if first is da else a, allow_unused=True, retain_graph=True)


def test_double_backward_is_refused_where_dy_depends_on_y():
    q = judging.problem(4, 5, 6, 2)
    x = q.x.requires_grad_()
    y = lora_linear(x, q.w, q.a, q.b, scale=1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(dx.sum(), x, allow_unused=True)


def test_a_dy_of_another_dtype_is_converted():
    """A mixed-precision wrapper may hand an fp32 dy to a bf16 layer. Automodel's fused backward crashed on it."""
    q = judging.problem(6, 5, 8, 2, dtype=torch.bfloat16)
    leaves = [q.x.requires_grad_(), q.a.requires_grad_(), q.b.requires_grad_()]
    y = lora_linear(leaves[0], q.w, leaves[1], leaves[2], scale=1.0)
    want = torch.autograd.grad(y, leaves, q.dy, retain_graph=True)
    dx, _, da, db, *_ = y.grad_fn.apply(q.dy.float())
    for got, expected in zip((dx, da, db), want, strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_gradients_of_fp32_adapters_are_not_rounded_to_bf16():
    q = judging.problem(64, 32, 48, 8, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    got = run(q)
    for name in ("da", "db"):
        assert got[name].dtype == torch.float32
        assert not torch.equal(got[name], got[name].bfloat16().float())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_tensor_scale_gets_its_gradient_and_equals_the_float(p):
    q = judging.problem(6, 5, 8, 2, p=p)
    want = run(q)
    scale = torch.tensor(q.scale, requires_grad=True)
    a, b, x = (t.clone().requires_grad_() for t in (q.a, q.b, q.x))
    y = lora_linear(x, q.w, a, b, scale=scale, bias=q.bias, dropout_p=p, seed=q.seed)
    y.backward(q.dy)
    judging.check({"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}, q)
    low = (want["y"] - q.x @ q.w.t() - q.bias) / q.scale
    torch.testing.assert_close(scale.grad, (q.dy * low).sum(), rtol=1e-4, atol=1e-4)


def test_a_seed_gives_its_mask_and_none_draws_a_new_one():
    q = judging.problem(8, 8, 64, 4)
    call = lambda **kw: lora_linear(q.x, q.w, q.a, q.b, scale=1.0, dropout_p=0.5, **kw)  # noqa: E731
    assert torch.equal(call(seed=5), call(seed=torch.tensor(5)))
    assert not torch.equal(call(seed=5), call(seed=6))
    torch.manual_seed(3)
    first, second = call(), call()
    assert not torch.equal(first, second)  # each call draws a seed
    torch.manual_seed(3)
    assert torch.equal(first, call())


# --- checkpointing, functional_call, autocast ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    layer, x = FusedLoRALinear(32, 24, r=4, lora_dropout=0.5), torch.randn(16, 32)
    nn.init.normal_(layer.lora_B)
    plain = judging.layer_results(layer, x)
    replayed = judging.layer_results(layer, x, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant))
    assert len(plain) == 4
    assert all(torch.equal(p, r) for p, r in zip(plain, replayed, strict=True))


def test_functional_call_replaces_parameters():
    layer, x = FusedLoRALinear(6, 5, r=2), torch.randn(3, 6)
    other = {"lora_B": torch.randn(5, 2, requires_grad=True)}
    y = torch.func.functional_call(layer, other, (x,))
    want = layer(x) + layer.scaling * (x @ layer.lora_A.t() @ other["lora_B"].t())
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert other["lora_B"].grad is not None and layer.lora_B.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_of_the_parameters_dtype(dtype):
    layer, x = FusedLoRALinear(32, 24, r=4), torch.randn(16, 32, requires_grad=True)
    nn.init.normal_(layer.lora_B)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()  # outside the autocast context, as usual
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32
    inside = x.grad.clone()
    x.grad = None
    with torch.autocast("cpu", dtype=dtype):
        layer(x).sum().backward()
    assert torch.equal(x.grad, inside)
    q = judging.Problem(
        x.detach().to(dtype), layer.weight.to(dtype), layer.lora_A.detach(), layer.lora_B.detach(),
        layer.bias.to(dtype), torch.ones_like(y), layer.scaling, 0.0, None,
    )  # fmt: skip
    judging.check({"y": y.detach()}, q)


def test_autocast_leaves_integers_to_the_check():
    layer = FusedLoRALinear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="int64"):
        layer(torch.ones(2, 4, dtype=torch.int64))


# --- operators and torch.compile ---


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_operators_pass_opcheck(p):
    q = judging.problem(4, 6, 8, 2, p=p)
    forward = (q.x, q.w, q.a, q.b, q.bias, q.scale, p, q.seed, None, True)
    torch.library.opcheck(ops.forward, forward)
    _, h = ops.forward(*forward)
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(ops.backward, (q.dy, q.x, q.w, q.a, q.b, h, q.scale, p, q.seed, None, *needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_of_dora_pass_opcheck_and_give_the_mask_and_the_product(dtype, backend):
    q = judging.problem(7, 5, 24, 3, dtype=dtype, p=0.4)
    ops = torch.ops.lora_kernels
    torch.library.opcheck(ops.keep_mask, (q.x, q.p, q.seed, backend))
    torch.library.opcheck(ops.base_gemm, (q.x, q.w, backend))
    keep = dropout.keep_mask(q.seed, 7, 24, q.p)
    assert torch.equal(ops.keep_mask(q.x, q.p, q.seed, backend), keep.to(dtype))
    torch.testing.assert_close(ops.base_gemm(q.x, q.w, backend), q.x @ q.w.t())


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_forward_and_backward_compile_without_a_break(p):
    model = nn.Sequential(FusedLoRALinear(16, 24, r=4, lora_dropout=p), nn.GELU(), FusedLoRALinear(24, 8, r=4))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 16)
    plain, traced = judging.layer_results(model, x), judging.layer_results(model, x, compiled)
    assert len(plain) == 6
    for want, got in zip(plain, traced, strict=True):
        torch.testing.assert_close(got, want)


def test_inductor_compiles_a_dynamic_number_of_rows():
    layer = FusedLoRALinear(16, 24, r=4)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for M in (3, 5, 8):
        x = torch.randn(M, 16)
        plain, traced = judging.layer_results(layer, x), judging.layer_results(layer, x, compiled)
        for want, got in zip(plain, traced, strict=True):
            torch.testing.assert_close(got, want)


def test_the_meta_device_gives_shapes():
    layer = FusedLoRALinear(16, 24, r=4, device="meta")
    assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 24)


def test_explain_names_the_choice_and_every_refusal():
    q = judging.problem(4, 6, 8, 2)
    answer = explain(q.x, q.w, q.a, q.b, bias=q.bias)
    assert answer.forward in ("cpu", "eager") and answer.forward == answer.backward
    assert {answer.forward, *answer.passed_over} >= {"cpu", "eager", "triton"}
    assert all(reasons for reasons in answer.passed_over.values())
    named = explain(q.x, q.w, q.a, q.b, backend="eager")
    assert named.forward == "eager" and "by name" in named.passed_over["cpu"][0]
    assert "M≤4 N=6 K=8 R=2" in str(answer) and answer.forward in str(answer)
    with pytest.raises(ValueError, match="triton"):
        explain(q.x, q.w, q.a, q.b, backend="triton")
