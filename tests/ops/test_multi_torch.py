"""Many adapters under what torch does to a call: autocast, checkpointing, compilers, modes, transforms, traces."""

from __future__ import annotations

import warnings
from dataclasses import replace

import peft
import pytest
import torch
from support import judging, many
from support.many import mixed, run
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Adapter, AdapterStack, Rows, lora_linear_multi, quantize_weight
from lora_kernels.backends import eager
from lora_kernels.ops import registered_multi
from lora_kernels.testing import judge

pytestmark = pytest.mark.usefixtures("one_thread")

FORWARD = torch.ops.lora_kernels.forward_multi.default
BACKWARD = torch.ops.lora_kernels.backward_multi.default


@pytest.fixture(autouse=True)
def _no_warnings_of_eager():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no kernel is chosen")
        yield


def leaves(m: many.Mixed) -> tuple[Tensor, list[Adapter], list[Tensor]]:
    """Return an x that wants a gradient, such adapters, and all of these tensors."""
    x = m.x.detach().clone().requires_grad_()
    adapters = [
        each._replace(
            lora_a=each.lora_a.detach().clone().requires_grad_(), lora_b=each.lora_b.detach().clone().requires_grad_()
        )
        for each in m.adapters
    ]
    return x, adapters, [x, *(t for each in adapters for t in each[:2])]


def gradients(y: Tensor, wanted: list[Tensor], dy: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(y, wanted, dy, allow_unused=True))


def equal(got: list[Tensor | None], want: list[Tensor | None]) -> bool:
    """Return whether gradients have the same bits; zeros stand for None."""
    pairs = zip(got, want, strict=True)
    return all((u is None or not u.any()) if v is None else u is not None and torch.equal(u, v) for u, v in pairs)


# --- what is saved ---


def test_x_and_the_sum_of_rows_times_ranks_are_saved():
    m = mixed(64, 40, 24, (4, 8, 16), bias=False)
    x, adapters, _ = leaves(m)
    adapters = [each._replace(lora_a=nn.Parameter(each.lora_a), lora_b=nn.Parameter(each.lora_b)) for each in adapters]
    w = nn.Parameter(m.w, requires_grad=False)
    rows = m.rows
    of_h = sum(count * each.lora_a.shape[0] for count, each in zip(rows.counts, adapters, strict=True))
    saved = judging.saved_bytes(lambda: lora_linear_multi(x, w, adapters, rows, backend="eager"))
    assert saved == 4 * (64 * 24 + of_h)
    frozen_a = [each._replace(lora_a=each.lora_a.detach()) for each in adapters]
    of_a = 4 * 24 * sum(each.lora_a.shape[0] for each in adapters)
    saved = judging.saved_bytes(lambda: lora_linear_multi(x, w, frozen_a, rows, backend="eager"))
    assert saved == 4 * of_h + of_a


def test_autocast_saves_x_once_in_its_dtype_and_no_copy_of_w():
    m = mixed(64, 40, 24, (4, 8), bias=False)
    x, adapters, _ = leaves(m)
    adapters = [each._replace(lora_a=nn.Parameter(each.lora_a), lora_b=nn.Parameter(each.lora_b)) for each in adapters]
    w, rows = nn.Parameter(m.w, requires_grad=False), m.rows
    of_h = sum(count * each.lora_a.shape[0] for count, each in zip(rows.counts, adapters, strict=True))

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear_multi(x, w, adapters, rows)

    assert judging.saved_bytes(call) == 2 * 64 * 24 + 4 * of_h  # fp32 adapters have an h in fp32
    y = call()
    y.backward(m.dy.bfloat16())
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    cast = replace(m, x=m.x.bfloat16(), w=m.w.bfloat16(), dy=m.dy.bfloat16())
    want = run(cast)
    assert torch.equal(y, want.y) and torch.equal(x.grad, want.dx.float())
    assert all(torch.equal(each.lora_a.grad, da) for each, da in zip(adapters, want.da, strict=True))


