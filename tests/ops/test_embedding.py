"""`lora_embedding` agrees with the equation in fp64, allocates nothing large, and works where F.embedding does."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from support.embedding_problems import check, evaluate, plain, problem, truth
from support.old_torch import TORCH
from support.wrapper import Wrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels.ops import embedding_norm, embedding_operators, embedding_passes
from lora_kernels.ops.embedding import lora_embedding
from lora_kernels.ops.embedding_norm import column_norm
from lora_kernels.ops.embedding_passes import Table

# --- values and gradients ---

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]


def without_kernels(monkeypatch) -> None:
    for module in (embedding_passes, embedding_norm):
        monkeypatch.setattr(module, "native", lambda: None)


@pytest.fixture(params=["kernels", "torch"])
def products(request, monkeypatch):
    """The products by the native kernels and by torch, as where the kernels are not built."""
    if request.param == "torch":
        without_kernels(monkeypatch)
    elif embedding_passes.native() is None:
        pytest.skip("the kernels are not built")


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_results_are_as_exact_as_those_of_plain_torch(dtype, adapter_dtype, dora):
    for turned, e in ((False, 1.0), (True, torch.tensor(50.596))):
        q = problem(
            301, 1030, 8, (5, 60), dtype=dtype, adapter_dtype=adapter_dtype, dora=dora, turned=turned, embed_scale=e,
            padding_idx=3,
        )  # fmt: skip
        check(evaluate(q), q)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "turned", "strided"])
@pytest.mark.parametrize("shape", [(1,), (0,), (7,), (3, 0), (2, 3, 5), ()])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (33, 9, 16), (4, 40, 2)])
def test_odd_and_empty_shapes_give_the_equation_in_fp64(sizes, shape, layout, dora):
    if layout == "strided" and len(shape) != 1:
        shape = (6,)
    q = problem(*sizes, shape, dtype=torch.float64, dora=dora, turned=layout == "turned", strided=layout == "strided")
    for padding_idx, e in ((None, 1.0), (0, 3.0), (-1, torch.tensor(2.5))):
        own = replace(q, padding_idx=padding_idx, embed_scale=e)
        want = truth(replace(own, padding_idx=None if padding_idx is None else padding_idx % sizes[0]))
        torch.testing.assert_close(evaluate(own), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (33, 9, 16), (7, 130, 200)])
def test_the_kernels_and_torch_compute_the_same_products(sizes, monkeypatch):
    q = problem(*sizes, (67,), strided=True)
    for kernels in (True, False):
        if not kernels:
            without_kernels(monkeypatch)
        for dy in (q.dy, q.dy[:1].expand(67, -1), q.dy.sum(1, keepdim=True).expand(-1, sizes[1])):
            own = replace(q, dy=dy)
            want = truth(own)
            for name, value in evaluate(own).items():
                bound = 1e-5 * want[name].abs().max() + 1e-6
                assert (value - want[name]).abs().max() <= bound, (kernels, name)


def test_ids_may_be_of_int32():
    q = problem(50, 24, 4, (3, 7), padding_idx=2)
    got, want = evaluate(replace(q, ids=q.ids.int())), evaluate(q)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_formula_of_loralib_gives_the_same():
    """loralib: nn.Embedding(x) + (F.embedding(x, lora_A.T) @ lora_B.T) · s, with lora_A [r, V] and lora_B [D, r]."""
    q = problem(50, 24, 4, (3, 7), dtype=torch.float64)
    a = q.a_t.t().contiguous().requires_grad_()
    b = q.b.clone().requires_grad_()
    y = nn.functional.embedding(q.ids, q.w) + (nn.functional.embedding(q.ids, a.transpose(0, 1)) @ b.t()) * q.scale
    da, db = torch.autograd.grad(y, [a, b], q.dy)
    got = evaluate(q)
    torch.testing.assert_close([got["y"], got["da_t"], got["db"]], [y.detach(), da.t(), db])


def test_gradients_pass_gradcheck():
    q = problem(9, 6, 3, (4, 5), dtype=torch.float64, dora=True, padding_idx=1)
    leaves = [t.clone().requires_grad_() for t in (q.a_t, q.b)]
    m = q.m.clone().requires_grad_()

    def lora(a_t, b):
        return lora_embedding(q.ids, q.w, a_t, b, scale=0.5, embed_scale=2.0)

    def dora(m):
        return lora_embedding(q.ids, q.w, q.a_t, q.b, scale=0.5, padding_idx=1, magnitude=m)

    torch.autograd.gradcheck(lora, leaves)
    torch.autograd.gradcheck(dora, [m])


def test_only_the_gradients_that_are_wanted_are_computed_and_are_the_same():
    q = problem(40, 24, 4, (3, 7), dora=True)
    whole = evaluate(q)
    for wanted in ("a_t", "b", "m"):
        leaves = {name: getattr(q, name).clone().requires_grad_(name == wanted) for name in ("a_t", "b", "m")}
        y = lora_embedding(q.ids, q.w, leaves["a_t"], leaves["b"], scale=q.scale, magnitude=leaves["m"])
        (grad,) = torch.autograd.grad(y, [leaves[wanted]], q.dy)
        assert torch.equal(grad, whole[f"d{wanted}"])


@pytest.mark.parametrize("turned", [False, True])
def test_repeated_ids_give_the_same_bits_in_every_run(turned):
    q = problem(3, 64, 8, (4000,), turned=turned)
    first = evaluate(q)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            again = evaluate(q)
            assert torch.equal(first["da_t"], again["da_t"])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("products")
def test_deterministic_algorithms_give_bits_that_no_number_of_threads_changes():
    q = problem(100, 520, 8, (2000,))
    threads, found = torch.get_num_threads(), []
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(evaluate(q))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    check(found[0], q)


@pytest.mark.usefixtures("poison")
def test_nothing_is_read_before_it_is_written():
    for dora in (False, True):
        q = problem(41, 24, 4, (3, 0), dora=dora)
        evaluate(q)
        q = problem(41, 24, 4, (3, 9), dora=dora, dtype=torch.bfloat16, adapter_dtype=torch.float32)
        assert all(torch.isfinite(t).all() for t in evaluate(q).values())


# --- the padding row ---


@pytest.mark.parametrize("dora", [False, True])
def test_the_padding_row_gets_no_delta_and_gives_no_gradient_to_a(dora):
    q = problem(20, 8, 3, (4, 9), dtype=torch.float64, dora=dora, padding_idx=5)
    q.ids[:, ::2] = 5
    got = evaluate(q)
    d = 1.0 if not dora else q.m / column_norm(q.w, q.a_t.clone().index_fill_(0, torch.tensor([5]), 0), q.b, 0.75, q.m)
    torch.testing.assert_close(got["y"][0, 0], q.w[5] * d)
    assert got["da_t"][5].count_nonzero() == 0
    torch.testing.assert_close(got, truth(q))


# --- memory ---

M, V, D, R = 1100, 700, 1000, 8
"""Sizes at which no block of the passes is as large as y or as E."""


class _Sizes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations return, also inside our operators."""

    INSIDE = {  # noqa: RUF012
        torch.ops.lora_kernels.embedding_norm.default: embedding_norm._run_norm,
        torch.ops.lora_kernels.embedding_forward.default: embedding_operators._run_forward,
        torch.ops.lora_kernels.embedding_backward.default: embedding_operators._run_backward,
    }

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.storages = {t.untyped_storage().data_ptr() for t in known}, dict[int, int]()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.INSIDE:
            with self:
                return self.INSIDE[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.kept.append(t)  # so that no address is used again
                self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return out


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[:2])
def test_nothing_of_the_size_of_y_is_allocated_beside_it(dtype, adapter_dtype, dora):
    q = problem(V, D, R, (M,), dtype=dtype, adapter_dtype=adapter_dtype, dora=dora, padding_idx=0, embed_scale=2.0)
    a_t, b = q.a_t.requires_grad_(), q.b.requires_grad_()
    m = None if q.m is None else q.m.requires_grad_()
    for dy in (q.dy, torch.randn(M, 2 * D).to(dtype)[:, :D], torch.ones((), dtype=dtype).expand(M, D)):
        with _Sizes([q.w, dy]) as seen:
            y = lora_embedding(q.ids, q.w, a_t, b, scale=1.0, embed_scale=2.0, padding_idx=0, magnitude=m)
            torch.autograd.grad(y, [a_t, b] if m is None else [a_t, b, m], dy)
        large = [n for n in seen.storages.values() if n >= min(M, V) * D]
        assert large == [M * D], "y alone"


