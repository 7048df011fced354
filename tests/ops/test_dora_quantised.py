"""DoRA over a weight in 4 or 8 bits is the dense DoRA of the dequantised weight, and allocates nothing of its size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging
from support.dora_problems import NAMES, Storages, magnitude, plain_torch, run, truth
from support.fences import fences
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import dora_linear, quantize_weight, reference
from lora_kernels.backends import eager
from lora_kernels.backends.cpu import quant as cpu_quant
from lora_kernels.ops.dora_norm import weight_norm
from lora_kernels.quant.weight import Nested, QuantizedWeight
from lora_kernels.testing import judge

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "nf4": {"format": "nf4"},
    "nf4 double": {"format": "nf4", "double_quant": True},
    "nf4 straddling": {"format": "nf4", "blocksize": 256},  # a block is neither a part of a row nor whole rows
    "fp4": {"format": "fp4", "blocksize": 128},
    "int8": {"format": "int8"},
    "fp8 tensor": {"format": "fp8", "scaling": "tensor"},
    "fp8 row": {"format": "fp8", "scaling": "row"},
    "fp8 block": {"format": "fp8", "scaling": "block"},
}


def problem(kind: str, *size, **kwargs) -> tuple[judge.Problem, judge.Problem]:
    """Return a problem whose w is quantised, and the same with that w dequantised to fp32."""
    q = judging.problem(*size, **kwargs)
    w = quantize_weight(q.w.float(), **KINDS[kind])
    return replace(q, w=w), replace(q, w=w.dequantize(FP32))


CASES = [
    *[(kind, FP32, FP32) for kind in KINDS],
    *[("nf4", *dtypes) for dtypes in judging.DTYPES[1:]],
    ("int8", BF16, FP32),
    ("fp8 row", FP16, FP32),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_no_larger_than_plain_torchs(case, p, backend):
    """Plain torch has W dequantised in x's dtype, and the truth has it as it is."""
    kind, dtype, adapter_dtype = case
    q, stored = problem(kind, 97, 130, 176, 16, dtype=dtype, adapter_dtype=adapter_dtype, p=p)
    m = magnitude(stored)
    got, want = run(q, m, backend=backend), truth(stored, m)
    plain = plain_torch(replace(stored, w=stored.w.to(dtype)), m)
    for name in NAMES:
        verdict = judge.against_plain(name, got[name], want[name], plain[name])
        assert verdict.fault is None, verdict.fault
    assert got["da"].dtype == got["db"].dtype == got["dm"].dtype == adapter_dtype


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("size", [(1, 1, 2, 1), (5, 7, 6, 2), (17, 33, 66, 3), (0, 16, 24, 4), (9, 16, 8, 33)], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8 block"])
def test_values_and_gradients_hold_for_every_shape(format, size, p, backend, poison):
    q, stored = problem(format, *size, p=p, strided=True)
    m = magnitude(stored)
    got, want = run(q, m, backend=backend), truth(stored, m)
    for name in NAMES:
        assert got[name].shape == want[name].shape
        if want[name].numel():
            worst = (got[name].double() - want[name]).abs().max().item()
            assert worst <= 2**-19 * max(want[name].abs().max().item(), 1.0), (name, worst)  # as for a dense W


def test_fp64_is_served():
    q, stored = problem("nf4", 5, 7, 6, 2)
    q = replace(q, **{name: getattr(q, name).double() for name in ("x", "a", "b", "bias", "dy")})
    m = magnitude(stored, torch.float64)
    got, want = run(q, m), truth(stored, m)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name])


# --- the norm ---


