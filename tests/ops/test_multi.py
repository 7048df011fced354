"""`lora_linear_multi` gives every row what its adapter gives it, and every adapter the gradients of its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import judging, many
from support.many import RANKS, mixed, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import Adapter, AdapterStack, Rows, lora_linear, lora_linear_multi, quantize_weight
from lora_kernels.backends import dispatch, eager
from lora_kernels.core import dropout
from lora_kernels.core.operands import Call
from lora_kernels.ops.multi import explain_multi


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each back-end that serves many adapters on this machine's CPU."""
    call = Call("forward_multi", torch.device("cpu"), torch.float32, torch.float32, 4, 4, 4, 1, False)
    reasons = dispatch.refusals(request.param, call)
    if reasons:
        pytest.skip(f"backend {request.param!r} does not serve many adapters: {reasons[0]}")
    return request.param


def same(got: many.Results, want: many.Results) -> bool:
    """Return whether two calls gave the same bits."""
    pairs = zip(got.tensors(), want.tensors(), strict=True)
    return all((u is None) == (v is None) and (u is None or torch.equal(u, v)) for u, v in pairs)


# --- values and gradients ---


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "ranks"),
    [(37, 40, 24, RANKS), (0, 16, 8, (2, 3)), (1, 7, 5, (4, 1)), (200, 97, 130, (8, 13)), (30, 17, 33, (3, None, 1))],
)
def test_values_and_gradients_are_those_of_each_adapter_alone(M, N, K, ranks, dtypes, p, backend):
    m = mixed(M, N, K, ranks, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    many.check(m, run(m, backend=backend))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_strided_operands_are_served(p, backend):
    m = mixed(45, 40, 24, p=p, strided=True)
    many.check(m, run(m, backend=backend))


def test_fp64_is_served():
    m = mixed(45, 40, 24, dtype=torch.float64, p=0.3)
    many.check(m, run(m))


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_bases_are_served(format, dtype, backend):
    m = mixed(45, 40, 64, (1, 8, 13), dtype=dtype, adapter_dtype=torch.float32, p=0.2)
    m = replace(m, w=quantize_weight(m.w, format))
    many.check(m, run(m, backend=backend))
    without = replace(m, ids=torch.full((45,), -1))
    got = run(without, backend=backend)
    plain = F.linear(m.x, m.w.dequantize(dtype), m.bias)
    torch.testing.assert_close(got.y, plain)
    assert got.da == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_stack_serves_what_a_list_serves(dtype, backend):
    m = mixed(37, 40, 24, (*RANKS, None), dtype=dtype)
    many.check(m, many.Results(many.served(m, backend=backend)))


def test_a_call_without_gradients_gives_the_bits_of_one_with_gradients(backend):
    m = mixed(37, 40, 24, p=0.2)
    with torch.no_grad():
        y = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias, backend=backend)
    with torch.inference_mode():
        again = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias, backend=backend)
    assert not y.requires_grad and torch.equal(y, run(m, backend=backend).y) and torch.equal(y, again)


def test_one_adapter_with_every_row_is_lora_linear():
    q = judging.problem(33, 40, 24, 8, p=0.2)
    want = judging.evaluate(q, lora_linear, backend="eager")
    m = many.Mixed(q.x, q.w, q.bias, q.dy, [Adapter(q.a, q.b, q.scale, q.p, q.seed)], torch.zeros(33, dtype=torch.long))
    got = run(m, backend="eager")
    for name, value in (("y", got.y), ("dx", got.dx), ("da", got.da[0]), ("db", got.db[0]), ("dbias", got.dbias)):
        assert torch.equal(value, want[name]), name


def test_gradients_pass_gradcheck():
    m = mixed(9, 5, 4, (1, 3, 2), dtype=torch.float64, p=0.4)
    biases = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in m.adapters]
    scales = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in m.adapters]
    leaves = [t.detach().requires_grad_() for each in m.adapters for t in each[:2]]

    def call(x, bias, *rest):
        adapters = [
            each._replace(lora_a=rest[2 * i], lora_b=rest[2 * i + 1], scale=rest[6 + i], bias=rest[9 + i])
            for i, each in enumerate(m.adapters)
        ]
        return lora_linear_multi(x, m.w, adapters, m.rows, bias=bias)

    torch.autograd.gradcheck(
        call, (m.x.requires_grad_(), m.bias.requires_grad_(), *leaves, *scales, *biases), fast_mode=True
    )