def test_autocast_converts_adapters_in_16_bits_and_leaves_fp64_alone():
    m = mixed(20, 12, 8, (2, 3))
    half = [each._replace(lora_a=each.lora_a.half(), lora_b=each.lora_b.half()) for each in m.adapters]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear_multi(m.x, m.w, half, m.rows)
        wide = mixed(20, 12, 8, (2, 3), dtype=torch.float64)
        assert lora_linear_multi(wide.x, wide.w, wide.adapters, wide.rows).dtype == torch.float64
    both = [each._replace(lora_a=each.lora_a.bfloat16(), lora_b=each.lora_b.bfloat16()) for each in half]
    assert torch.equal(y, lora_linear_multi(m.x.bfloat16(), m.w.bfloat16(), both, m.rows))


# --- checkpointing ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_drawn_seeds(reentrant):
    m = mixed(30, 12, 8, (2, 3, 4), p=0.5)
    m = replace(m, adapters=[each._replace(seed=None) for each in m.adapters])
    results = []
    for kept in (False, True):
        x, adapters, wanted = leaves(m)

        def layer(x, adapters=adapters):
            return lora_linear_multi(x.sin(), m.w, adapters, m.rows, bias=m.bias)

        torch.manual_seed(4)
        y = checkpoint(layer, x, use_reentrant=reentrant) if kept else layer(x)
        y.backward(m.dy)
        results.append([y.detach(), *(t.grad for t in wanted)])
    assert equal(*results)


def test_a_checkpointing_policy_sees_the_operator():
    m = mixed(30, 12, 8, (2, 3))
    x, adapters, wanted = leaves(m)
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE if op is FORWARD else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        return lora_linear_multi(x.sin(), m.w, adapters, m.rows)

    y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    assert FORWARD in asked and equal(gradients(y, wanted, m.dy), gradients(layer(x), wanted, m.dy))


# --- observers ---


