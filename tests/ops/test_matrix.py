"""Every combination of dtypes of x, W, A/B and dY with autocast, checkpointing, torch.compile and dropout is right, or
is refused with the dtypes in the message."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from support import judging
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear
from lora_kernels.core.dropout import draw_seed

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = (F64, F32, F16, BF16)
M, N, K, R = 12, 16, 24, 4
RATES = (0.0, 0.3)


@dataclass(frozen=True)
class Case:
    x: torch.dtype
    w: torch.dtype
    a: torch.dtype
    autocast: bool = False
    """Whether the forward, but not the backward, runs under autocast to bf16."""

    def served(self) -> tuple[torch.dtype, torch.dtype] | None:
        """Return the dtype that x and W are computed in and that of A and B, or None where the call is refused."""
        x, w, a = self.x, self.w, self.a
        if self.autocast and x != F64:
            x = w = BF16
            a = BF16 if a in (F16, BF16) else a
        return (x, a) if x == w and (a == x or (a == F32 and x in (F16, BF16))) else None

    def __str__(self) -> str:
        return "-".join(str(t).removeprefix("torch.") for t in (self.x, self.w, self.a)) + "-autocast" * self.autocast


CASES = [Case(*dtypes, cast) for cast in (False, True) for dtypes in itertools.product(DTYPES, repeat=3)]
SERVED = [case for case in CASES if case.served()]
REFUSED = [case for case in CASES if not case.served()]
COMPILED = [case for case in SERVED if not case.autocast] + [
    Case(F32, F32, F32, True), Case(F32, BF16, F32, True), Case(BF16, F32, BF16, True), Case(F16, F16, F32, True),
]  # fmt: skip
"""The combinations that are compiled: all without autocast, and some with it."""


def operands(case: Case, p: float) -> judging.Problem:
    """Return operands in the case's dtypes, with the seed that a call after ``torch.manual_seed(7)`` draws."""
    # fp16, fp32 and fp64 hold the drawn numbers exactly. bf16 rounds x, W and bias; A and B are rounded to it first.
    q = judging.problem(M, N, K, R, dtype=F16, p=p)
    torch.manual_seed(7)
    seed = draw_seed(torch.device("cpu")) if p else None
    a, b = q.a.to(BF16).to(case.a), q.b.to(BF16).to(case.a)
    return replace(q, x=q.x.to(case.x), w=q.w.to(case.w), a=a, b=b, bias=q.bias.to(case.w), seed=seed)


def module_of(q: judging.Problem) -> FusedLoRALinear:
    layer = FusedLoRALinear(K, N, r=R, lora_dropout=q.p, dtype=q.w.dtype)
    layer.weight, layer.bias = nn.Parameter(q.w, requires_grad=False), nn.Parameter(q.bias, requires_grad=False)
    layer.lora_A, layer.lora_B = nn.Parameter(q.a.clone()), nn.Parameter(q.b.clone())
    layer.scaling = q.scale
    return layer


def peft_layer_of(q: judging.Problem) -> nn.Module:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=R, lora_dropout=q.p, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N, dtype=q.w.dtype)), config)
    layer = model.base_model.model[0]
    layer.base_layer.weight, layer.base_layer.bias = nn.Parameter(q.w, False), nn.Parameter(q.bias, False)
    layer.lora_A["default"].weight = nn.Parameter(q.a.clone())
    layer.lora_B["default"].weight = nn.Parameter(q.b.clone())
    layer.scaling["default"] = q.scale
    return layer


def fused_layer_of(q: judging.Problem) -> nn.Module:
    """Return the fused layer. In fp64 it names `eager`: no kernel serves fp64, and without the name dropout would be
    left to PEFT."""
    layer = peft_layer_of(q)
    from lora_kernels import fuse  # this import needs PEFT

    assert fuse(nn.Sequential(layer), strict=True, backend="eager" if q.w.dtype == F64 else None).fused
    return layer


def run(
    forward: Callable[[torch.Tensor], torch.Tensor],
    layer: nn.Module,
    case: Case,
    q: judging.Problem,
    reentrant: bool | None = None,
    dy: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Return y and every gradient. `dy` is the dtype of the incoming gradient, by default that of y."""
    layer.zero_grad(set_to_none=True)
    x = q.x.detach().requires_grad_()
    torch.manual_seed(7)
    with torch.autocast("cpu", BF16, enabled=case.autocast):
        y = forward(x) if reentrant is None else checkpoint(forward, x, use_reentrant=reentrant)
    torch.autograd.backward(y, q.dy.to(BF16).to(dy or y.dtype))
    a, b = (p.grad for p in layer.parameters() if p.requires_grad)
    return {"y": y.detach(), "dx": x.grad, "da": a, "db": b}


def judge(got: dict[str, torch.Tensor], case: Case, q: judging.Problem) -> None:
    """Judge the results in fp64. The operands are rounded to the dtypes that the call computes in."""
    x, a = case.served()
    assert [got[name].dtype for name in ("y", "dx", "da", "db")] == [x, case.x, case.a, case.a]
    base = {name: getattr(q, name).to(x) for name in ("x", "w", "bias")}
    judging.check(got, replace(q, **base, a=q.a.to(a), b=q.b.to(a), dy=q.dy.to(BF16).to(x)))


KINDS = {"module": module_of, "peft": fused_layer_of}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


@kinds
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_a_served_combination_is_right(make, case):
    for p in RATES:
        q = operands(case, p)
        layer = make(q)
        first = run(layer, layer, case, q)
        judge(first, case, q)
        for reentrant, dy in [(None, F64), *itertools.product((True, False), (F32, None))]:
            again = run(layer, layer, case, q, reentrant, dy)
            assert all(torch.equal(again[name], value) for name, value in first.items()), (p, reentrant, dy)
        if make is fused_layer_of:
            assert layer.fused_calls == 1 + 1 + 4 * 2 and not layer.passed_over


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@kinds
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_combination_is_right(make, case):
    """Compiling takes long. So only fp32 is tried with p = 0 and with reentrant checkpointing, which adds a graph
    without gradients."""
    for p in RATES if case.x == F32 else RATES[1:]:
        q = operands(case, p)
        layer = make(q)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for reentrant in (None, False, True) if case.x == F32 else (None, False):
            judge(run(compiled, layer, case, q, reentrant), case, q)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_refused_combination_is_named(case):
    for p in RATES:
        q = operands(case, p)
        layer = module_of(q)
        with pytest.raises(TypeError, match=r"x torch\.\w+, weight torch\.\w+, lora_a torch\.\w+"):
            run(layer, layer, case, q)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_refused_combination_runs_pefts_own_forward(case):
    """The results are PEFT's own numbers. Where PEFT raises an error, so does the fused layer."""
    for p in RATES:
        q = operands(case, p)
        plain, layer = peft_layer_of(q), fused_layer_of(q)
        try:
            want = run(plain, plain, case, q)
        except RuntimeError:
            with pytest.raises((RuntimeError, TypeError), match=r"dtype|torch\."):
                run(layer, layer, case, q)
            continue
        got = run(layer, layer, case, q)
        assert layer.fused_calls == 0 and sum(layer.passed_over.values()) == 1
        assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in want.items())