@pytest.mark.parametrize("dora", [False, True])
def test_ids_and_h_are_all_that_is_saved(dora):
    q = problem(V, D, R, (M,), dora=dora)
    known = {t.untyped_storage().data_ptr() for t in (q.w, q.a_t, q.b)}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    m = None if q.m is None else q.m.requires_grad_()
    for need_b, h in ((True, M * R * 4), (False, 0)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            a_t, b = q.a_t.requires_grad_(), q.b.requires_grad_(need_b)
            y = lora_embedding(q.ids, q.w, a_t, b, scale=q.scale, magnitude=m)
        of_m = 0 if m is None else 2 * D * 4 + (0 if need_b else M * R * 4)  # n and d; h for the gradient of m
        assert sum(t.untyped_storage().nbytes() for t in saved.values()) == M * 8 + h + of_m
        assert y.requires_grad


# --- torch around it ---


@pytest.mark.parametrize("turned", [False, True])
def test_the_operators_pass_opcheck(turned):
    q = problem(20, 12, 4, (7,), dora=True, turned=turned)
    d, ops = torch.rand(12), torch.ops.lora_kernels
    for own, factor, padding_idx in ((None, None, None), (d, torch.tensor(2.0), 3)):
        table = Table(q.ids, q.w, q.a_t, q.b, own, factor, 0.5, 1.0, padding_idx)
        torch.library.opcheck(ops.embedding_forward.default, (*table, True))
        _, h = embedding_passes.forward(table, True)
        torch.library.opcheck(ops.embedding_backward.default, (q.dy, *table, h, True, True, own is not None))
    torch.library.opcheck(ops.embedding_norm.default, (q.w, q.a_t, q.b, 0.5))


@pytest.mark.parametrize("dora", [False, True])
def test_a_compiled_call_gives_the_same_bits(dora):
    q = problem(50, 24, 4, (3, 7), dora=dora, padding_idx=1, embed_scale=2.0)
    compiled = torch.compile(lora_embedding, fullgraph=True, backend="aot_eager")
    got, want = evaluate(q, compiled), evaluate(q)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_transforms_of_torch_func_and_forward_ad_give_the_equation():
    q = problem(30, 12, 4, (5, 6), dtype=torch.float64, dora=True, padding_idx=2)

    def loss(function):
        def of(a_t, b, m):
            y = function(q.ids, q.w, a_t, b, scale=q.scale, padding_idx=2, magnitude=m)
            return (y * q.dy).sum()

        return of

    operands = q.a_t, q.b, q.m
    got = torch.func.grad(loss(lora_embedding), argnums=(0, 1, 2))(*operands)
    torch.testing.assert_close(got, torch.func.grad(loss(plain), argnums=(0, 1, 2))(*operands))
    each = torch.func.vmap(lambda ids: lora_embedding(ids, q.w, q.a_t, q.b, scale=q.scale))(q.ids)
    torch.testing.assert_close(each, lora_embedding(q.ids, q.w, q.a_t, q.b, scale=q.scale))
    tangents = tuple(torch.ones_like(t) for t in operands)
    _, got = torch.func.jvp(loss(lora_embedding), operands, tangents)
    torch.testing.assert_close(got, torch.func.jvp(loss(plain), operands, tangents)[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.b, torch.ones_like(q.b))
        y = lora_embedding(q.ids, q.w, q.a_t, dual, scale=q.scale)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


def test_export_and_trace_record_operations_of_torch_alone():
    q = problem(30, 12, 4, (5, 6), dora=True, embed_scale=3.0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a_t, self.b, self.m = map(nn.Buffer, (q.w, q.a_t, q.b, q.m))  # torch 2.6 wants that

        def forward(self, ids):
            return lora_embedding(ids, self.w, self.a_t, self.b, scale=q.scale, embed_scale=3.0, magnitude=self.m)

    want = Layer()(q.ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(Layer(), (q.ids,))
    torch.testing.assert_close(traced(q.ids), want)
    exported = torch.export.export(Layer(), (q.ids,))
    torch.testing.assert_close(exported.module()(q.ids), want)
    if TORCH >= (2, 7):  # torch 2.6 does not tell that it exports, and the operator is recorded
        assert not any("lora_kernels" in str(node.target) for node in exported.graph.nodes)


def test_a_subclass_that_knows_torchs_operators_only_is_served_by_them():
    q = problem(30, 12, 4, (6,))
    y = lora_embedding(Wrapper(q.ids), Wrapper(q.w), Wrapper(q.a_t), Wrapper(q.b), scale=q.scale)
    torch.testing.assert_close(y.inner, lora_embedding(q.ids, q.w, q.a_t, q.b, scale=q.scale))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    q = problem(50, 24, 4, (3, 7), dora=True)

    def checkpointed(ids, *operands, **settings):
        anchor = torch.zeros((), requires_grad=True)  # reentrant checkpointing asks for an input with a gradient
        return checkpoint(lambda _: lora_embedding(ids, *operands, **settings), anchor, use_reentrant=reentrant)

    leaves = [t.clone().requires_grad_() for t in (q.a_t, q.b, q.m)]
    y = checkpointed(q.ids, q.w, *leaves[:2], scale=q.scale, magnitude=leaves[2])
    y.backward(q.dy)
    want = evaluate(q)
    assert all(torch.equal(leaf.grad, want[name]) for leaf, name in zip(leaves, ("da_t", "db", "dm"), strict=True))


def test_autocast_changes_nothing():
    q = problem(50, 24, 4, (3, 7), dora=True)
    want = evaluate(q)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(q)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_inference_mode_and_no_grad_give_the_same_y():
    q = problem(50, 24, 4, (3, 7), dora=True)
    want = evaluate(q)["y"]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = lora_embedding(q.ids, q.w, q.a_t, q.b.requires_grad_(), scale=q.scale, magnitude=q.m)
        assert torch.equal(y, want)
        assert not y.requires_grad


def test_a_tensor_scale_gets_its_gradient():
    q = problem(50, 24, 4, (3, 7), dtype=torch.float64)
    s = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    y = lora_embedding(q.ids, q.w, q.a_t, q.b, scale=s)
    (ds,) = torch.autograd.grad(y, [s], q.dy)
    torch.testing.assert_close(ds, (q.a_t[q.ids] @ q.b.t() * q.dy).sum())


def test_a_double_backward_raises():
    q = problem(50, 24, 4, (3, 7))
    a_t, b = q.a_t.requires_grad_(), q.b.requires_grad_()
    y = lora_embedding(q.ids, q.w, a_t, b, scale=q.scale)
    (db,) = torch.autograd.grad(y.square().sum(), [b], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_embedding has no double backward"):
        torch.autograd.grad(db.sum(), [a_t])


def test_flops_are_those_of_the_products():
    q = problem(50, 24, 4, (21,), dora=True)
    counter = FlopCounterMode(display=False)
    with counter:
        y = lora_embedding(q.ids, q.w, q.a_t.requires_grad_(), q.b.requires_grad_(), scale=q.scale)
        y.backward(q.dy)
    assert counter.get_total_flops() == 3 * 2 * 21 * 24 * 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lora_embedding(q.ids, q.w, q.a_t, q.b, scale=q.scale, magnitude=q.m)
    assert counter.get_total_flops() == 2 * 21 * 24 * 4 + 2 * 50 * 24 * 4 + 2 * 4 * 4 * (50 + 24)


# --- the norm ---


def check_norm(q, w: Tensor) -> Tensor:
    """Return the norm, which is exact to a few eps."""
    want = torch.linalg.vector_norm(w.double() + 0.5 * q.a_t.double() @ q.b.double().t(), dim=0)
    got = column_norm(w, q.a_t, q.b, 0.5, torch.empty(0))
    assert ((got - want).abs() / want).max() < 8 * torch.finfo(torch.float32).eps
    return got


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_exact_to_a_few_eps(dtype):
    for sizes in ((5000, 40, 8), (999, 131, 20)):
        for turned in (False, True):
            q = problem(*sizes, (1,), turned=turned)
            check_norm(q, q.w.to(dtype))


def test_the_norm_is_exact_with_every_instruction_set_and_its_bits_with_any_number_of_threads(isa):
    q = problem(3000, 200, 8, (1,))
    threads, norms = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            norms.append(check_norm(q, q.w))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*norms)


@pytest.mark.usefixtures("products")
def test_the_norm_over_an_empty_table_is_the_smallest_number():
    w, a_t, b = torch.empty(0, 5), torch.empty(0, 2), torch.ones(5, 2)
    norm = column_norm(w, a_t, b, 0.5, torch.ones(5))
    assert torch.equal(norm, torch.full((5,), torch.finfo(torch.float32).smallest_normal))
    assert column_norm(torch.empty(4, 0), torch.ones(4, 2), torch.empty(0, 2), 0.5, torch.empty(0)).shape == (0,)


def test_a_column_that_is_zero_or_cancelled_has_a_finite_d():
    q = problem(30, 6, 2, (4,))
    w = torch.zeros_like(q.w)
    w[:, 1:] = -(q.a_t @ q.b.t())[:, 1:]
    b = q.b.clone()
    b[0] = 0
    y = lora_embedding(q.ids, w, q.a_t, b, scale=1.0, magnitude=torch.ones(6))
    assert torch.isfinite(y).all()


def test_a_write_to_the_table_that_leaves_no_trace_is_seen_in_the_next_call():
    q = problem(30, 6, 2, (4,), dora=True)
    lora_embedding(q.ids, q.w, q.a_t, q.b, scale=1.0, magnitude=q.m)
    q.w.data.mul_(2.0)
    got = lora_embedding(q.ids, q.w, q.a_t, q.b, scale=1.0, magnitude=q.m)
    torch.testing.assert_close(got, plain(q.ids, q.w, q.a_t, q.b, scale=1.0, magnitude=q.m))


# --- errors ---


def test_errors_name_the_values():
    q = problem(30, 12, 4, (6,), dora=True)

    def call(ids=q.ids, w=q.w, a_t=q.a_t, b=q.b, **settings):
        return lora_embedding(ids, w, a_t, b, **({"scale": 1.0} | settings))

    with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch\.float32"):
        call(ids=q.ids.float())
    with pytest.raises(TypeError, match=r"weight must be fp64, fp32, fp16 or bf16, got torch\.int8"):
        call(w=q.w.to(torch.int8))
    with pytest.raises(TypeError, match=r"lora_a_t torch\.bfloat16"):
        call(a_t=q.a_t.bfloat16(), b=q.b.bfloat16())
    with pytest.raises(ValueError, match=r"weight \(30, 12\), lora_a_t \(29, 4\), lora_b \(12, 4\)"):
        call(a_t=q.a_t[1:])
    with pytest.raises(ValueError, match=r"lora_b \(12, 3\)"):
        call(b=q.b[:, 1:])
    with pytest.raises(ValueError, match="padding_idx must be a row of the table of 30 rows, got 30"):
        call(padding_idx=30)
    with pytest.raises(ValueError, match=r"magnitude must be \[D\] beside a weight \(30, 12\), got \(30,\)"):
        call(magnitude=torch.ones(30))
    with pytest.raises(TypeError, match=r"magnitude must have lora_a_t's dtype .*got torch\.bfloat16"):
        call(magnitude=q.m.bfloat16())
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        call(scale=float("inf"))
    with pytest.raises(ValueError, match=r"an embed_scale must have one element, got shape \(2,\)"):
        call(embed_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"weight \(30, 12\) requires a gradient"):
        call(w=q.w.clone().requires_grad_())
    with pytest.raises(ValueError, match="lora_b on meta"):
        call(b=q.b.to("meta"))
    with pytest.raises(IndexError):
        call(ids=torch.tensor([30]))
