"""Calls of `lora_linear_experts` for tests, and their judge: every expert is judged as a layer of its own over its own
rows, with the part of the dropout mask that belongs to these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import Rows, lora_linear_experts
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.testing.experts import judge_expert
from lora_kernels.testing.judge import Problem

COUNTS = (5, 0, 17, 1, 60, 0, 3)
"""The rows of each expert: none, one, a few, and more than one tile."""


@dataclass(frozen=True)
class Experts:
    """The operands of one call. The last rows of x have no expert where `counts` does not cover them."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float
    p: float
    seed: Tensor | None
    counts: tuple[int, ...]

    @property
    def rows(self) -> Rows:
        """The rows, made anew."""
        rest = self.x.shape[0] - sum(self.counts)
        rows = Rows.by_length([*self.counts, rest], [*range(len(self.counts)), -1], len(self.counts))
        return rows.to(self.x.device)

    def to(self, device: torch.device) -> Experts:
        """Return the same numbers on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})

    @property
    def base(self) -> Base:
        return Base(self.w, self.bias)

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.a, self.b, self.scale, self.p, self.seed)

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (expert, first row, row after the last) of every expert, with rows or without."""
        ends = [0, *itertools.accumulate(self.counts)]
        return [(e, ends[e], ends[e + 1]) for e in range(len(self.counts))]


def experts(
    N: int,
    K: int,
    R: int,
    counts: Sequence[int] = COUNTS,
    *,
    rest: int = 0,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    p: float = 0.0,
    bias: bool = True,
    layout: str = "rows",
    seed: int = 0,
) -> Experts:
    """Return random operands. `layout` is "rows", contiguous; "peft", with B as PEFT stores it and W as gpt-oss does;
    or "strided", with gaps between the elements of all."""
    generator = torch.Generator().manual_seed(seed)
    E, M = len(counts), sum(counts) + rest

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        if layout != "strided":
            return (torch.randn(*shape, generator=generator) * std).to(dtype)
        whole = torch.randn(*(2 * n for n in reversed(shape)), generator=generator) * std
        return whole.to(dtype).permute(*reversed(range(len(shape))))[tuple(slice(1, None, 2) for _ in shape)]

    own = adapter_dtype or dtype
    w = draw(E, K, N, std=K**-0.5).transpose(1, 2) if layout == "peft" else draw(E, N, K, std=K**-0.5)
    a = draw(E, R, K, std=K**-0.5, dtype=own)
    b = draw(E, N, R, std=R**-0.5, dtype=own)
    if layout == "peft":
        b = b.permute(1, 2, 0).reshape(N, R * E).view(N, R, E).permute(2, 0, 1)
    return Experts(
        draw(M, K), w, a, b, draw(E, N) if bias else None, draw(M, N), 0.75, p,
        torch.tensor(987654321 + (seed << 40)) if p else None, tuple(counts),
    )  # fmt: skip


NAMES = ("x", "a", "b", "bias")


def run(m: Experts, rows: Rows | None = None, wanted: Sequence[str] = NAMES, **kwargs: Any) -> dict[str, Tensor]:
    """Return y and every gradient of a call, by name."""
    given = {name: t.detach() for name in NAMES if (t := getattr(m, name)) is not None}
    leaves = {name: t.requires_grad_(name in wanted) for name, t in given.items()}
    y = lora_linear_experts(
        leaves["x"], m.w, leaves["a"], leaves["b"], rows or m.rows, scale=m.scale, bias=leaves.get("bias"),
        dropout_p=m.p, seed=m.seed, **kwargs,
    )  # fmt: skip
    if y.requires_grad:
        y.backward(m.dy)
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}


def run_module(module: Any, m: Experts, save_h: bool = True, needs: Needs | None = None) -> dict[str, Tensor | None]:
    """Return the results of a back-end that is called directly, as the operators call it."""
    y, h = module.forward_experts(m.x, m.base, m.adapter, m.rows, save_h)
    if not save_h:
        return {"y": y}
    needs = needs or Needs(True, (True,), (True,))
    x, saved = m.x if needs.da[0] else None, h if needs.db[0] else None
    dx, da, db = module.backward_experts(m.dy, x, Base(m.w), m.adapter, m.rows, saved, needs)
    return {"y": y, "h": h, "dx": dx, "da": da, "db": db}


def check(m: Experts, got: dict[str, Any]) -> None:
    """Judge every result: each expert over its own rows; zeros for experts without rows and rows without an expert."""
    for e, first, last in m.spans():
        of_e = {name: t[e] for name in ("da", "db", "dbias") if (t := got.get(name)) is not None}
        if first == last:
            assert all(not t.any() for t in of_e.values()), f"expert {e} has no rows"
            continue
        of_e |= {name: t[first:last] for name in ("y", "dx") if (t := got.get(name)) is not None}
        bias = None if m.bias is None else m.bias[e]
        q = Problem(m.x[first:last], m.w[e], m.a[e], m.b[e], bias, m.dy[first:last], m.scale, m.p, m.seed)
        for verdict in judge_expert(of_e, q, first):
            assert verdict.fault is None, f"expert {e}: {verdict.fault}"
    used = sum(m.counts)
    for name in ("y", "dx", "h"):
        if got.get(name) is not None:
            assert not got[name][used:].any(), f"{name} of rows without an expert"


class Largest(TorchDispatchMode):
    """Records the most elements that an operator of torch has made in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                elements = t.untyped_storage().nbytes() // t.element_size()
                if elements > self.elements:
                    self.elements, self.by = elements, f"{func} {tuple(t.shape)}"
        return out
