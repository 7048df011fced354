"""DoRA's random calls of `benchmarks.fuzz`, and the bounds on their results and on the norm.

The norm is judged first, and the results are then judged for the norm that the call had: where W + s·B A is nearly 0,
they change with its last digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.fuzz_calls import LEAVES, Results, Watched, compare, leaves, missing, results, surroundings, twice
from benchmarks.fuzz_draw import FORMATS, Draw, problems
from lora_kernels import dora_linear
from lora_kernels.core import dropout
from lora_kernels.ops.dora_norm import weight_norm
from lora_kernels.quant.weight import QuantizedWeight
from lora_kernels.testing.judge import Problem, against_bound


def quantised(draw: Draw) -> list[str]:
    """`dora_linear` over a quantised W, whose norm is that of the dequantised W in fp32."""
    return dora(draw, draw.pick("w", FORMATS))


def dora(draw: Draw, format: str = "dense") -> list[str]:
    """`dora_linear`. The magnitude is the norm times 1 or 2 in exact mode, so that d is exact."""
    (one,) = problems(draw, 1, format, dora=True)
    q, tensors = one.q, leaves(draw, one.q)
    dtype = torch.promote_types(q.a.dtype, torch.float32) if draw.chance("wide-m", 0.5) else q.a.dtype
    norm = weight_norm(one.w, q.a, q.b, q.scale, torch.empty(0, dtype=dtype))
    factor = torch.randint(0, 2, norm.shape, generator=draw.generator).double().exp2() if draw.exact else (
        0.5 + torch.rand(norm.shape, generator=draw.generator, dtype=torch.float64)
    )  # fmt: skip
    m = (norm.double() * factor).to(dtype).requires_grad_(draw.random.random() < 0.7)
    backend = draw.pick("backend", (None, "cpu", "eager")) if q.x.dtype != torch.float64 else None
    watched = Watched(q.x, one.w, q.a, q.b, q.bias, q.dy, m)

    def call() -> Results:
        for t in (*tensors.values(), m):
            t.grad = None
        y = dora_linear(
            tensors["x"], one.w, tensors["a"], tensors["b"], m, scale=q.scale, bias=tensors.get("bias"), dropout_p=q.p,
            seed=q.seed, backend=backend,
        )  # fmt: skip
        return results(y, q.dy, tensors | {"m": m})

    with surroundings(draw):
        got, faults = twice(draw, call)
        norm = norm_within(q, m, one.codes)
    faults += missing(got["y"], got, tensors | {"m": m}) + watched.faults()
    return faults + dora_faults(draw, q, m.detach(), norm, got)


def norm_within(q: Problem, m: Tensor, codes: QuantizedWeight | None = None) -> Tensor:
    """Return the norm as a call computes it. Where W + s·B A is nearly 0, its digits depend on the number of threads
    and on deterministic algorithms, so it is computed again within the surroundings of the call."""
    return weight_norm(q.w if codes is None else codes, q.a, q.b, q.scale, m.detach())


def dora_faults(draw: Draw, q: Problem, m: Tensor, norm: Tensor, got: Results) -> list[str]:
    """Return the faults of results of DoRA, and of the norm."""
    faults = norm_faults(q, norm)
    d, wide = m.double() / norm.double(), q.to(torch.float64)
    want = scaled(wide, d, -1.0)
    magnitude = scaled(wide.absolute(), d, 1.0)
    unit = torch.finfo(torch.promote_types(q.x.dtype, torch.float32)).eps / 2
    own = torch.finfo(q.x.dtype).eps / 2
    (M, K), (N, R) = q.x.shape, q.b.shape
    terms = M + N + K + R + 16
    narrow = torch.finfo(m.dtype).eps / 2
    for name, value in got.items():
        if name == "dm":
            size = magnitude["dd"] if q.p or q.bias is None else magnitude["dd"] + within_z(wide.absolute())
            exact, size, more = want["dd"] / norm.double(), size / norm.double(), 4 * narrow
        else:
            exact, size, more = want[name], magnitude[name], 0.0
        bound = (
            (terms * unit + 8 * own + more) * size + (own + more) * exact.abs() + torch.finfo(q.x.dtype).smallest_normal
        )
        if name == "dm":
            fault = against_bound(name, value, exact, bound).fault
            faults += [fault] if fault else []
        else:
            faults += compare(draw, name, value, exact, bound)
    return faults


def within_z(q: Problem) -> Tensor:
    """Return Σₘ dy ⊙ bias [N]: without dropout z is rounded with the bias in it, as PEFT's base_result is, and the
    gradient of m takes the bias out again."""
    assert q.bias is not None
    return q.dy.sum(0) * q.bias


def norm_faults(q: Problem, norm: Tensor) -> list[str]:
    """Return the fault of the norm, if it has one. Its square is a sum whose terms may cancel."""
    w, a, b = q.w.double(), q.a.double(), q.b.double()
    exact = (w + q.scale * b @ a).square().sum(1)
    size = (w.abs() + abs(q.scale) * b.abs() @ a.abs()).square().sum(1)
    unit = torch.finfo(torch.promote_types(q.a.dtype, torch.promote_types(q.w.dtype, torch.float32))).eps
    error, bound = (norm.double().square() - exact).abs(), (w.shape[1] + 2 * a.shape[0] + 16) * unit * size
    bound += 4 * torch.finfo(norm.dtype).eps * exact + torch.finfo(norm.dtype).smallest_normal
    return [f"the norm is off by {(error - bound).max().item():.3g}"] if (error > bound).any() else []


def scaled(q: Problem, d: Tensor, sign: float) -> Results:
    """Return y and the gradients of DoRA for a given d, in fp64. With sign = 1 and absolute operands they are sums of
    magnitudes."""
    own = {name: t.detach().requires_grad_() for name in LEAVES if (t := getattr(q, name)) is not None}
    d = d.clone().requires_grad_()
    x_hat = dropout.dropout(own["x"], q.p, q.seed) if q.p and q.seed is not None else own["x"]
    u = x_hat @ q.w.mT
    y = own["x"] @ q.w.mT + (d + sign) * u + d * (q.scale * (x_hat @ own["a"].mT @ own["b"].mT))
    y = y if q.bias is None else y + own["bias"]
    torch.autograd.backward(y, q.dy)
    return {"y": y.detach(), "dd": grad_of(d)} | {f"d{name}": grad_of(t) for name, t in own.items()}


def grad_of(t: Tensor) -> Tensor:
    """Return the gradient of a leaf."""
    assert t.grad is not None
    return t.grad
