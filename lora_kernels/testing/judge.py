"""The judge decides whether the numbers of a back-end are right.

The truth is the equation in fp64. The tolerance comes from plain torch in the same dtypes: a result may be about as far
from the truth as plain torch is. Where the adapters are fp32 beside an x in 16 bits, plain torch computes the low-rank
half in fp32, as PEFT does, so that their gradients are held against errors of fp32.

The errors of plain torch on a few elements say little (on 9×8 elements those of MKL differ by a factor of 1.9 with the
way the sum is written), so each element of a small result is held against the bound that follows from the number of
roundings. A large result that repeats a few numbers, as dx does if all rows of dy are alike, says as little: equal
numbers are rounded alike, and count once.

The bench prints no number of a back-end whose results have not been judged right in the same run. The tests use the
same judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import reference
from lora_kernels.core import accuracy, dropout
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.ops.linear import lora_linear
from lora_kernels.quant.weight import QuantizedWeight
from lora_kernels.testing.watch import first_line

NAMES = ("y", "dx", "da", "db", "dbias")

_ENOUGH = 1024
"""With this many independent roundings the RMS error of plain torch is known to a few per cent."""


@dataclass(frozen=True)
class Problem:
    """The operands of one call: x [M,K], w [N,K], a [R,K], b [N,R], bias [N] or None, dy [M,N]."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float
    p: float
    seed: Tensor | None

    @property
    def base(self) -> Base:
        """The frozen half of the layer, as back-ends take it."""
        return Base(self.w, self.bias)

    @property
    def adapter(self) -> Adapter:
        """The trained half of the layer, as back-ends take it."""
        return Adapter(self.a, self.b, self.scale, self.p, self.seed)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype."""
        x, w, a, b, dy = (t.detach().to(dtype) for t in (self.x, self.w, self.a, self.b, self.dy))
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, x=x, w=w, a=a, b=b, bias=bias, dy=dy)

    def absolute(self) -> Problem:
        """Return the problem with the absolute value of every number. Its results are the sums of the terms'
        magnitudes."""
        x, w, a, b, dy = (t.detach().abs() for t in (self.x, self.w, self.a, self.b, self.dy))
        bias = None if self.bias is None else self.bias.detach().abs()
        return replace(self, x=x, w=w, a=a, b=b, bias=bias, dy=dy, scale=abs(self.scale))


def problem(
    M: int,
    N: int,
    K: int,
    R: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    p: float = 0.0,
    bias: bool = True,
    strided: bool = False,
    scale: float = 0.75,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Problem:
    """Return random operands, scaled such that every term of y has about the same size. The adapters have x's dtype
    where `adapter_dtype` is None. With `strided` every matrix is a transposed view with gaps between rows and
    columns."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, cols: int, std: float, dtype: torch.dtype) -> Tensor:
        if not strided:
            return (torch.randn(rows, cols, generator=generator, device=device) * std).to(dtype)
        base = (torch.randn(cols + 3, 2 * rows, generator=generator, device=device) * std).to(dtype)
        return base.t()[::2, 1 : cols + 1]

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=draw(M, K, 1.0, dtype),
        w=draw(N, K, K**-0.5, dtype),
        a=draw(R, K, K**-0.5, adapter_dtype),
        b=draw(N, R, R**-0.5, adapter_dtype),
        bias=draw(1, N, 1.0, dtype)[0] if bias else None,
        dy=draw(M, N, 1.0, dtype),
        scale=scale,
        p=p,
        seed=torch.tensor(12345 + seed * 7919 + (seed << 40), dtype=torch.int64, device=device) if p else None,
    )


def evaluate(q: Problem, function: Callable[..., Tensor] = reference.lora_linear, **kwargs: Any) -> dict[str, Tensor]:
    """Return y and every gradient by name (see `NAMES`), from `function` and autograd. `kwargs` are passed to
    `function`."""
    leaves = {
        name: t.detach().requires_grad_() for name in ("x", "a", "b", "bias") if (t := getattr(q, name)) is not None
    }
    bias = leaves.get("bias")
    y = function(
        leaves["x"], q.w, leaves["a"], leaves["b"], scale=q.scale, bias=bias, dropout_p=q.p, seed=q.seed, **kwargs
    )
    torch.autograd.backward(y, q.dy)
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in leaves.items()}


def truth(q: Problem) -> dict[str, Tensor]:
    """Return y and every gradient of the equation in fp64, from the operands as they are stored."""
    return evaluate(q.to(torch.float64))


def over_codes(q: Problem, w: QuantizedWeight) -> tuple[Problem, dict[str, Tensor]]:
    """Return `q` and `plain` for `judge`, to judge results over a quantised w.

    The truth dequantises w without rounding to x's dtype. Plain torch has w dequantised in x's dtype.
    """
    stored = replace(q, w=w.dequantize(torch.float32))
    return stored, evaluate(replace(q, w=w.dequantize(q.x.dtype)))