@pytest.mark.parametrize("size", [(1100, 186, 8), (1, 2, 1), (25, 2050, 65), (3, 1024, 300), (130, 36, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_exact_to_a_few_eps(kind, size, isa, poison):
    q, stored = problem(kind, 1, *size)
    exact = torch.linalg.vector_norm(stored.w.double() + q.scale * q.b.double() @ q.a.double(), dim=1)
    for a, b in ((q.a, q.b), (q.a.double(), q.b.double())):  # the native kernel, and torch
        norm = weight_norm(q.w, a, b, q.scale, a)
        assert norm.dtype == a.dtype
        assert ((norm.double() - exact) / exact).abs().max().item() <= 8 * torch.finfo(FP32).eps


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_reads_and_writes_inside_its_operands(kind, isa):
    """Every tensor ends at the last byte before a page that must not be touched."""
    _C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels are not built")
    for size in ((7, 1062, 3), (30, 34, 5), (3, 2, 1)):
        q, _ = problem(kind, 1, *size)
        want = weight_norm(q.w, q.a, q.b, 0.5, q.a)
        with fences() as fenced:
            nested = q.w.nested and Nested(*map(fenced, q.w.nested))
            w = replace(q.w, codes=fenced(q.w.codes), scales=fenced(q.w.scales), nested=nested)
            n = fenced(torch.full((size[0],), torch.nan))
            _C.row_norm(1, w, fenced(q.a), fenced(q.b), 0.5, n)
            assert torch.equal(n, want)
        for a, b in ((q.a[:, :-1], q.b), (q.a, q.b[1:]), (q.a, q.b[:, :0])):
            with pytest.raises(ValueError, match="the CPU kernels"):
                _C.row_norm(1, q.w, a, b, 0.5, n.clone())


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_the_norm_does_not_depend_on_the_number_of_threads(kind, isa):
    q, _ = problem(kind, 1, 300, 514, 8)
    before = torch.get_num_threads()
    norms = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        norms.append(weight_norm(q.w, q.a, q.b, q.scale, q.a))
    torch.set_num_threads(before)
    assert torch.equal(*norms)


def test_a_change_of_the_codes_is_seen():
    """No norm is kept between calls."""
    q, _ = problem("int8", 3, 6, 8, 2)
    m = torch.ones(6)
    dora_linear(q.x, q.w, q.a, q.b, m, scale=1.0)
    q.w.codes.numpy()[1] = 5  # a write that torch does not count
    want = reference.dora_linear(q.x, q.w.dequantize(FP32), q.a, q.b, m, scale=1.0)
    torch.testing.assert_close(dora_linear(q.x, q.w, q.a, q.b, m, scale=1.0), want)


# --- memory ---


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_nothing_of_the_weights_size_is_allocated(dtypes, p, backend, monkeypatch):
    """No tensor of N×K elements, in any dtype, is allocated in forward or backward. Parts of W are dequantised in
    memory of a bounded size, which is made small here."""
    M, N, K, block = 2, 768, 640, 64 << 10
    monkeypatch.setattr(cpu_quant, "_BLOCK_BYTES", block)
    monkeypatch.setattr(cpu_quant, "_kept", type(cpu_quant._kept)())
    monkeypatch.setattr(eager, "_ELEMENTS", block // 4)
    monkeypatch.setattr("lora_kernels.ops.dora_norm._WEIGHT_ROWS", 16)
    q, stored = problem("nf4", M, N, K, 2, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    m = magnitude(stored, FP32)
    leaves = [t.clone().requires_grad_() for t in (q.x, q.a, q.b, m, q.bias)]
    x, a, b, m, bias = leaves
    with Storages([*leaves, *q.w.tensors]) as seen:
        for _ in range(2):
            y = dora_linear(x, q.w, a, b, m, scale=0.5, bias=bias, dropout_p=p, backend=backend)
            y.float().sum().backward()
    assert len(seen.sizes) > 20 and max(seen.sizes) <= 2 * block < N * K


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_more_than_codes_x_h_and_z_is_saved(p):
    M, N, K, R = 64, 96, 80, 8
    q, stored = problem("nf4 double", M, N, K, R)
    x, a, b, m = (t.requires_grad_() for t in (q.x, q.a, q.b, magnitude(stored)))

    def saved() -> int:
        return judging.saved_bytes(lambda: dora_linear(x, q.w, a, b, m, scale=0.5, bias=q.bias, dropout_p=p))

    own = q.w.nbytes + a.nbytes + b.nbytes + 4 * 4 * N + 64  # m, the norm, d and other vectors of N elements
    assert saved() <= 4 * (M * K + M * R + M * N) + own
    m.requires_grad_(False)
    assert saved() <= 4 * (M * K + M * R) + own
    a.requires_grad_(False), b.requires_grad_(False)
    assert saved() <= own


# --- the call ---


def call(q: judge.Problem, m: Tensor, x: Tensor, **kwargs) -> Tensor:
    return dora_linear(x, q.w, q.a, q.b, m, scale=q.scale, bias=q.bias, dropout_p=q.p, seed=q.seed, **kwargs)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("asks", [("x",), ("a",), ("b",), ("m",), ("bias",), ("x", "m"), ("b", "m")], ids=str)
def test_only_what_needs_a_gradient_gets_one(asks, p):
    q, stored = problem("nf4", 6, 5, 16, 2, p=p)
    m = magnitude(stored)
    want = truth(stored, m)
    leaves = {
        name: t.clone().requires_grad_(name in asks)
        for name, t in {"x": q.x, "a": q.a, "b": q.b, "m": m, "bias": q.bias}.items()
    }
    x, a, b, m, bias = leaves.values()
    dora_linear(x, q.w, a, b, m, scale=q.scale, bias=bias, dropout_p=p, seed=q.seed).backward(q.dy)
    assert {name for name, t in leaves.items() if t.grad is not None} == set(asks)
    for name in asks:
        torch.testing.assert_close(leaves[name].grad.double(), want[f"d{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("M", [3, 40])
def test_a_bias_of_another_dtype_is_added_before_x_w_is_rounded(dtype, M, backend):
    q, stored = problem("nf4", M, 33, 66, 3, dtype=dtype, adapter_dtype=FP32)
    m = magnitude(stored)
    bias = q.bias.float()
    got = dora_linear(q.x, q.w, q.a, q.b, m, scale=q.scale, bias=bias, backend=backend)
    same = dora_linear(q.x, q.w, q.a, q.b, m, scale=q.scale, bias=bias.to(dtype), backend=backend)
    assert got.dtype == dtype and torch.equal(got, same)
    want = truth(replace(stored, bias=bias.to(dtype)), m)["y"]
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_gives_its_dtype_and_fp32_gradients(dtype, p):
    q, stored = problem("nf4", 16, 24, 32, 4, p=p)
    m = magnitude(stored).requires_grad_()
    a = q.a.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = call(q, m, q.x)
    y.sum().backward()
    assert y.dtype == dtype and a.grad.dtype == m.grad.dtype == FP32
    inner = replace(stored, x=q.x.to(dtype), bias=q.bias.to(dtype))
    torch.testing.assert_close(y.double(), truth(inner, m.detach())["y"], rtol=0.03, atol=0.05)


@pytest.mark.parametrize(
    ("dtypes", "p"), [((FP32, FP32), 0.3), pytest.param((BF16, FP32), 0.0, marks=pytest.mark.slow)], ids=str
)
def test_a_compiled_call_has_the_values_of_an_eager_one(dtypes, p):
    q, stored = problem("nf4 double", 6, 24, 32, 4, p=p, dtype=dtypes[0], adapter_dtype=dtypes[1])
    m = magnitude(stored)
    compiled = torch.compile(dora_linear, fullgraph=True, backend="aot_eager")
    got, want = run(q, m, compiled), run(q, m)
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_output_is_the_same_without_gradients(context):
    q, stored = problem("fp8 row", 5, 24, 32, 4, p=0.3)
    m = magnitude(stored).requires_grad_()
    y = call(q, m, q.x)
    with context():
        assert torch.equal(call(q, m, q.x), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_repeat_and_checkpointing_replays_the_mask(reentrant):
    q, stored = problem("nf4", 33, 40, 66, 4)
    leaves = [t.requires_grad_() for t in (q.x, q.a, q.b, magnitude(stored))]

    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        def layer(x, a, b, m):
            return dora_linear(x, q.w, a, b, m, scale=0.5, dropout_p=0.4)

        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(3)
        y = checkpoint(layer, *leaves, use_reentrant=reentrant) if checkpointed else layer(*leaves)
        y.backward(q.dy)
        return tuple(leaf.grad for leaf in leaves)

    first = gradients(False)
    for checkpointed in (False, True):
        assert all(map(torch.equal, gradients(checkpointed), first))


def test_the_operators_pass_opcheck():
    q, stored = problem("nf4 double", 3, 20, 30, 4)
    ops = torch.ops.lora_kernels
    parts = list(q.w.tensors[1:]), q.w.format, q.w.blocksize
    torch.library.opcheck(ops.dora_norm, (q.w.codes, q.a, q.b, q.scale, *parts))
    torch.library.opcheck(ops.base_gemm, (q.x, q.w.codes, None, None, None, False, *parts))
    torch.library.opcheck(ops.base_gemm, (q.dy, q.w.codes, None, None, None, True, *parts))
    torch.testing.assert_close(ops.base_gemm(q.dy, q.w.codes, None, None, None, True, *parts), q.dy @ stored.w)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_flops_are_those_of_the_dense_weight(p):
    from torch.utils.flop_counter import FlopCounterMode

    q, stored = problem("nf4", 6, 24, 32, 4, p=p)
    counts = []
    for each in (q, stored):
        leaves = [t.detach().requires_grad_() for t in (q.x, q.a, q.b, magnitude(stored))]
        x, a, b, m = leaves
        with FlopCounterMode(display=False) as counter:
            dora_linear(x, each.w, a, b, m, scale=1.0, dropout_p=p, seed=q.seed).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_transforms_and_traces_compute_it_in_plain_torch(kind, p):
    q, stored = problem(kind, 4, 24, 32, 4, p=p)
    q, m = replace(q, seed=None), magnitude(stored)
    if p == 0:
        y = call(q, m, q.x)
        traced = torch.jit.trace(lambda x: call(q, m, x), (q.x,), check_trace=False)
        torch.testing.assert_close(traced(q.x), y)
        _, tangent = torch.func.jvp(lambda x: call(q, m, x), (q.x,), (q.dy @ stored.w,))
        torch.testing.assert_close(tangent, call(replace(q, bias=None), m, q.dy @ stored.w), rtol=1e-4, atol=1e-4)
    per_row = torch.func.vmap(torch.func.grad(lambda x: call(q, m, x[None]).square().sum()), randomness="different")
    dx = per_row(q.x)
    assert dx.shape == q.x.shape
    if p == 0:
        leaf = q.x.clone().requires_grad_()
        call(q, m, leaf).square().sum().backward()
        torch.testing.assert_close(dx, leaf.grad, rtol=1e-4, atol=1e-4)


def test_a_magnitude_that_does_not_fit_is_named():
    q, _ = problem("nf4", 3, 5, 8, 2)
    with pytest.raises(ValueError, match=r"magnitude must be \[N\].*\(5, 8\).*\(4,\)"):
        call(q, torch.ones(4), q.x)
    broken: QuantizedWeight = replace(q.w, codes=q.w.codes[:, :2])
    with pytest.raises(ValueError, match="codes of nf4"):
        call(replace(q, w=replace(broken, checked=False)), torch.ones(5), q.x)
    with pytest.raises(ValueError, match="cuda"):
        call(q, torch.ones(5), q.x, backend="cuda")
