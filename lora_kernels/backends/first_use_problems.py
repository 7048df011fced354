"""The operands of the check at first use: one layer or several, many adapters, and the experts of a layer. Each gives
its results by the equation in plain torch, and by a back-end."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from lora_kernels import reference
from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, Base, Call, Needs
from lora_kernels.core.rows import Rows
from lora_kernels.quant.weight import QuantizedWeight, quantize_weight

_N, _K = 96, 192
P = 0.25
"""The probability of dropout in the calls of the check that have it."""
_ROWS_OF_MANY = (600, 30, 0, 45)
"""The rows of each of several adapters: more than one sum takes, fewer than a tile has, none, and more than a tile has.
With their ranks they give every h enough roundings."""
_RANKS_OF_MANY = (8, 40, 16, 24)
_RANKS_OF_EXPERTS = (8, 40)
"""The rank of the experts of one layer, in two turns: with one block and with several."""


class Problem(Protocol):
    """The operands of one call."""

    def by_torch(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y and the gradients by the equation in plain torch, in `dtype` or the dtypes of the call."""

    def by(self, module: ModuleType, op: str) -> dict[str, Tensor]:
        """Return the results of one pass of a back-end, in the form of `by_torch`."""


def problem(call: Call, M: int, R: int, turn: int) -> Problem:
    """Return the operands of one call of the check. Many adapters and experts have sizes of their own."""
    if call.op.endswith("_multi"):
        return _ManyAdapters(call)
    return _Experts(call, turn) if call.op.endswith("_experts") else _Layers(call, M, R, turn)


def calls(call: Call, of_layers: int) -> int:
    """Return how many calls the check makes, where those of one or several layers take `of_layers`."""
    if call.op.endswith("_multi"):
        return 1
    return len(_RANKS_OF_EXPERTS) if call.op.endswith("_experts") else of_layers