def test_only_the_gradients_that_are_asked_are_computed(monkeypatch):
    m = mixed(20, 12, 8, (2, 3, 4), ids=torch.arange(20) % 4 - 1)
    asked = []
    inner = eager.backward_multi
    monkeypatch.setattr(eager, "backward_multi", lambda *args: asked.append(args) or inner(*args))
    (a0, b0), (_, b2) = (each[:2] for each in (m.adapters[0], m.adapters[2]))
    adapters = [
        m.adapters[0]._replace(lora_a=a0.requires_grad_()),
        m.adapters[1],
        m.adapters[2]._replace(lora_b=b2.requires_grad_()),
    ]
    lora_linear_multi(m.x, m.w, adapters, m.rows, backend="eager").backward(m.dy)
    (_, saved_x, _, _, _, h, needs), *_ = asked
    assert needs.dx is False and list(needs.da) == [True, False, False] and list(needs.db) == [False, False, True]
    assert saved_x is not None and h is not None and b0.grad is None
    q0, q2 = many.problem_of(m, 0), many.problem_of(m, 2)
    judging.check({"da": a0.grad}, q0)
    judging.check({"db": b2.grad}, q2)
    x = m.x.clone().requires_grad_()
    frozen = [each._replace(lora_a=each.lora_a.detach(), lora_b=each.lora_b.detach()) for each in adapters]
    lora_linear_multi(x, m.w, frozen, m.rows, backend="eager").backward(m.dy)
    assert asked[1][1] is None and asked[1][5] is None and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_of_adapters_are_added_to_their_rows(dtype):
    m = mixed(3000, 12, 8, (2, None, 4, 1), dtype=dtype, ids=torch.arange(3000) % 4 - 1)
    own = [torch.randn(12).to(dtype).requires_grad_() for _ in m.adapters]
    adapters = [each and each._replace(bias=bias) for each, bias in zip(m.adapters, own, strict=True)]
    y = lora_linear_multi(m.x, m.w, adapters, m.rows, bias=m.bias)
    without = lora_linear_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias)
    y.backward(m.dy)
    for i in range(4):
        rows = m.of(i)
        if m.adapters[i] is None or not len(rows):
            assert own[i].grad is None
            torch.testing.assert_close(y[rows], without[rows])
            continue
        scale = m.adapters[i].scale
        torch.testing.assert_close(y[rows], without[rows] + scale * own[i])
        torch.testing.assert_close(own[i].grad, (scale * m.dy[rows].double().sum(0)).to(dtype))
    assert torch.equal(y[m.of(-1)], without[m.of(-1)])


def test_tensor_scales_get_their_gradients():
    m = mixed(30, 12, 8, (2, 4))
    scales = [torch.tensor(0.5, requires_grad=True), torch.tensor([-1.5])]
    adapters = [each._replace(scale=scale) for each, scale in zip(m.adapters, scales, strict=True)]
    y = lora_linear_multi(m.x, m.w, adapters, m.rows)
    y.backward(m.dy)
    a, b = m.adapters[0][:2]
    low = m.x[m.of(0)] @ a.t() @ b.t()
    torch.testing.assert_close(scales[0].grad, (low * m.dy[m.of(0)]).sum())
    fixed = [each._replace(scale=float(scale.detach())) for each, scale in zip(m.adapters, scales, strict=True)]
    torch.testing.assert_close(y, lora_linear_multi(m.x, m.w, fixed, m.rows))


def test_rows_of_samples_and_leading_dimensions_are_served():
    m = mixed(4 * 6, 12, 8, (2, 4), ids=torch.tensor([1, -1, 0, 1]).repeat_interleave(6))
    rows = Rows.by_sample(["v", None, "u", "v"], ["u", "v"])
    want = run(m)
    for shape in ((4, 6, 8), (4, 2, 3, 8)):
        x = m.x.view(shape).clone().requires_grad_()
        y = lora_linear_multi(x, m.w, m.adapters, rows, bias=m.bias)
        y.backward(m.dy.view(y.shape))
        assert y.is_contiguous() and torch.equal(y.view(24, 12), want.y)
        torch.testing.assert_close(x.grad.view(24, 8), want.dx)
    flat = lora_linear_multi(m.x.view(4, 6, 8), m.w, m.adapters, m.rows, bias=m.bias)
    assert flat.shape == (4, 6, 12)
    one = lora_linear_multi(m.x[0], m.w, m.adapters, Rows.by_id([1], 2), bias=m.bias)
    torch.testing.assert_close(one, want.y[0])
    none = lora_linear_multi(m.x[:0].view(0, 6, 8), m.w, m.adapters, Rows.by_sample([], ["u", "v"]), bias=m.bias)
    assert none.shape == (0, 6, 12)


