"""Layers, DoRA, groups and PEFT models over the back-end `composite`, and the check that switches it on: in the
interpreter, on CPU tensors, with the tiles of a GPU."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import dora_problems, judging
from support.fake_gpu import fake_gpu

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.interp import interpret

import lora_kernels
from lora_kernels import (
    Adapter,
    AdapterStack,
    FusedLoRALinear,
    Rows,
    explain,
    lora_linear,
    lora_linear_group,
    lora_linear_multi,
)
from lora_kernels.backends import composite, dispatch, first_use_problems
from lora_kernels.backends.triton import device
from lora_kernels.core import operands
from lora_kernels.core.operands import Base, Layer
from lora_kernels.plans.tiles import Gpu

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """`composite` serves CPU tensors, in the interpreter."""
    target = device.Target(Gpu("sm_90", 4), contextlib.nullcontext, lambda: 0, lambda: False)
    monkeypatch.setitem(device.TARGETS, CPU, target)
    dispatch.cache_clear()
    with interpret():
        yield
    dispatch.cache_clear()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_a_layer_is_right(dtypes, p) -> None:
    q = judging.problem(70, 40, 72, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    judging.check(judging.evaluate(q, lora_linear, backend="composite"), q)


@pytest.mark.parametrize(("p", "quant", "adapters"), [
    (0.0, None, torch.bfloat16), (0.3, None, torch.bfloat16), (0.0, "nf4", torch.float32), (0.3, "nf4", torch.bfloat16),
])  # fmt: skip
def test_dora_is_right(p, quant, adapters) -> None:
    q = judging.problem(90, 40, 72, 16, dtype=torch.bfloat16, adapter_dtype=adapters, p=p)
    w = lora_kernels.quantize_weight(q.w, quant) if quant else None
    stored = q if w is None else replace(q, w=w.dequantize(torch.float32))
    m = dora_problems.magnitude(stored)
    got = dora_problems.run(q if w is None else replace(q, w=w), m, backend="composite")
    want, plain = (
        dora_problems.truth(stored, m),
        dora_problems.plain_torch(replace(stored, w=stored.w.to(q.x.dtype)), m),
    )
    for name in dora_problems.NAMES:
        from lora_kernels.testing import judge

        assert judge.against_plain(name, got[name], want[name], plain[name]).fault is None


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_group_has_the_bits_of_its_layers(quant) -> None:
    qs = [judging.problem(70, N, 72, R, dtype=torch.bfloat16, p=p, seed=N) for N, R, p in ((40, 16, 0.3), (24, 8, 0.0))]
    x = qs[0].x
    if quant:
        qs = [replace(q, w=lora_kernels.quantize_weight(q.w, quant)) for q in qs]
    layers = [Layer(q.w, q.a, q.b, q.scale, q.bias, q.p, q.seed) for q in qs]
    got = lora_linear_group(x, layers, backend="composite")
    for y, q in zip(got, qs, strict=True):
        alone = lora_linear(
            x, q.w, q.a, q.b, scale=q.scale, bias=q.bias, dropout_p=q.p, seed=q.seed, backend="composite"
        )
        stored = q.w if quant is None else q.w.dequantize(torch.bfloat16)
        judging.check({"y": y}, judging.Problem(x, stored, q.a, q.b, q.bias, q.dy, q.scale, q.p, q.seed))
        assert torch.equal(y, alone)


def test_several_adapters_over_one_base_are_a_list_like_any_other() -> None:
    q, other = (judging.problem(70, 40, 72, 16, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    layers = [Layer(q.w, each.a, each.b, each.scale) for each in (q, other)]
    for y, each in zip(lora_linear_group(q.x, layers, backend="composite"), (q, other), strict=True):
        judging.check({"y": y}, judging.Problem(q.x, q.w, each.a, each.b, None, q.dy, each.scale, 0.0, None))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_module_trains_as_with_eager(adapter_dtype) -> None:
    losses = []
    for backend in ("composite", "eager"):
        torch.manual_seed(1)
        layer = FusedLoRALinear(
            64, 48, r=8, lora_dropout=0.1, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, backend=backend
        )
        torch.nn.init.normal_(layer.lora_B)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-3)
        x, target = (torch.randn(2, 40, n, dtype=torch.bfloat16) for n in (64, 48))
        losses.append([])
        for _ in range(3):
            loss = (layer(x) - target).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize(("p", "quant"), [(0.0, None), (0.3, None), (0.3, "nf4")])
def test_its_own_check_switches_it_on(tmp_path: Path, dtypes, p, quant) -> None:
    q = judging.problem(70, 40, 72, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    w = lora_kernels.quantize_weight(q.w, quant) if quant else q.w
    with fake_gpu(tmp_path, composite), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = explain(q.x, w, q.a, q.b, bias=q.bias, dropout_p=q.p)
        assert (answer.forward, answer.backward) == ("composite", "composite"), str(answer)


@pytest.mark.parametrize("M", [1, 16, 300])
@pytest.mark.parametrize("R", [1, 17, 64, 200])
def test_the_check_passes_for_every_class(tmp_path: Path, M, R) -> None:
    q = judging.problem(M, 40, 72, R, dtype=torch.bfloat16, p=0.1)
    with fake_gpu(tmp_path, composite), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = explain(q.x, q.w, q.a, q.b, bias=q.bias, dropout_p=q.p)
        assert (answer.forward, answer.backward) == ("composite", "composite"), str(answer)


@pytest.mark.parametrize(
    ("dtypes", "p", "quant"),
    [
        *((dtypes, 0.3, None) for dtypes in judging.DTYPES),
        (judging.DTYPES[4], 0.0, None),
        (judging.DTYPES[3], 0.0, "nf4"),
    ],
)
def test_its_own_check_switches_many_adapters_on(tmp_path: Path, monkeypatch, dtypes, p, quant) -> None:
    monkeypatch.setattr(first_use_problems, "_ROWS_OF_MANY", (130, 30, 0, 45))  # as many as the interpreter can afford
    q = judging.problem(20, 40, 72, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    w = lora_kernels.quantize_weight(q.w, quant) if quant else q.w
    rows, adapters = Rows.by_length([8, 3, 9], [1, -1, 0]), [Adapter(q.a, q.b, q.scale, q.p)] * 2
    with fake_gpu(tmp_path, composite), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in ("forward_multi", "backward_multi"):
            call = operands.call_of_multi(op, q.x, Base(w, q.bias), [q.adapter])
            assert dispatch.automatic(call) == "composite", str(dispatch._known(call))
        y = lora_linear_multi(q.x, w, adapters, rows, bias=q.bias)
    assert y.isfinite().all()


def test_a_call_of_many_adapters_has_the_gradients_of_each_alone() -> None:
    """Through the public function, with autograd, in lists and in a stack."""
    qs = [judging.problem(0, 40, 72, R, dtype=torch.bfloat16, p=p, seed=R) for R, p in ((16, 0.3), (5, 0.0), (8, 0.1))]
    q, ids = judging.problem(60, 40, 72, 1, dtype=torch.bfloat16), torch.arange(60) * 7 % 3 - 1  # the last has no rows
    leaves = [t.detach().requires_grad_() for t in (q.x, *(t for each in qs for t in (each.a, each.b)))]
    adapters = [
        Adapter(leaves[1 + 2 * i], leaves[2 + 2 * i], each.scale, each.p, each.seed) for i, each in enumerate(qs)
    ]
    rows = Rows.by_id(ids, 3)
    y = lora_linear_multi(leaves[0], q.w, adapters, rows, bias=q.bias, backend="composite")
    y.backward(q.dy)
    for i, each in enumerate(qs[:2]):
        own = ids == i
        alone = judging.Problem(q.x[own], q.w, each.a, each.b, q.bias, q.dy[own], each.scale, each.p, each.seed)
        got = {
            "y": y[own].detach(),
            "dx": leaves[0].grad[own],
            "da": leaves[1 + 2 * i].grad,
            "db": leaves[2 + 2 * i].grad,
        }
        judging.check(got, alone)
    assert leaves[5].grad is None and leaves[6].grad is None
    assert torch.equal(y[ids == -1], torch.nn.functional.linear(q.x, q.w, q.bias)[ids == -1])
    stack = AdapterStack([each._replace(dropout_p=0.0) for each in adapters])
    with torch.no_grad():
        served = lora_linear_multi(q.x, q.w, stack, rows, bias=q.bias, backend="composite")
    alone = judging.Problem(q.x[ids == 1], q.w, qs[1].a, qs[1].b, q.bias, q.dy[ids == 1], qs[1].scale, 0.0, None)
    judging.check({"y": served[ids == 1]}, alone)


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_many_adapters_go_to_eager_where_the_check_fails(tmp_path: Path, monkeypatch, fault: str) -> None:
    run = composite.forward_multi

    def forward_multi(x, base, adapters, rows, save_h):
        if fault == "broken":
            raise RuntimeError("no kernel")
        y, h = run(x, base, adapters, rows, save_h)
        y[3, 5:9] += 8
        return y, h

    monkeypatch.setattr(first_use_problems, "_ROWS_OF_MANY", (130, 30, 0, 45))
    monkeypatch.setattr(composite, "forward_multi", forward_multi)
    q = judging.problem(20, 40, 72, 16, dtype=torch.bfloat16)
    call = operands.call_of_multi("forward_multi", q.x, q.base, [q.adapter])
    with fake_gpu(tmp_path, composite), pytest.warns(RuntimeWarning, match=f"its first use was {fault}"):
        assert dispatch.automatic(call) == "eager"


def test_a_fused_peft_model_trains_with_it() -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    from support.peft_models import fused_layers, make, run, same

    model, x = make(torch.bfloat16, lora_dropout=0.0).train(), torch.randn(7, 24, dtype=torch.bfloat16)
    want = run(model, x)
    lora_kernels.fuse(model, strict=True, backend="composite")
    same(run(model, x), want, rtol=0.05)
    assert [layer.fused_calls for layer in fused_layers(model)] == [1, 1]
