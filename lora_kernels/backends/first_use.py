"""The check that switches the back-end `composite` on: at the first use of a class of its kernels on a device, their
results are compared with plain torch.

The kernels of `composite` wait for nothing, so a few calls of them are safe in any process. The check takes tens of
milliseconds beside the compilation of the kernels, which the call needs anyway. Its verdict is kept in the user's file
of evidence.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from lora_kernels import reference
from lora_kernels.core import accuracy
from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, Base, Call, Needs, power_of_two
from lora_kernels.core.rows import Rows
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import BROKEN, RIGHT, WRONG, Evidence, Verdict
from lora_kernels.quant.weight import QuantizedWeight, quantize_weight

_ROWS = (16, 64, 160)
"""The rows of x in the check: the first that are not fewer than those of the call, or the last."""
_N, _K, _P = 96, 192, 0.25
_ROWS_OF_MANY = (600, 30, 0, 45)
"""The rows of each of several adapters: more than one sum takes, fewer than a tile has, none, and more than a tile has.
With their ranks they give every h enough roundings."""
_RANKS_OF_MANY = (8, 40, 16, 24)
_RANKS_OF_EXPERTS = (8, 40)
"""The rank of the experts of one layer, in two turns: with one block and with several."""
_ENOUGH = 1024
"""The independent roundings that `accuracy.errors_beside` needs."""


class NotNow(RuntimeError):
    """The check cannot be made, because the stream is being captured into a CUDA graph."""


def verdict(module: ModuleType, call: Call) -> Verdict:
    """Return the verdict on the class of kernels that a call runs, from the evidence, or else from the check, which
    this call then makes. Raises `NotNow` during a capture."""
    key = file.class_key(module.name, module.kernel_class(call), call)
    known = find.of(call.device).verdicts.get(key)
    if known is not None:
        return known
    if capturing():
        raise NotNow(
            f"the kernels of {module.name!r} are checked at their first use on a GPU, and this cannot be done while a "
            "CUDA graph is captured: call the layer once before the capture, or name a back-end "
            f"(backend={module.name!r})"
        )
    result = _check(module, call)
    if result.result != RIGHT:
        warnings.warn(
            f"{module.name!r} is not used for {key.partition(' ')[2]} on this GPU: its first use was {result.result} "
            f"({result.why}). Such calls go to 'eager'. Please report this; `python -m lora_kernels verify` runs these "
            "kernels again",
            RuntimeWarning,
            stacklevel=2,
        )
    new = Evidence(find.of(call.device).identity, {key: result})
    if _lasts(call.device, result):
        with contextlib.suppress(OSError):  # this process knows the verdict all the same
            find.add(call.device, new.verdicts)
    else:
        find.remember(call.device, new)
    return result


def capturing() -> bool:
    """Return whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _lasts(device: torch.device, result: Verdict) -> bool:
    """Return whether a verdict is for other processes too. One process of several that run together writes it. An error
    that leaves the device in use may have its cause in this process, such as a compiler that is missing."""
    if find.off() or os.environ.get("RANK", "0") != "0":
        return False
    return result.result != BROKEN or not _answers(device)


def _answers(device: torch.device) -> bool:
    """Return whether the device still computes."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def _check(module: ModuleType, call: Call) -> Verdict:
    """Run a pass of a back-end on small operands, and compare its results with those of plain torch."""
    M = next((rows for rows in _ROWS if rows >= call.M), _ROWS[-1])
    R = max(16, power_of_two(call.R))
    count = math.ceil(_ENOUGH / ((1 - _P) * M * R))
    if call.op.endswith(("_multi", "_experts")):
        count = 1 if call.op.endswith("_multi") else len(_RANKS_OF_EXPERTS)
    got: list[dict[str, Tensor]] = []
    want: list[dict[str, Tensor]] = []
    plain: list[dict[str, Tensor]] = []
    # Nothing that the caller has switched on may see the check or change it.
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.autocast(call.device.type, enabled=False),
        _no_saved_tensors_hooks(),
    ):
        try:
            for turn in range(count):
                problem = _problem(call, M, R, turn)
                want.append(problem.by_torch(torch.float64))
                plain.append(problem.by_torch())
                with torch.no_grad():
                    got.append(problem.by(module, call.op))
            faults = []
            for name in got[0]:
                value, exact, near = (torch.cat([each[name] for each in turns]) for turns in (got, want, plain))
                if fault := _fault(value, exact, near):
                    faults.append(f"{name}: {fault}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver may fail in any way
            first = (str(error).strip().splitlines() or ["no message"])[0]
            return Verdict(BROKEN, f"{type(error).__name__}: {first}", file.today())
    return Verdict(WRONG if faults else RIGHT, "; ".join(faults), file.today())


def _problem(call: Call, M: int, R: int, turn: int) -> _Problem | _ManyAdapters | _Experts:
    """Return the operands of one call of the check."""
    if call.op.endswith("_multi"):
        return _ManyAdapters(call)
    return _Experts(call, turn) if call.op.endswith("_experts") else _Problem(call, M, R, turn)


def _no_saved_tensors_hooks() -> AbstractContextManager[object]:
    """Return a context in which no hook of the caller's sees a saved tensor. Those of a checkpoint would count the
    tensors of the check among those of the layer. Only the innermost hooks are called, so these do nothing. Where torch
    forbids hooks, as it may in a compiled region, there are none."""
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return saved_tensors_hooks(lambda t: t, lambda t: t)
    return contextlib.nullcontext()


def _fault(value: Tensor, exact: Tensor, plain: Tensor) -> str | None:
    if not torch.isfinite(value).all():
        return "not finite"
    return accuracy.errors_beside(value, exact, plain).fault


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
        return Adapter(a, b, 0.75, _P if call.dropout else 0.0, seed)


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


class _Problem:
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