@pytest.mark.parametrize("adapters", [[], [None, None], AdapterStack([]), AdapterStack([None] * 3)], ids=repr)
def test_a_layer_without_adapters_is_the_frozen_layer(adapters):
    m = mixed(20, 12, 8, ())
    x, bias = m.x.requires_grad_(), m.bias.requires_grad_()
    rows = Rows.by_id(torch.arange(20) % (len(adapters) + 1) - 1, len(adapters))
    y = lora_linear_multi(x, m.w, adapters, rows, bias=bias)
    y.backward(m.dy)
    assert torch.equal(y, F.linear(x, m.w, bias))
    assert torch.equal(x.grad, m.dy @ m.w)
    torch.testing.assert_close(bias.grad, m.dy.sum(0))
    w = quantize_weight(m.w, "int8")
    torch.testing.assert_close(
        lora_linear_multi(x, w, adapters, rows, bias=bias), F.linear(x, w.dequantize(torch.float32), bias)
    )


# --- independence of the neighbours ---


def alone(m: many.Mixed, i: int, **kwargs) -> many.Results:
    return run(m.only(m.of(i)), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapters_half_does_not_depend_on_its_neighbours(dtype, backend):
    """W is zero, so that y and dx are the low-rank half alone: with 31 neighbours, permuted, and by itself."""
    m = mixed(160, 40, 24, [(8, 16, 3, 64)[i % 4] for i in range(32)], dtype=dtype, p=0.2, bias=False)
    m = replace(m, w=torch.zeros_like(m.w))
    whole = run(m, backend=backend)
    # Another order of the batch that keeps the order of each adapter's rows.
    order = torch.argsort((m.ids * 7919 + 13) % 32, stable=True)
    permuted = run(m.only(order), backend=backend)
    for i in (0, 1, 2, 3, 31):
        rows = m.of(i)
        own = alone(m, i, backend=backend)
        places = (m.ids[order] == i).nonzero()[:, 0]
        for other, at in ((own, slice(None)), (permuted, places)):
            assert torch.equal(other.y[at], whole.y[rows])
            assert torch.equal(other.dx[at], whole.dx[rows])
            assert torch.equal(other.da[i], whole.da[i]) and torch.equal(other.db[i], whole.db[i])


def test_results_repeat_from_run_to_run(backend):
    m = mixed(100, 40, 24, p=0.2)
    want = run(m, backend=backend)
    assert all(same(run(m, backend=backend), want) for _ in range(20))


def test_gradients_do_not_depend_on_the_number_of_threads(backend):
    if backend == "eager":
        pytest.skip("torch's own GEMM does not promise it")
    m = mixed(100, 40, 24, p=0.2)
    m = replace(m, w=torch.zeros_like(m.w), bias=None)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(m, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert same(*results)


@pytest.mark.usefixtures("poison")
def test_nothing_stale_is_read_when_the_number_of_segments_changes(backend):
    """The same `Rows` kinds in turn, into memory that holds NaN: 1, 8 and 2 segments."""
    m = mixed(48, 40, 24, (8,) * 8, p=0.2)
    for segments in (1, 8, 2, 8, 1):
        ids = (torch.arange(48) * segments // 48) if segments > 1 else torch.full((48,), 5)
        each = replace(m, ids=ids)
        many.check(each, run(each, backend=backend))


def test_a_nan_in_the_rows_of_one_adapter_reaches_no_other(backend):
    m = mixed(60, 40, 24, (8, 3, 13), p=0.2, bias=False)
    want = run(m, backend=backend)
    bad = m.of(1)
    x, dy = m.x.clone(), m.dy.clone()
    x[bad], dy[bad] = float("nan"), float("inf")
    got = run(replace(m, x=x, dy=dy), backend=backend)
    fine = torch.cat([m.of(i) for i in (-1, 0, 2)])
    assert torch.equal(got.y[fine], want.y[fine]) and torch.equal(got.dx[fine], want.dx[fine])
    for i in (0, 2):
        assert torch.equal(got.da[i], want.da[i]) and torch.equal(got.db[i], want.db[i])


def test_jobs_that_train_together_learn_what_they_learn_alone():
    """The third job has no rows in some steps: then its AdamW state and weights do not move."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    data = [[torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(6)] for _ in range(3)]

    def adapters():
        made = torch.Generator().manual_seed(2)
        return [
            [torch.randn(r, 5, generator=made, dtype=torch.float64).requires_grad_(),
             torch.randn(6, r, generator=made, dtype=torch.float64).requires_grad_()]
            for r in (1, 3, 2)
        ]  # fmt: skip

    def due(step: int) -> list[int]:
        return [0, 1] if step % 2 else [0, 1, 2]

    def train(jobs: list[int]) -> list[list[Tensor]]:
        own = adapters()
        optimisers = [torch.optim.AdamW(each, lr=0.1, weight_decay=0.5) for each in own]
        for step in range(6):
            active = [i for i in due(step) if i in jobs]
            if not active:
                continue
            x = torch.cat([data[i][step] for i in active])
            rows = Rows.by_length([4] * len(active), active, 3)
            given = [Adapter(a, b, 1.5, 0.2, torch.tensor(1000 * i + step)) for i, (a, b) in enumerate(own)]
            y = lora_linear_multi(x, w, given, rows, backend="eager")
            sum(part.square().mean() for part in y.split(4)).backward()
            for i, optimiser in enumerate(optimisers):
                before = [t.detach().clone() for t in own[i]]
                state = [{k: v.clone() for k, v in optimiser.state[t].items()} for t in own[i]]
                if i not in active:
                    assert own[i][0].grad is None and own[i][1].grad is None
                optimiser.step()
                optimiser.zero_grad()
                if i not in active:
                    assert all(torch.equal(t, old) for t, old in zip(own[i], before, strict=True))
                    for t, old in zip(own[i], state, strict=True):
                        assert all(torch.equal(optimiser.state[t][k], v) for k, v in old.items())
        return own

    together = train([0, 1, 2])
    for i in range(3):
        for got, want in zip(together[i], train([i])[i], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# --- rows without an adapter ---


def test_a_batch_without_adapters_is_one_linear_operation():
    """No low-rank launch, and no allocation beside y."""
    m = mixed(20, 12, 8, (2, 3), ids=torch.full((20,), -1))
    rows = m.rows

    class Ops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    def call():
        return lora_linear_multi(m.x, m.w, m.adapters, rows, bias=m.bias)

    want = F.linear(m.x, m.w, m.bias)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            call()
            with Ops() as ours:
                y = call()
            with Ops() as torchs:
                F.linear(m.x, m.w, m.bias)
        assert torch.equal(y, want) and ours.names == torchs.names


def test_a_named_backend_that_cannot_serve_is_refused_even_without_rows():
    m = mixed(4, 12, 8, (2,), ids=torch.full((4,), -1))
    with pytest.raises(ValueError, match="unknown backend 'none'"):
        lora_linear_multi(m.x, m.w, m.adapters, m.rows, backend="none")


# --- dropout ---


def test_the_mask_of_a_row_is_drawn_at_its_place_among_its_adapters_rows():
    """With W = 0, A = I and B = I, y is s · x̂, so that its zeros are the mask."""
    K, p = 16, (0.5, 0.25)
    x, eye, seeds = torch.ones(40, K), torch.eye(K), (torch.tensor(7), torch.tensor(11))
    ids = torch.randint(-1, 2, (40,))
    adapters = [Adapter(eye, eye, 1.0, p[i], seeds[i]) for i in range(2)]
    y = lora_linear_multi(x, torch.zeros(K, K), adapters, Rows.by_id(ids, 2), backend="eager")
    for i in range(2):
        own = (ids == i).nonzero()[:, 0]
        keep = dropout.keep_mask(seeds[i], len(own), K, p[i])
        torch.testing.assert_close(y[own], keep * dropout.rescale(p[i]))
    places = Rows.by_id(ids, 2).places()
    assert all(torch.equal(places[ids == i], torch.arange(int((ids == i).sum()))) for i in (-1, 0, 1))


def test_drawn_seeds_follow_torchs_generator_and_differ_between_adapters():
    x, eye = torch.ones(32, 16), torch.eye(16)
    adapters = [Adapter(eye, eye, 1.0, 0.5) for _ in range(2)]
    rows = Rows.by_id([0] * 16 + [1] * 16, 2)

    def call():
        return lora_linear_multi(x, torch.zeros(16, 16), adapters, rows)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and torch.equal(call(), second)
    assert not torch.equal(first, second) and not torch.equal(first[:16], first[16:])
    torch.manual_seed(3)
    alone = lora_linear(x[:16], torch.zeros(16, 16), eye, eye, scale=1.0, dropout_p=0.5)
    assert torch.equal(alone, first[:16])


def test_seeds_may_be_ints_or_tensors():
    m = mixed(20, 12, 8, (2, 3), p=0.5)
    ints = [each._replace(seed=int(each.seed)) for each in m.adapters]
    rows = m.rows
    assert torch.equal(lora_linear_multi(m.x, m.w, ints, rows), lora_linear_multi(m.x, m.w, m.adapters, rows))


# --- explain ---


def test_explain_tells_ranks_rows_and_the_backends_of_both_passes():
    m = mixed(12, 12, 8, (2, None, 5), ids=torch.tensor([0, 0, 2, -1] * 3))
    told = explain_multi(m.x, m.w, m.adapters, m.rows, bias=m.bias, backend="eager")
    assert told.forward == told.backward == "eager" and told.call.op == "forward_multi" and told.call.R == 5
    text = str(told)
    assert (
        "2 adapters of ranks 2, 5" in text and "rows of each: 6, 0, 3" in text and "3 rows without an adapter" in text
    )
    assert "forward" in text and "backward" in text
    none = explain_multi(m.x, m.w, [], Rows.by_id([-1] * 12, 0))
    assert "12 rows without an adapter" in str(none)
