"""The random calls of `lora_conv` of `benchmarks.fuzz`. The truth are torch's own modules in fp64, one for W and one
for A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import fuzz_bounds
from benchmarks.fuzz_calls import Results, Watched, missing, results, surroundings, twice
from benchmarks.fuzz_dora import norm_faults
from benchmarks.fuzz_draw import DTYPES, MOST, PART, Draw
from lora_kernels import lora_conv
from lora_kernels.core import dropout
from lora_kernels.ops.conv_dora import magnitude_of
from lora_kernels.ops.conv_function import may_fold
from lora_kernels.ops.conv_rows import lies_by_rows, rows_of
from lora_kernels.ops.conv_window import window
from lora_kernels.testing.judge import Problem

_KINDS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
_GROUPS = ((1, False), (1, False), (1, False), (2, False), (2, True), (3, True))
"""The groups of W, and whether A is in them."""


@dataclass
class _Shape:
    """What a call has beside its operands."""

    N: int
    R: int
    kernel: tuple[int, ...]
    moves: dict[str, Any]
    grouped: bool

    @property
    def of_a(self) -> int:
        """The groups of A."""
        return self.moves["groups"] if self.grouped else 1

    def module(self, N: int, C: int, groups: int) -> nn.Module:
        """Return torch's module with these channels and groups."""
        kind: Any = _KINDS[len(self.kernel) - 1]
        with torch.device("meta"):
            made: nn.Module = kind(C, N, self.kernel, bias=False, **{**self.moves, "groups": groups})
        return made


def conv(draw: Draw) -> list[str]:
    """`lora_conv`, LoRA or DoRA, in one to three dimensions."""
    x_shape, shape = _shape(draw)
    C, n = x_shape[1], len(shape.kernel)
    dtype, adapter_dtype = draw.pick("dtypes", DTYPES)
    if draw.chance("fp64", 0.1):
        dtype = adapter_dtype = torch.float64
    dora = (shape.moves["groups"] == 1 or shape.grouped) and draw.chance("dora", 0.25)
    scale = draw.pick("scale", (1.0, 2.0, -1.0, 0.5, 0.0) if draw.exact else (1.0, 0.75, -1.3, 0.0, 16.0))
    p = draw.pick("p", (0.0, 0.0, 0.5, 0.75) if draw.exact else (0.0, 0.0, 0.05, 0.5, 0.9))
    seed = torch.tensor(draw.random.getrandbits(62)) if p else None
    bias = draw.chance("bias", 0.5)
    cast = None
    if not dora and not draw.exact and dtype != torch.float64 and draw.chance("autocast", 0.1):
        cast = draw.pick("to", (torch.bfloat16, torch.float16) if dtype == torch.float32 else (dtype,))
    layout = draw.pick("x", ("plain", "plain", "last", "last", "steps", "turned", "expanded"))
    part = PART[dtype]
    while True:
        given = _operands(draw, x_shape, shape, dtype, adapter_dtype, part, bias)
        w = given.pop("w")
        given["x"] = _placed(given["x"], layout)
        x = given["x"].to(cast or dtype)
        rows = _rows(x, given["a"], w, shape, p)
        c = dropout.rescale(p) if p else 1.0
        keep = c * _keep(x, shape, rows, p, seed) if seed is not None else None
        y_shape = _convolve(shape, x[:1].double(), w.double(), shape.moves["groups"]).shape
        dy = draw.numbers(x_shape[0] * y_shape[1], math.prod(y_shape[2:]), 1.0, min(1.0, part * 4 / y_shape[1]))
        dy = _placed(
            dy.view(x_shape[0], *y_shape[1:]).to(cast or dtype), draw.random.choice(("plain", "last", "steps"))
        )
        d = torch.ones(shape.N, dtype=torch.float64)
        equation = _equation(shape, w if cast is None else w.to(cast), keep, scale)
        if cast is not None:  # A and B in fp32 stay where `lora_linear` serves the call
            given = {name: t if rows and name in "ab" and t.dtype == torch.float32 else t.to(cast).to(t.dtype)
                     for name, t in given.items()}  # fmt: skip
        _, magnitude = fuzz_bounds.truth(equation, given | {"d": d}, dy)
        most = MOST[dtype] / (4 if dora else 1)
        if not draw.exact or part < 1e-4 or max(map(_most, (*magnitude.values(), _h(shape, given, c)))) <= most:
            break
        part /= 3
    a, b = given["a"], given["b"]
    m = norm = None
    if dora:
        wide = torch.promote_types(adapter_dtype, torch.float32)
        like = torch.empty(1, shape.N, *(1,) * n, dtype=wide if draw.chance("wide-m", 0.5) else adapter_dtype)
        norm = magnitude_of(w, a, b, scale, like, shape.moves["groups"])
        m = (norm * draw.pick("m", (1.0, 2.0) if draw.exact else (1.0, 0.7, -1.2))).to(like.dtype)
    leaves = given | ({} if m is None else {"m": m})
    tensors = {name: t.detach().requires_grad_(draw.random.random() < 0.75) for name, t in leaves.items()}
    one = x_shape[0] == 1 and draw.chance("one sample", 0.5)
    backend = draw.pick("backend", (None, None, "cpu", "eager")) if dtype != torch.float64 else None
    watched = Watched(w, dy, *leaves.values())

    def call() -> Results:
        for t in tensors.values():
            t.grad = None
        with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
            y = lora_conv(
                tensors["x"][0] if one else tensors["x"], w, tensors["a"], tensors["b"], scale=scale,
                bias=tensors.get("bias"), dropout_p=p, seed=seed, magnitude=tensors.get("m"), backend=backend,
                **shape.moves,
            )  # fmt: skip
        return results(y, dy, tensors)

    with surroundings(draw):
        got, faults = twice(draw, call)
        norm = None if m is None else magnitude_of(w, a, b, scale, m, shape.moves["groups"])
    faults += missing(got["y"], got, tensors) + watched.faults()
    if got["y"].dtype != (cast or dtype):
        faults.append(f"y is {got['y'].dtype}")
    if norm is not None and m is not None:
        d = m.flatten().double() / norm.flatten().double()
        faults += _norm_faults(shape, w, a, b, scale, norm)
    want, magnitude = fuzz_bounds.truth(equation, given | {"d": d}, dy)
    if norm is not None:
        for each in (want, magnitude):
            each["dm"] = (each.pop("dd") / norm.flatten().double()).view_as(norm)
        if bias and not p:  # z is rounded with the bias in it
            total = dy.double().abs().sum((0, *range(2, n + 2))) * given["bias"].double().abs()
            magnitude["dm"] += (total / norm.flatten().double()).view_as(norm)
    dtypes = {"y": cast or dtype} | {
        f"d{name}": dtype if name == "m" and dtype.itemsize == 2 else
        cast if cast is not None and not (rows and name in "ab" and t.dtype == torch.float32) else t.dtype
        for name, t in leaves.items()
    }  # fmt: skip
    terms = (C + shape.N) * math.prod(shape.kernel) + shape.R + x_shape[0] * math.prod(y_shape[2:]) + 16
    return faults + fuzz_bounds.faults(draw, got, want, magnitude, dtypes, terms)


