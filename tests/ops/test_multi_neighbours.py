"""What belongs to an adapter depends on its own rows alone: results, masks, and what an optimiser makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import many
from support.many import mixed, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import Adapter, Rows, lora_linear, lora_linear_multi
from lora_kernels.core import dropout


def same(got: many.Results, want: many.Results) -> bool:
    """Return whether two calls gave the same bits."""
    pairs = zip(got.tensors(), want.tensors(), strict=True)
    return all((u is None) == (v is None) and (u is None or torch.equal(u, v)) for u, v in pairs)


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