class _Draw:
    """The random operands of one call of the check."""

    def __init__(self, call: Call, turn: int = 0) -> None:
        self.call, self.generator = call, torch.Generator(call.device).manual_seed(turn)

    def __call__(self, rows: int, cols: int, std: float, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(rows, cols, generator=self.generator, device=self.call.device)
        return (drawn * std).to(dtype or self.call.dtype)

    def base(self) -> Base:
        w: Tensor | QuantizedWeight = self(_N, _K, _K**-0.5)
        if isinstance(w, Tensor) and self.call.w_format != "dense":
            w = quantize_weight(w, self.call.w_format)
        return Base(w, self(1, _N, 1.0)[0])

    def adapter(self, R: int, number: int) -> Adapter:
        """Return an adapter whose seed depends on `number`."""
        call = self.call
        a, b = self(R, _K, _K**-0.5, call.adapter_dtype), self(_N, R, R**-0.5, call.adapter_dtype)
        seed = torch.tensor(2**40 + number, device=call.device) if call.dropout else None
        return Adapter(a, b, 0.75, P if call.dropout else 0.0, seed)


def _by_torch(
    x: Tensor, base: Base, adapter: Adapter, dy: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, dx, da and db of one layer by the equation in plain torch, in `dtype` or in those of the operands."""
    (w, bias), (a, b, scale, p, seed) = base, adapter
    assert bias is not None
    outer = dtype or x.dtype
    dense = w.to(outer) if isinstance(w, Tensor) else w.dequantize(outer)
    x, a, b = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b))
    with torch.enable_grad():
        y = reference.lora_linear(x, dense, a, b, scale=scale, bias=bias.to(outer), dropout_p=p, seed=seed)
        dx, da, db = torch.autograd.grad(y, (x, a, b), dy.to(outer))
    return y.detach(), dx, da, db


class _Layers:
    """The operands of one call of the check: one layer, or several over one x."""

    def __init__(self, call: Call, M: int, R: int, turn: int) -> None:
        draw = _Draw(call, turn)
        self.x = draw(M, _K, 1.0)
        self.dys: list[Tensor] = []
        self.bases: list[Base] = []
        self.adapters: list[Adapter] = []
        for layer in range(call.layers):
            self.bases.append(draw.base())
            self.adapters.append(draw.adapter(R, 8 * turn + layer))
            self.dys.append(draw(M, _N, 1.0))

    def by_torch(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y and the gradients by the equation in plain torch, in `dtype` or the dtypes of the call. Those of
        several layers follow each other, and dx is their sum."""
        results: dict[str, list[Tensor]] = {"y": [], "dx": [], "da": [], "db": []}
        for dy, base, adapter in zip(self.dys, self.bases, self.adapters, strict=True):
            for name, value in zip(results, _by_torch(self.x, base, adapter, dy, dtype), strict=True):
                results[name].append(value)
        dx = torch.stack(results.pop("dx")).sum(0)
        return {name: torch.cat(values) for name, values in results.items()} | {"dx": dx}

    def by(self, module: ModuleType, op: str) -> dict[str, Tensor]:
        """Return the results of one pass of a back-end, in the form of `by_torch`."""
        every = (True,) * len(self.bases)
        ys, hs = module.forward(self.x, self.bases, self.adapters, list(every))
        if op == "forward":  # h is judged by the db that it gives
            layers = zip(self.dys, self.adapters, hs, strict=True)
            dbs = [adapter.scale * (dy.double().t() @ h.double()) for dy, adapter, h in layers]
            return {"y": torch.cat(ys), "db": torch.cat(dbs)}
        dx, das, dbs = module.backward(self.dys, self.x, self.bases, self.adapters, hs, Needs(True, every, every))
        return {"dx": dx, "da": torch.cat(das), "db": torch.cat(dbs)}


class _ManyAdapters:
    """The operands of a call of many adapters over the rows of one x. Some rows have none."""

    def __init__(self, call: Call) -> None:
        draw = _Draw(call)
        self.base = draw.base()
        self.adapters = [draw.adapter(R, number) for number, R in enumerate(_RANKS_OF_MANY)]
        ids = torch.tensor([i for i, count in enumerate((*_ROWS_OF_MANY, 25)) for _ in range(count)])
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to(call.device)
        self.n = len(self.adapters)
        self.rows = Rows.by_id(torch.where(ids == self.n, -1, ids), self.n)
        self.own = [(ids == i).nonzero()[:, 0] for i in range(self.n + 1)]
        """The rows of each adapter, and of none."""
        self.x, self.dy = draw(len(ids), _K, 1.0), draw(len(ids), _N, 1.0)

    def by_torch(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y and the gradients by the equation in plain torch, each adapter as a layer over its own rows."""
        nobody = self.adapters[0]._replace(scale=0.0)
        results = []
        for own, adapter in zip(self.own, [*self.adapters, nobody], strict=True):
            results.append(_by_torch(self.x[own], self.base, adapter, self.dy[own], dtype))
        ys, dxs, das, dbs = zip(*results, strict=True)
        y = torch.cat(ys)
        return {"y": y, "y of a stack": y, "dx": torch.cat(dxs)} | self._named("da", das) | self._named("db", dbs)

    def by(self, module: ModuleType, op: str) -> dict[str, Tensor]:
        """Return the results of one pass of a back-end, in the form of `by_torch`."""
        order, every = torch.cat(self.own), (True,) * self.n
        y, h = module.forward_multi(self.x, self.base, self.adapters, self.rows, True)
        if op == "forward_multi":  # h is judged by the db that it gives
            first = 0
            dbs: list[Tensor | None] = []
            for own, (_, b, scale, *_) in zip(self.own, self.adapters, strict=False):
                last = first + len(own) * b.shape[1]
                own_h = h[first:last].view(-1, b.shape[1])
                dbs.append(scale * (self.dy[own].double().t() @ own_h.double()))
                first = last
            found = {"y": y[order]} | self._named("db", dbs)
            if not self.adapters[0].p:  # a stack lies otherwise in memory, and has no dropout
                stack = AdapterStack(self.adapters)
                found["y of a stack"] = module.forward_multi(self.x, self.base, stack, self.rows, False)[0][order]
            return found
        needs = Needs(True, every, every)
        dx, das, dbs = module.backward_multi(self.dy, self.x, self.base, self.adapters, self.rows, h, needs)
        return {"dx": dx[order]} | self._named("da", das) | self._named("db", dbs)

    def _named(self, name: str, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return the gradients by the adapter's number. That of an adapter without rows may be zeros or None."""
        found = {}
        for i, (rows, gradient) in enumerate(zip(_ROWS_OF_MANY, gradients, strict=False)):
            if rows or gradient is not None:
                assert gradient is not None
                found[f"{name} of adapter {i}"] = gradient
        return found


class _Experts:
    """The operands of one call of the experts of a layer, whose rows follow each other. Some rows have no expert."""

    def __init__(self, call: Call, turn: int) -> None:
        draw, R = _Draw(call, turn), _RANKS_OF_EXPERTS[turn]
        lengths = (*_ROWS_OF_MANY, 25)
        n = len(_ROWS_OF_MANY)
        self.rows = Rows.by_length(lengths, [*range(n), -1], n).to(call.device)
        self.layers = [(draw.base(), draw.adapter(R, 0)) for _ in range(n)]
        self.x, self.dy = draw(sum(lengths), _K, 1.0), draw(sum(lengths), _N, 1.0)
        ws, biases = zip(*[base for base, _ in self.layers], strict=True)
        self.base = Base(torch.stack(ws), torch.stack(biases))
        first = self.layers[0][1]
        a = torch.stack([adapter.a for _, adapter in self.layers])
        b = torch.stack([adapter.b for _, adapter in self.layers])
        self.adapter = Adapter(a, b, first.scale, first.p, first.seed)

    def by_torch(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y and the gradients by the equation in plain torch, each expert as a layer over its own rows. The rows
        before these are there for the mask, and have a dy of zero."""
        found: dict[str, Tensor] = {}
        for e, first, last in self.rows.spans():
            dy = torch.cat([torch.zeros_like(self.dy[:first]), self.dy[first:last]])
            y, dx, da, db = _by_torch(self.x[:last], *self.layers[e], dy, dtype)
            found |= self._named(e, y=y[first:], dx=dx[first:], da=da, db=db)
        return found

    def by(self, module: ModuleType, op: str) -> dict[str, Tensor]:
        """Return the results of one pass of a back-end, in the form of `by_torch`."""
        y, h = module.forward_experts(self.x, self.base, self.adapter, self.rows, True)
        found: dict[str, Tensor] = {}
        if op == "backward_experts":
            needs = Needs(True, (True,), (True,))
            dx, das, dbs = module.backward_experts(self.dy, self.x, self.base, self.adapter, self.rows, h, needs)
        for e, first, last in self.rows.spans():
            if op == "backward_experts":
                found |= self._named(e, dx=dx[first:last], da=das[e], db=dbs[e])
            else:  # h is judged by the db that it gives
                own = self.dy[first:last].double().t() @ h[first:last].double()
                found |= self._named(e, y=y[first:last], db=self.adapter.scale * own)
        return found

    def _named(self, e: int, **results: Tensor) -> dict[str, Tensor]:
        """Return the results of an expert as vectors, since those of two ranks follow each other."""
        return {f"{name} of expert {e}": t.flatten() for name, t in results.items()}