def _shape(draw: Draw) -> tuple[tuple[int, ...], _Shape]:
    """Return the shape of x, and the rest of a call. Its y is not empty but for an empty batch."""
    n = draw.pick("dims", (1, 2, 2, 2, 3))
    groups, grouped = draw.pick("groups", _GROUPS)
    C, N = groups * draw.size("C", 20), groups * draw.size("N", 24)
    R = groups * draw.size("R", 12)
    B = 0 if draw.chance("empty", 0.02) else draw.size("B", 5)
    way = draw.pick("way", ("any", "any", "any", "same", "1×1", "patches", "large"))
    numbers = draw.random

    def each(*options: int) -> tuple[int, ...]:
        return tuple(numbers.choice(options) for _ in range(n))

    moves: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": groups, "padding_mode": "zeros"}
    if way == "1×1":
        kernel, moves["stride"] = (1,) * n, each(1, 1, 2, 3)
    elif way == "patches":
        kernel = each(1, 2, 3, 4, 8) if n < 3 else each(1, 2, 3)
        moves["stride"] = kernel
    else:
        kernel = each(1, 2, 3, 3, 4) if n < 3 else each(1, 2, 3)
        moves |= {"dilation": each(1, 1, 2, 3), "padding_mode": numbers.choice(_MODES)}
        moves |= {"padding": "same"} if way == "same" else {
            "padding": numbers.choice((each(0, 1, 2, 3), "valid")), "stride": each(1, 1, 2, 3)
        }  # fmt: skip
    most = {1: 60, 2: 12, 3: 6} if way != "large" else {1: 900, 2: 36, 3: 12}
    spans = [d * (k - 1) + 1 for d, k in zip(_tuple(moves["dilation"], n), kernel, strict=True)]
    # Reflection needs more elements than it pads, and circular padding as many.
    sizes = tuple(max(span, 4) + numbers.randrange(most[n]) for span in spans)
    draw.say("x", (B, C, *sizes))
    draw.say("NR", (N, R))
    draw.say("kernel", kernel)
    draw.said.append(", ".join(f"{name}={value}" for name, value in moves.items()))
    return (B, C, *sizes), _Shape(N, R, kernel, moves, grouped)


def _tuple(given: Any, n: int) -> tuple[int, ...]:
    return (given,) * n if isinstance(given, int) else tuple(given)