@dataclass(frozen=True)
class Verdict:
    """The errors of one result, what is allowed, and what is wrong."""

    name: str
    rms: float
    rms_allowed: float
    worst: float
    worst_allowed: float
    fault: str | None
    """A sentence that says what is wrong, or None."""


def judge(
    got: dict[str, Tensor], q: Problem, want: dict[str, Tensor] | None = None, plain: dict[str, Tensor] | None = None
) -> list[Verdict]:
    """Return a verdict on every result in `got`; results that are None are left out.

    A result must be as good as that of plain torch in the same dtypes: its RMS error at most 1.25 × plain torch's, its
    largest error at most 2 × plain torch's largest + eps × the largest value. A result of fewer than `_ENOUGH`
    independent roundings (h and g have M·R elements, and dropout leaves a fraction 1 - p of x) is judged element by
    element: each must be within what rounding can do to it (Higham, Accuracy and Stability of Numerical Algorithms,
    2002, section 3.1). So is every result in fp64, where plain torch is the truth itself. A result that is large, but
    has few distinct roundings, is judged in both ways: see `against_both`.

    A caller that knows ``truth(q)`` and ``evaluate(q)`` passes them as `want` and `plain`.
    """
    want = truth(q) if want is None else want
    results = {name: value for name, value in got.items() if value is not None}
    most = 0 if q.x.dtype == torch.float64 else (1 - q.p) * q.x.shape[0] * q.a.shape[0]
    large = [name for name in results if min((1 - q.p) * want[name].numel(), most) >= _ENOUGH]
    counts = roundings(q, {name: want[name] for name in large})
    if plain is None:
        plain = evaluate(q) if large else {}
    magnitude = {} if all(counts.get(name, 0) >= _ENOUGH for name in results) else truth(q.absolute())
    verdicts = []
    for name, value in results.items():
        exact = want[name]
        if fault := _unfit(value, exact):
            verdicts.append(Verdict(name, 0.0, 0.0, 0.0, 0.0, f"{name}: {fault}"))
        elif counts.get(name, 0) >= _ENOUGH:
            verdicts.append(against_plain(name, value, exact, plain[name]))
        else:
            bound = rounding_bound(name, q, exact, magnitude[name])
            if name in large:
                verdicts.append(against_both(name, value, exact, plain[name], bound, counts[name]))
            else:
                verdicts.append(against_bound(name, value, exact, bound))
    return verdicts


def roundings(q: Problem, want: dict[str, Tensor]) -> dict[str, float]:
    """Return how many independent roundings each result in `want` has, at most `_ENOUGH`, from ``truth(q)``.

    They are the distinct numbers of the result, or of the h or g that it is made from if those are fewer. Dropout
    leaves a fraction 1 - p of them. What repeats is rounded alike: if dy was made by `expand`, all rows of g and of dx
    are copies of one.
    """
    counts = {name: _distinct(exact, q.p) for name, exact in want.items()}
    if "y" in want or "db" in want:
        x = q.x if q.seed is None else dropout.dropout(q.x, q.p, q.seed)
        of_h = _distinct(x.detach().double() @ q.a.detach().double().mT, q.p)
        counts |= {name: min(counts[name], of_h) for name in ("y", "db") if name in want}
    if "dx" in want or "da" in want:
        of_g = _distinct(q.dy.detach().double() @ q.b.detach().double(), q.p)
        counts |= {name: min(counts[name], of_g) for name in ("dx", "da") if name in want}
    return counts


def _distinct(t: Tensor, p: float) -> float:
    """Return (1 - p) × the number of distinct elements, at most `_ENOUGH`. They are compared in fp32, because products
    in fp64 may differ in the last bits from row to row."""
    seen = t.new_empty(0, dtype=torch.float32)
    for part in t.flatten().split(1 << 16):
        seen = torch.cat([seen, part.float()]).unique()
        if (1 - p) * seen.numel() >= _ENOUGH:
            return _ENOUGH
    return (1 - p) * seen.numel()


def _unfit(value: Tensor, exact: Tensor) -> str | None:
    if value.shape != exact.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    return None if torch.isfinite(value).all() else "not finite"


def against_plain(name: str, value: Tensor, exact: Tensor, plain: Tensor) -> Verdict:
    """Return the verdict on a result with enough elements for statistics: its errors beside those of `plain`."""
    errors = accuracy.errors_beside(value, exact, plain)
    return Verdict(name, *errors, None if errors.fault is None else f"{name}: {errors.fault}")


