"""The random calls of `lora_embedding` of `benchmarks.fuzz`: an embedding is the product of a matrix of ones and zeros
with the table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import fuzz_bounds
from benchmarks.fuzz_calls import Results, Watched, missing, results, surroundings, twice
from benchmarks.fuzz_dora import norm_faults
from benchmarks.fuzz_draw import DTYPES, MOST, PART, Draw
from lora_kernels import lora_embedding
from lora_kernels.ops.embedding_norm import column_norm
from lora_kernels.ops.embedding_passes import without_row
from lora_kernels.testing.judge import Problem


def embedding(draw: Draw) -> list[str]:
    """`lora_embedding`, LoRA or DoRA, with ids and operands in any layout."""
    M, V, D, R = draw.size("M", 90), draw.size("V", 60), draw.size("D", 130), draw.size("R", 40)
    if draw.chance("blocks", 0.03):  # more than one block of rows in the forward
        M, D = 700, draw.size("D", 1500, 500)
    dtype, adapter_dtype = draw.pick("dtypes", DTYPES)
    if draw.chance("fp64", 0.05):
        dtype = adapter_dtype = torch.float64
    ids = _ids(draw, M, V)
    e = draw.pick("embed_scale", (1.0, 1.0, 2.0, -0.5) if draw.exact else (1.0, 1.0, 3.7, -0.3))
    scale = draw.pick("scale", (1.0, 2.0, -1.0, 0.5, 0.0) if draw.exact else (1.0, 0.75, -1.3, 0.0, 16.0, 1e-3))
    row = draw.pick("padding_idx", (None, draw.random.randrange(V), draw.random.randrange(V) - V))
    dora = draw.chance("dora", 0.3)
    part = PART[dtype]
    while True:
        w = draw.numbers(V, D, 1.0, 0.5).to(dtype)
        a_t = draw.numbers(V, R, 1.0, min(0.5, part)).to(adapter_dtype)
        b = draw.numbers(D, R, R**-0.5, min(1.0, part * 3 / R)).to(adapter_dtype)
        dy = draw.numbers(ids.numel(), D, 1.0, min(1.0, part * 4 / D)).to(dtype)
        most = MOST[dtype] / (4 if dora else 1)
        if not draw.exact or part < 1e-4 or _largest(ids, w, a_t, b, dy, scale, e) <= most:
            break
        part /= 3
    a_t = a_t.t().contiguous().t() if draw.chance("turned", 0.4) else draw.layout("a_t", a_t)
    w, b, dy = draw.layout("w", w), draw.layout("b", b), draw.layout("dy", dy)
    dy_now = dy.reshape(*ids.shape, D)
    m = norm = None
    if dora:
        wide = torch.promote_types(adapter_dtype, torch.float32)
        like = torch.empty(0, dtype=wide if draw.chance("wide-m", 0.5) else adapter_dtype)
        norm = column_norm(w, without_row(a_t, row and row % V if row else row), b, scale, like)
        m = (norm * draw.pick("m", (1.0, 2.0) if draw.exact else (1.0, 0.7, -1.2))).to(like.dtype)
    given = {"a": a_t, "b": b} | ({} if m is None else {"m": m})
    tensors = {name: t.detach().requires_grad_(draw.random.random() < 0.75) for name, t in given.items()}
    factor = torch.tensor([e], dtype=torch.float64) if draw.chance("tensor", 0.3) else e
    factor_now = float(factor.to(dtype)) if isinstance(factor, Tensor) else factor
    watched = Watched(ids, w, dy_now, *given.values())

    def call() -> Results:
        for t in tensors.values():
            t.grad = None
        y = lora_embedding(
            ids, w, tensors["a"], tensors["b"], scale=scale, embed_scale=factor, padding_idx=row,
            magnitude=tensors.get("m"),
        )  # fmt: skip
        return results(y, dy_now, tensors)

    with surroundings(draw):
        got, faults = twice(draw, call)
        norm = None if m is None else column_norm(w, without_row(a_t, None if row is None else row % V), b, scale, m)
    faults += missing(got["y"], got, tensors) + watched.faults()
    if got["y"].dtype != dtype:
        faults.append(f"y is {got['y'].dtype}")
    held = a_t if row is None else without_row(a_t, row % V)
    if norm is not None:
        faults += norm_faults(Problem(w[:0], w.t(), held.t(), b, None, dy[:0], scale, 0.0, None), norm)
    seen = F.one_hot(ids.long().reshape(-1), V).double()

    def equation(own: Mapping[str, Tensor], sign: float) -> Tensor:
        s, g, wide = (scale, factor_now, w.double()) if sign < 0 else (abs(scale), abs(factor_now), w.double().abs())
        own_a = own["a"] if row is None else own["a"] * (torch.arange(V) != row % V)[:, None]
        y = seen @ wide + s * (seen @ own_a @ own["b"].t())
        if norm is not None:
            y = y * (own["m"] / norm.double().abs())
        return (g * y).view(dy_now.shape)

    want, magnitude = fuzz_bounds.truth(equation, given, dy_now)
    dtypes = {"y": dtype} | {f"d{name}": t.dtype for name, t in given.items()}
    return faults + fuzz_bounds.faults(draw, got, want, magnitude, dtypes, M + V + D + R + 16)


def _ids(draw: Draw, M: int, V: int) -> Tensor:
    """Return ids in some shape and layout: drawn, all alike, or in order."""
    kind = draw.pick("ids", ("drawn", "drawn", "alike", "ordered"))
    ids = torch.randint(0, V, (M,), generator=draw.generator)
    ids = ids[:1].expand(M) if kind == "alike" else torch.arange(M) % V if kind == "ordered" else ids
    shape = draw.pick("shape", ((M,), (M,), (1, M), (M, 1), (), (0,), (3, 0), (2, 0, 5), (2, M), (2, 1, M)))
    if len(shape) > 1 and shape[0] == 2 and 0 not in shape:
        ids = torch.stack((ids, ids.flip(0)), -1).t() if draw.chance("strided", 0.5) else torch.stack((ids, ids))
        ids = ids.reshape(shape) if len(shape) == 3 else ids
    else:
        ids = ids[: max(1, len(ids)) if 0 not in shape and shape else int(shape == ())].reshape(shape)
    return ids.to(draw.pick("kind", (torch.int64, torch.int32)))


def _largest(ids: Tensor, w: Tensor, a_t: Tensor, b: Tensor, dy: Tensor, scale: float, e: float) -> float:
    """Return the largest sum of magnitudes in any result."""
    a_t, b, dy, flat = a_t.abs().double(), b.abs().double(), dy.abs().double(), ids.long().reshape(-1)
    s, g, h = max(1.0, abs(scale)), max(1.0, abs(e)), a_t[flat]
    down = s * g * dy @ b
    sums = torch.zeros(w.shape[0], b.shape[1], dtype=torch.float64).index_add_(0, flat, down)
    found = g * (w.abs().double()[flat] + s * h @ b.t()), down, sums, s * g * dy.t() @ h
    return max((float(t.max()) for t in found if t.numel()), default=0.0)