def _operands(
    draw: Draw, x: tuple[int, ...], shape: _Shape, dtype: torch.dtype, own: torch.dtype, part: float, bias: bool
) -> dict[str, Tensor]:
    """Return x, w, a, b and bias."""
    k, n, N, R, groups = math.prod(shape.kernel), len(shape.kernel), shape.N, shape.R, shape.moves["groups"]
    C, of_w, of_a = x[1], x[1] // groups * k, x[1] // shape.of_a * k
    made = {
        "x": draw.numbers(x[0] * C, math.prod(x[2:]), 1.0, min(1.0, part * 4 / of_a)).to(dtype).view(x),
        "w": draw.numbers(N, of_w, of_w**-0.5, 0.5).to(dtype).view(N, C // groups, *shape.kernel),
        "a": draw.numbers(R, of_a, of_a**-0.5, min(0.5, part)).to(own).view(R, C // shape.of_a, *shape.kernel),
        "b": draw.numbers(N, R // groups, R**-0.5, min(1.0, part * 3 / R)).to(own).view(N, R // groups, *(1,) * n),
    }
    return made | ({"bias": draw.numbers(1, N, 1.0, 0.5).to(dtype)[0]} if bias else {})


def _placed(t: Tensor, layout: str) -> Tensor:
    """Return the numbers of t [B, C, ...] in another place of memory. What lies between them is NaN."""
    if layout == "last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "turned":
        return t.mT.contiguous().mT if t.dim() > 3 else t
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.shape[0] else t
    if layout == "steps":
        return torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)[..., ::2].copy_(t)
    return t


def _rows(x: Tensor, a: Tensor, w: Tensor, shape: _Shape, p: float) -> bool:
    """Return whether `lora_linear` serves a call."""
    moves = window(shape.kernel, **shape.moves)
    return rows_of(x, shape.kernel, moves, may_fold(x, w.to(x.dtype), a.to(x.dtype), p, moves)) is not None


def _keep(x: Tensor, shape: _Shape, rows: bool, p: float, seed: Tensor) -> Tensor:
    """Return the mask of x in fp64, by the order in which x lies in memory; that of its rows where `rows` is True."""
    B, C, *sizes = x.shape
    S = math.prod(sizes)
    if rows:  # a patch has each element of x once at most: the gradient of the rows is their mask as an x
        whole = x.detach().double().requires_grad_()
        seen = rows_of(whole, shape.kernel, window(shape.kernel, **shape.moves), False)
        assert seen is not None
        mask = dropout.keep_mask(seed, math.prod(seen.shape[:-1]), seen.shape[-1], p)
        return torch.autograd.grad(seen, whole, mask.view(seen.shape).double())[0]
    if lies_by_rows(x):
        return dropout.keep_mask(seed, B * S, C, p).view(B, *sizes, C).movedim(-1, 1).double()
    return dropout.keep_mask(seed, B * C, S, p).view(x.shape).double()


def _convolve(shape: _Shape, x: Tensor, w: Tensor, groups: int) -> Tensor:
    """Return what torch's module computes with the weight w."""
    module = shape.module(w.shape[0], x.shape[1], groups)
    y: Tensor = torch.func.functional_call(module, {"weight": w}, (x,))
    return y


def _equation(shape: _Shape, w: Tensor, keep: Tensor | None, scale: float) -> fuzz_bounds.Equation:
    """Return y = x ∗ W + bias + (d - 1) ⊙ (x̂ ∗ W) + d ⊙ s·B (x̂ ∗ A)."""
    groups = shape.moves["groups"]
    ones = (1,) * len(shape.kernel)

    def equation(own: Mapping[str, Tensor], sign: float) -> Tensor:
        s, wide = (scale, w.double()) if sign < 0 else (abs(scale), w.double().abs())
        x_hat = own["x"] if keep is None else own["x"] * keep
        d = own["d"].view(-1, *ones)
        u = _convolve(shape, x_hat, wide, groups)
        h = _convolve(shape, x_hat, own["a"], shape.of_a)
        low = s * torch.convolution(h, own["b"], None, ones, [0] * len(ones), ones, False, [0] * len(ones), groups)
        y = _convolve(shape, own["x"], wide, groups) + (d + sign) * u + d * low
        return y if "bias" not in own else y + own["bias"].view(-1, *ones)

    return equation


def _h(shape: _Shape, given: Mapping[str, Tensor], c: float) -> Tensor:
    """Return c·(|x| ∗ |A|)."""
    return c * _convolve(shape, given["x"].double().abs(), given["a"].double().abs(), shape.of_a)


def _most(t: Tensor) -> float:
    return float(t.max()) if t.numel() else 0.0


def _norm_faults(shape: _Shape, w: Tensor, a: Tensor, b: Tensor, scale: float, norm: Tensor) -> list[str]:
    """Return the faults of the norm, group by group."""
    groups, found = shape.moves["groups"], []
    for parts in zip(*(t.chunk(groups) for t in (w, a, b, norm.flatten())), strict=True):
        w_g, a_g, b_g, norm_g = parts
        q = Problem(w_g[:0], w_g.flatten(1), a_g.flatten(1), b_g.flatten(1), None, w_g[:0], scale, 0.0, None)
        found += norm_faults(q, norm_g)
    return found
