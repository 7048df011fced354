"""The random calls of `lora_linear_experts` of `benchmarks.fuzz`: every expert is judged as a layer of its own over its
own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.fuzz_calls import Results, Watched, missing, results, surroundings, twice, unequal
from benchmarks.fuzz_draw import DTYPES, MOST, PART, Draw, is_exact, sizes
from lora_kernels import Rows, lora_linear_experts
from lora_kernels.core import dropout
from lora_kernels.testing.experts import judge_expert, truth_from, without_mask
from lora_kernels.testing.judge import Problem

MOST_EXPERTS = 20


def experts(draw: Draw) -> list[str]:
    """`lora_linear_experts`, with stacks in any layout."""
    M, N, K, R = sizes(draw)
    dtype, adapter_dtype = draw.pick("dtypes", DTYPES)
    if draw.chance("fp64", 0.02):
        dtype = adapter_dtype = torch.float64
    counts, M = _counts(draw, M)
    p = draw.pick("p", (0.0, 0.0, 0.5, 0.75) if draw.exact else (0.0, 0.0, 0.05, 0.5, 0.9))
    scale = draw.pick("scale", (1.0, 2.0, -1.0, 0.5, 0.0) if draw.exact else (1.0, 0.75, -1.3, 0.0, 16.0))
    seed = torch.tensor(draw.random.getrandbits(62)) if p else None
    draw.say("MNKR", (M, N, K, R))
    part = PART[dtype]
    has_bias = draw.chance("bias", 0.5)
    while True:
        stacks = _operands(draw, M, N, K, R, len(counts), dtype, adapter_dtype, part)
        x, w, a, b, bias, dy = stacks
        bias = bias if has_bias else None
        owns = _owns(x, w, a, b, bias, dy, scale, p, seed, counts)
        if not draw.exact or part < 1e-4 or all(_is_exact(q, MOST[dtype]) for _, _, q in owns):
            break
        part /= 3
    asked = draw.random.random()
    given = {"x": x, "a": _stored(draw, "a", a), "b": _stored(draw, "b", b)} | ({} if bias is None else {"bias": bias})
    tensors = {name: t.detach().requires_grad_(draw.random.random() < 0.4 + asked) for name, t in given.items()}
    w = _stored(draw, "w", w)
    backend = draw.pick("backend", (None, None, "cpu", "eager")) if dtype != torch.float64 else None
    watched = Watched(x, w, dy, *given.values())
    rows = Rows.by_length([*counts, M - sum(counts)], [*range(len(counts)), -1], len(counts))

    def call() -> Results:
        for t in tensors.values():
            t.grad = None
        y = lora_linear_experts(
            tensors["x"], w, tensors["a"], tensors["b"], rows, scale=scale, bias=tensors.get("bias"), dropout_p=p,
            seed=seed, backend=backend,
        )  # fmt: skip
        return results(y, dy, tensors)

    with surroundings(draw):
        got, faults = twice(draw, call)
    faults += missing(got["y"], got, tensors) + watched.faults()
    return faults or _faults(draw, got, owns, counts)


def _counts(draw: Draw, M: int) -> tuple[list[int], int]:
    """Return the rows of each expert, and M: drawn one by one, alike, or all of one expert."""
    n = draw.size("E", MOST_EXPERTS)
    how = draw.pick("split", ("mixed", "mixed", "alike", "one"))
    if how == "mixed":
        ids = torch.randint(-1, n, (M,), generator=draw.generator)
        return torch.bincount(ids[ids >= 0], minlength=n).tolist(), M
    if how == "alike":
        return [M // n] * n, M
    one = draw.random.randrange(n)
    return [M * (e == one) for e in range(n)], M


def _operands(
    draw: Draw, M: int, N: int, K: int, R: int, n: int, dtype: torch.dtype, own: torch.dtype, part: float
) -> tuple[Tensor, ...]:
    """Return x, w, a, b, bias and dy, the stacks contiguous."""
    x = draw.numbers(M, K, 1.0, min(1.0, part * 4 / max(K, 1))).to(dtype)
    w = draw.numbers(n * N, K, max(K, 1) ** -0.5, 0.5).to(dtype).view(n, N, K)
    a = draw.numbers(n * R, K, max(K, 1) ** -0.5, min(0.5, part)).to(own).view(n, R, K)
    b = draw.numbers(n * N, R, R**-0.5, min(1.0, part * 3 / R)).to(own).view(n, N, R)
    bias = draw.numbers(n, N, 1.0, 0.5).to(dtype)
    dy = draw.numbers(M, N, 1.0, min(1.0, part * 4 / max(N, 1))).to(dtype)
    return draw.layout("x", x), w, a, b, bias, draw.layout("dy", dy)


def _stored(draw: Draw, name: str, t: Tensor) -> Tensor:
    """Return the numbers of a stack in another place of memory. What lies between them is NaN."""
    layout = draw.pick(name, ("plain", "plain", "transposed", "expert fastest", "steps"))
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expert fastest":
        return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "steps":
        room = torch.full([2 * n for n in t.shape], float("nan"), dtype=t.dtype)
        return room[::2, 1::2, ::2].copy_(t)
    return t


def _owns(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, dy: Tensor, scale: float, p: float,
    seed: Tensor | None, counts: list[int],
) -> list[tuple[int, int, Problem]]:  # fmt: skip
    """Return (expert, its first row, its problem over its own rows) of every expert that has rows."""
    owns, first = [], 0
    for e, count in enumerate(counts):
        rows = slice(first, first + count)
        if count:
            own = None if bias is None else bias[e]
            owns.append((e, first, Problem(x[rows], w[e], a[e], b[e], own, dy[rows], scale, p, seed)))
        first += count
    return owns


def _is_exact(q: Problem, most: float) -> bool:
    """Return whether no sum of magnitudes is above `most`, whatever the mask keeps."""
    c = dropout.rescale(q.p) if q.p else 1.0
    h = c * (q.x.double().abs() @ q.a.double().abs().t())
    return bool(h.max() <= most) and is_exact(without_mask(q), most)


def _faults(draw: Draw, got: Results, owns: list[tuple[int, int, Problem]], counts: list[int]) -> list[str]:
    """Return what is wrong with each expert, and with what no expert has."""
    faults = []
    for e, first, q in owns:
        of_e = {name: t[first : first + q.x.shape[0]] for name, t in got.items() if name in ("y", "dx")}
        of_e |= {name: t[e] for name, t in got.items() if name in ("da", "db", "dbias")}
        if draw.exact:
            found = unequal(of_e, truth_from(q, first))
        else:
            found = [verdict.fault for verdict in judge_expert(of_e, q, first) if verdict.fault]
        faults += [f"expert {e}: {fault}" for fault in found]
    for e, count in enumerate(counts):
        if not count:
            faults += [f"{name} of expert {e} without rows" for name in ("da", "db", "dbias")
                       if name in got and got[name][e].any()]  # fmt: skip
    used = sum(counts)
    return faults + [
        f"{name} of rows without an expert" for name in ("y", "dx") if name in got and got[name][used:].any()
    ]