def against_both(name: str, value: Tensor, exact: Tensor, plain: Tensor, bound: Tensor, count: float) -> Verdict:
    """Return the verdict on a large result of `count` independent roundings, fewer than `_ENOUGH`: no error may exceed
    `bound`, and the RMS error may be at most RATIO ** √(_ENOUGH / count) times that of plain torch.

    The logarithm of the ratio of two RMS errors, each of n independent roundings, has a deviation in proportion to
    1 / √n. So this ratio lies as many deviations above 1 as `RATIO` does for `_ENOUGH` roundings.
    """
    verdict = against_bound(name, value, exact, bound)
    ratio = accuracy.RATIO ** (_ENOUGH / max(count, 1.0)) ** 0.5
    allowed = ratio * accuracy.rms(plain.double() - exact)
    fault = f"{name}: RMS error {verdict.rms:.3g}, allowed {allowed:.3g}" if not verdict.rms <= allowed else None
    return replace(verdict, rms_allowed=allowed, fault=verdict.fault or fault)


def rounding_bound(name: str, q: Problem, exact: Tensor, magnitude: Tensor) -> Tensor:
    """Return the largest error that rounding can cause in each element.

    With u = eps / 2 it is the sum of: n·u of fp32 for a sum of n terms, and u of the result's dtype for each of at most
    four intermediate roundings (h or g, two scalings and a product; none for dbias), both times the sum of the terms'
    magnitudes; the rounding of the result itself; half a subnormal for each of these five; and half a subnormal of the
    adapters' dtype for each element of h or g, times the numbers that it is multiplied by. The result's dtype is that
    of the adapters for their gradients, else that of x.
    """
    (M, K), (N, R) = q.x.shape, q.b.shape
    terms = {"y": K + R, "dx": N + R, "da": N + M, "db": K + M, "dbias": M}[name] + 8  # 8 for products and scalings
    dtype = q.a.dtype if name in ("da", "db") else q.x.dtype
    unit, own = (torch.finfo(each).eps / 2 for each in (torch.promote_types(dtype, torch.float32), dtype))
    relative = terms * unit + (4 * own if own > unit and name != "dbias" else 0.0)
    of_adapter, c, s = torch.finfo(q.a.dtype), dropout.rescale(q.p) if q.p else 1.0, abs(q.scale)
    factors = {
        "y": lambda: s * q.b.double().abs().sum(1),
        "dx": lambda: c * q.a.double().abs().sum(0),
        "da": lambda: c * q.x.double().abs().sum(0),
        "db": lambda: s * q.dy.double().abs().sum(0)[:, None],
        "dbias": lambda: torch.zeros((), dtype=torch.float64, device=q.x.device),
    }[name]()
    tiny = 5 * own * torch.finfo(dtype).smallest_normal + of_adapter.eps / 2 * of_adapter.smallest_normal * factors
    return relative * magnitude + own * exact.abs() + tiny


def against_bound(name: str, value: Tensor, exact: Tensor, bound: Tensor) -> Verdict:
    """Return the verdict on a result that is judged element by element: no error may exceed `bound`."""
    if not exact.numel():
        return Verdict(name, 0.0, 0.0, 0.0, 0.0, None)
    error = (value.double() - exact).abs()
    at = int((error - bound).argmax())
    worst, worst_allowed = error.flatten()[at].item(), bound.flatten()[at].item()
    fault = f"{name}: error {worst:.3g} of element {at}, allowed {worst_allowed:.3g}" if worst > worst_allowed else None
    return Verdict(name, accuracy.rms(error), accuracy.rms(bound), worst, worst_allowed, fault)


def check(got: dict[str, Tensor], q: Problem, want: dict[str, Tensor] | None = None) -> None:
    """Raise AssertionError with the first fault that `judge` finds."""
    for verdict in judge(got, q, want):
        assert verdict.fault is None, verdict.fault


class Judge:
    """Judges `lora_linear` by one back-end after the other on one problem. The truth is computed once."""

    def __init__(self, q: Problem) -> None:
        self.q, self.want, self.plain = q, truth(q), evaluate(q)

    def faults(self, backend: str) -> tuple[list[Verdict], list[str]]:
        """Return the verdicts, and every fault: those of the verdicts, missing gradients, or the exception that was
        raised."""
        try:
            got = evaluate(self.q, lora_linear, backend=backend)
        except Exception as error:  # a back-end that is judged may fail in any way, and each way is a fault
            return [], [f"{type(error).__name__}: {first_line(error)}"]
        verdicts = judge(got, self.q, self.want, self.plain)
        expected = [name for name in NAMES if name != "dbias" or self.q.bias is not None]
        missing = [f"{name}: missing" for name in expected if got.get(name) is None]
        return verdicts, missing + [verdict.fault for verdict in verdicts if verdict.fault is not None]