class Seen(TorchDispatchMode):
    """Records the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_kernels":
            self.ours.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """A list that gets the name of the registered operator at each of its calls."""
    calls: list[str] = []
    for name in ("_forward_op", "_backward_op"):
        inner = getattr(registered_multi, name)
        monkeypatch.setattr(
            registered_multi, name, lambda *args, inner=inner, name=name: calls.append(name) or inner(*args)
        )
    return calls


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_operators_are_called_where_something_observes_them_only(operators, format):
    m = mixed(30, 12, 8, (2, None, 4), p=0.3)
    m = m if format == "dense" else replace(m, w=quantize_weight(m.w, "nf4"))
    want = run(m)
    with torch.no_grad():
        y = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias)
    assert operators == []
    with Seen() as seen:
        got = run(m)
    assert seen.ours == [FORWARD, BACKWARD]
    assert equal(got.tensors(), want.tensors()) and torch.equal(got.y, y)
    assert got.da[0] is not None and got.da[1] is None
    with Seen() as seen, torch.no_grad():
        stack = AdapterStack([each and each._replace(dropout_p=0.0) for each in m.adapters])
        lora_linear_multi(m.x, m.w, stack, m.rows)
    assert seen.ours == [FORWARD]
    with torch.profiler.profile() as profile:
        run(m)
    names = [event.name for event in profile.events()]
    assert names.count("lora_kernels::forward_multi") == names.count("lora_kernels::backward_multi") == 1


@pytest.mark.parametrize("place", ["x", "w", "a", "b", "bias"])
def test_lazily_negated_operands_and_subclasses_go_through_the_operator(operators, place):
    class Kind(Tensor):
        pass

    m = mixed(30, 12, 8, (2, 3))
    given = {"x": m.x, "w": m.w, "a": m.adapters[1].lora_a, "b": m.adapters[1].lora_b, "bias": m.bias}

    def call(x, w, a, b, bias):
        with torch.no_grad():
            return lora_linear_multi(
                x, w, [m.adapters[0], m.adapters[1]._replace(lora_a=a, lora_b=b)], m.rows, bias=bias
            )

    want = call(**given | {place: -given[place]})
    assert operators == []
    assert torch.equal(call(**given | {place: torch._neg_view(given[place])}), want) and operators == ["_forward_op"]
    call(**given | {place: given[place].as_subclass(Kind)})
    assert operators == ["_forward_op"] * 2


def test_a_tensor_that_has_outlived_a_transform_is_served():
    m, kept = mixed(30, 12, 8, (2, 3)), []
    torch.func.grad(lambda t: (kept.append(t.detach()), t.sum())[1])(m.adapters[1].lora_a)
    outlived = [m.adapters[0], m.adapters[1]._replace(lora_a=kept[0])]
    want = lora_linear_multi(m.x, m.w, m.adapters, m.rows)
    assert torch.equal(lora_linear_multi(m.x, m.w, outlived, m.rows), want)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_the_operators_pass_opcheck(p, format):
    m = mixed(9, 6, 4, (2, 3), p=p)
    w, last = m.w, ()
    if format == "nf4":
        q = quantize_weight(m.w, "nf4")
        w, last = q.codes, (list(q.tensors[1:]), "nf4", q.blocksize)
    a, b, scale, rates, seeds, _ = (list(column) for column in zip(*m.adapters, strict=True))
    a, b, scale, rates, seeds = [*a, None], [*b, None], [*scale, 1.0], [*rates, 0.0], [*seeds, None]
    rows = m.rows.padded(3)
    columns = a, b, scale, rates, seeds, rows.order, rows.starts, None
    forward = (m.x, w, m.bias, *columns, True, *last)
    torch.library.opcheck(FORWARD, forward)
    _, h = FORWARD(*forward)
    backward = (m.dy, m.x, w, h, *columns, True, [True, False, True], [True, True, False], *last)
    torch.library.opcheck(BACKWARD, backward)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_graphs_of_make_fx_hold_the_operator(tracing):
    m = mixed(9, 6, 4, (2, 3))
    rows = m.rows

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, rows)

    with torch.no_grad():
        graph = make_fx(call, None, tracing, _allow_non_fake_inputs=True)(m.x)
    assert FORWARD in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(m.x), call(m.x))


# --- torch.compile ---


def splits(n: int) -> list[Tensor]:
    """Return ids of several lengths and splits: mixed, of one adapter, and of none."""
    drawn = torch.Generator().manual_seed(0)
    mixes = [torch.randint(-1, n, (M,), generator=drawn) for M in (12, 12, 17, 31, 9, 23)]
    return [*mixes[:2], torch.full((12,), 2), torch.full((12,), -1), *mixes[2:], torch.full((20,), -1)]


WAYS = {
    "ids": (lambda ids, n: ids, lambda given, n: Rows.by_id(given, n)),
    "rows": (Rows.by_id, lambda given, n: given),
    "rows of fewer adapters": (lambda ids, n: Rows.by_id(ids.clamp(max=1), 2), lambda given, n: given),
    "rows of known counts": (
        lambda ids, n: Rows.by_length([len(ids) // 3, len(ids) - len(ids) // 3], [0, 2], n),
        lambda given, n: given,
    ),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=[] if (kind, way) == ("list", "rows") else [pytest.mark.slow])
        for kind in ("list", "stack")
        for way in WAYS
    ],
)
def test_a_compiled_program_serves_any_rows(kind, way):
    """One compilation for the first M, one for any M, and none for segments and splits."""
    m = mixed(1, 12, 8, (2, 3, 4))
    _, adapters, _ = leaves(m)
    given = adapters if kind == "list" else AdapterStack(m.adapters)
    make, read = WAYS[way]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(x, of):
        return lora_linear_multi(x, m.w, given, read(of, 3), bias=m.bias)

    torch._dynamo.reset()
    program = torch.compile(call, backend=backend, fullgraph=True)
    for ids in splits(3):
        of = make(ids, 3)
        x = torch.randn(len(ids), 8, requires_grad=True)
        got, want = program(x, of), call(x, of)
        assert torch.equal(got, want) and torch.equal(program(x, of), want)
        wanted = [x, *(t for each in adapters for t in each[:2])] if kind == "list" else [x]
        dy = torch.randn_like(got)
        assert equal(gradients(got, wanted, dy), gradients(want, wanted, dy))
    assert len(compiled) <= 2


@pytest.mark.slow
def test_a_compiled_program_sees_what_a_stack_holds_now():
    m = mixed(12, 12, 8, (2, 3))
    stack, rows = AdapterStack(m.adapters), m.rows

    def call(x):
        return lora_linear_multi(x, m.w, stack, rows)

    torch._dynamo.reset()
    program = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(program(m.x), call(m.x))
        before = call(m.x)
        stack.replace({0: AdapterStack([m.adapters[0]._replace(scale=3.0)]).slots[0]})
        assert torch.equal(program(m.x), call(m.x)) and not torch.equal(call(m.x), before)
        stack.replace({1: None})
        assert torch.equal(program(m.x), call(m.x))


@pytest.mark.slow
def test_dropout_and_samples_compile_without_a_break():
    m = mixed(12, 12, 8, (2, 3), p=0.5, ids=torch.tensor([0, -1, 1]).repeat_interleave(4))
    x, adapters, wanted = leaves(m)

    def call(x):
        rows = Rows.by_sample(["u", None, "v"], ["u", "v"])
        return lora_linear_multi(x.view(3, 4, 8), m.w, adapters, rows, bias=m.bias)

    torch._dynamo.reset()
    got, want = torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x)
    dy = torch.randn_like(got)
    assert torch.equal(got, want) and equal(gradients(got, wanted, dy), gradients(want, wanted, dy))


# --- transforms, traces, and other tensors: plain torch operations ---


def truth(m: many.Mixed, x: Tensor, adapters=None) -> Tensor:
    """Return y in plain torch, without dropout."""
    parts = [
        (m.ids == i)[:, None] * (float(each.scale) * (x @ each.lora_a.t() @ each.lora_b.t()))
        for i, each in enumerate(adapters or m.adapters)
    ]
    return torch.nn.functional.linear(x, m.w, m.bias) + sum(parts)


def test_transforms_of_torch_func_are_served():
    m = mixed(9, 6, 4, (2, 3, 1))
    x, tangent = m.x, torch.randn_like(m.x)

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, m.rows, bias=m.bias)

    torch.testing.assert_close(torch.func.vmap(call)(x[None])[0], truth(m, x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: call(x).square().sum())(x), torch.func.grad(lambda x: truth(m, x).square().sum())(x)
    )
    got, want = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (call, lambda x: truth(m, x)))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want)

    def of_a(a):
        return lora_linear_multi(x, m.w, [m.adapters[0], m.adapters[1]._replace(lora_a=a), m.adapters[2]], m.rows)

    a = m.adapters[1].lora_a
    (da,) = torch.func.vjp(of_a, a)[1](m.dy)
    judging.check({"da": da}, many.problem_of(m, 1))
    with forward_ad.dual_level():  # the tangent of an adapter that is not the first
        assert forward_ad.unpack_dual(of_a(forward_ad.make_dual(a, torch.ones_like(a)))).tangent is not None


def test_a_transform_draws_the_mask_of_a_seed():
    m = mixed(30, 6, 16, (2, 3), p=0.5)

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, m.rows, bias=m.bias)

    torch.testing.assert_close(torch.func.vmap(call)(m.x[None])[0], call(m.x))


def test_several_gradients_at_once_are_refused_with_the_way_out():
    m = mixed(9, 6, 4, (2, 3))
    x, adapters, wanted = leaves(m)
    y = lora_linear_multi(x, m.w, adapters, m.rows)
    with pytest.raises(RuntimeError, match=r"one dy at a time.*is_grads_batched"):
        torch.autograd.grad(y, wanted, torch.randn(4, 9, 6), is_grads_batched=True)


class Layer(nn.Module):
    """A layer whose rows come as ids. torch.export takes only tensors of the module."""

    def __init__(self, m: many.Mixed) -> None:
        super().__init__()
        self.scales = [each.scale for each in m.adapters]
        self.parts = nn.ParameterList(t for each in m.adapters for t in each[:2])
        self.base = nn.ParameterList([m.w, m.bias])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        adapters = [Adapter(self.parts[2 * i], self.parts[2 * i + 1], self.scales[i]) for i in range(3)]
        w, bias = self.base
        return lora_linear_multi(x, w.detach(), adapters, Rows.by_id(ids, 3), bias=bias)


@pytest.mark.parametrize("tool", ["trace", "export"])
def test_what_is_recorded_serves_other_rows(tool):
    m = mixed(9, 6, 4, (2, 3, 1))
    layer, other = Layer(m), torch.tensor([2, 2, -1, 0, 1, -1, 0, 0, 1])
    if tool == "trace":
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            recorded = torch.jit.trace(layer, (m.x, m.ids))
        assert "lora_kernels::" not in str(recorded.inlined_graph)
    else:
        exported = torch.export.export(layer, (m.x, m.ids))
        assert not any("lora_kernels" in str(node.target) for node in exported.graph.nodes)
        recorded = exported.module()
    for ids in (m.ids, other):
        torch.testing.assert_close(recorded(m.x, ids), layer(m.x, ids))


def test_a_named_backend_is_refused_where_plain_torch_serves():
    m = mixed(9, 6, 4, (2, 3))

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, m.rows, backend="eager").sum()

    with pytest.raises(RuntimeError, match=r"backend='eager' does not go with torch\.func's transforms"):
        torch.func.grad(call)(m.x)


@pytest.mark.parametrize("kind", ["jagged", "sparse", "mkldnn"])
def test_an_x_that_is_not_dense_is_refused_with_the_way_out(kind):
    m = mixed(9, 6, 4, (2, 3))
    make = {
        "jagged": lambda x: torch.nested.nested_tensor([x[:4], x[4:]], layout=torch.jagged),
        "sparse": Tensor.to_sparse,
        "mkldnn": Tensor.to_mkldnn,
    }[kind]
    way_out = r"x\.values\(\), with Rows\.by_length" if kind == "jagged" else r"call to_dense\(\) on x"
    with pytest.raises(ValueError, match=way_out):
        lora_linear_multi(make(m.x), m.w, m.adapters, m.rows)


def test_double_backward_is_refused():
    m = mixed(9, 6, 4, (2, 3))
    x, adapters, _ = leaves(m)
    y = lora_linear_multi(x, m.w, adapters, m.rows)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_multi has no double backward"):
        dx.sum().backward()


def test_a_sparse_or_empty_dy_is_served():
    m = mixed(9, 6, 4, (2, 3))
    x, adapters, wanted = leaves(m)
    y = lora_linear_multi(x, m.w, adapters, m.rows)
    torch.sgn(y).sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in wanted)


# --- FLOPs ---


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def test_a_counter_counts_what_it_counts_for_pefts_mixed_batch():
    base = nn.Sequential(nn.Linear(8, 12, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]), "u")
    model.add_adapter("v", peft.LoraConfig(r=5, target_modules=["0"]))
    names = ["u", "__base__", "v", "v", "u", "v"]
    layer = model.base_model.model[0].eval()
    x = torch.randn(6, 7, 8)
    adapters = [
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in ("u", "v")
    ]
    for adapter in adapters:
        adapter.lora_a.requires_grad_()
        adapter.lora_b.requires_grad_()
    rows = Rows.by_sample(names, ["u", "v"])

    def ours(x):
        return lora_linear_multi(x, layer.base_layer.weight, adapters, rows)

    def pefts(x):
        return layer(x, adapter_names=names)

    layer.base_layer.weight.requires_grad_(False)
    torch.testing.assert_close(ours(x), pefts(x))
    for step in (
        lambda f: f(x),
        lambda f: torch.no_grad()(f)(x),
        lambda f: f(x).sum().backward(),
        lambda f: f(x.clone().requires_grad_()).sum().backward(),
    ):
        assert flops(lambda step=step: step(ours)) == flops(lambda step=step: step(pefts)) > 0


def test_rows_without_an_adapter_count_as_the_base():
    m = mixed(20, 12, 8, (2, 3), ids=torch.full((20,), -1))
    assert flops(lambda: lora_linear_multi(m.x, m.w, m.adapters, m.rows)) == 2 * 20 * 12 * 8


# --- inside the back-end ---


def test_a_stack_that_is_replaced_during_a_call_does_not_change_what_the_call_reads(monkeypatch):
    m = mixed(12, 12, 8, (2, 3))
    stack, inner = AdapterStack(m.adapters), eager.forward_multi
    want = many.served(m, backend="eager")

    def replaced(x, base, adapters, rows, save_h):
        adapters.native = "derived"
        assert stack.native == "derived"
        stack.replace({0: None, 1: None})
        assert adapters.native == "derived" and stack.native is None
        return inner(x, base, adapters, rows, save_h)

    monkeypatch.setattr(eager, "forward_multi", replaced)
    with torch.no_grad():
        assert torch.equal(lora_linear_multi(m.x, m.w, stack, m.rows, bias=m.bias, backend="eager"), want)
    assert stack.slots == (None, None)


def test_a_stack_gives_dx():
    m = mixed(12, 12, 8, (2, 3))
    x = m.x.clone().requires_grad_()
    lora_linear_multi(x, m.w, AdapterStack(m.adapters), m.rows).backward(m.dy)
    for i in range(2):
        judge.check({"dx": x.grad[m.of(i)]}, many.problem_of(m, i))
