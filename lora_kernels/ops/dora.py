"""`dora_linear`: weight-decomposed LoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024,
arXiv:2402.09353) by the operators of `lora_kernels.ops.linear`.

    n = ‖W + s·B A‖ by rows, a constant for autograd          d = m / n
    p = 0:  z = x Wᵀ + s·h Bᵀ,  h = x Aᵀ                      y = d ⊙ z + bias
    p > 0:  u = x̂ Wᵀ,  B' = d ⊙ B,  h = x̂ Aᵀ                  y = x Wᵀ + bias + s·h B'ᵀ + (d - 1) ⊙ u

Dropout acts on the whole of what DoRA adds, so there it takes a second base GEMM each way.

The norm is factored (arXiv:2603.22276), with nothing of W's size beside W:

    n² = ‖W‖² + rowsum((2s·W Aᵀ + s²·B (A Aᵀ)) ⊙ B)

W' = 0 in a row would need cancellation in this sum: n² is kept at or above eps·‖W‖² (eps of the dtype it is summed in),
so that d stays finite. Above it n's relative error is about eps·‖W‖² / n²: all digits are there unless B A takes away
most of a row of W.

The gradient to m needs Σₘ dy ⊙ z (or u), so z or u is what is saved beside LoRA's x and h. The other ways cost more:
Σₘ dy ⊙ (x Wᵀ) = rowsum((dyᵀ x) ⊙ W) is a GEMM of the base's size, as is computing z again; and z = (y - bias) / d is
inexact, fails for d = 0, and would break where y is later changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.core import dropout as random
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.ops import check
from lora_kernels.ops import linear as ops
from lora_kernels.ops.tracing import as_autocast_asks, no_autocast, no_graph, refuse_double_backward, refuse_transforms

_WEIGHT_ROWS = 512
"""Rows of a 16-bit W converted to fp32 at a time."""

_BLOCK = {"cpu": 1 << 18}
"""Elements of dy multiplied by z at a time: on a CPU what stays in its cache."""

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define("dora_norm(Tensor w, Tensor a, Tensor b, float scale, Tensor? weight_norm_sq) -> Tensor")


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    weight_norm_sq: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ scale·(x̂ Aᵀ) Bᵀ with d = m / ‖W + scale·B A‖ by rows and
    x̂ = dropout(x): gradients for x, A, B, m and bias. W is frozen, and the norm is a constant for autograd.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv:2402.09353), section 4.3.

    Args:
        x, weight, lora_a, lora_b, scale, bias, dropout_p, seed, backend: as for `lora_linear`.
        magnitude: m [N], in A's dtype or fp32 (fp64 beside an fp64 A). The norm is rounded to m's dtype, so that
            m = `weight_norm` gives d = 1 exactly.
        weight_norm_sq: ‖W‖² by rows [N], fp32 or fp64, where the caller keeps it; computed where None. Not checked
            against `weight`.

    Returns:
        y [..., N], in x's dtype, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`; TypeError for a magnitude of another dtype, ValueError
            for a magnitude or weight_norm_sq that is not [N] on x's device.
    """
    autocast, x, bias, lora_a, lora_b = as_autocast_asks(x, bias, lora_a, lora_b)
    if autocast and magnitude.dtype in check.HALVES:
        magnitude = magnitude.to(lora_a.dtype)
    check.operands(x, weight, lora_a, lora_b, bias, dropout_p, autocast)
    _check_rows(weight, lora_a, magnitude, weight_norm_sq)
    scale, lora_b = check.scale(scale, lora_b)
    seed = check.seed(seed, x.device) if dropout_p > 0 else None
    refuse_transforms("dora_linear")

    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    with no_autocast(x.device.type):
        norm = _dora_norm(weight, lora_a.detach(), lora_b.detach(), scale, weight_norm_sq)
        d = ratio(magnitude, norm)
        operands = (rows, weight, lora_a, lora_b, d, bias, scale, dropout_p, seed, backend)
        recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
        y = DoRALinearFunction.apply(*operands) if recorded else _forward(*operands, False, False)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


class DoRALinearFunction(torch.autograd.Function):
    """Of (x, w, a, b, d, bias, ...). Saves x only if A needs a gradient, h [M,R] only if B does (with dropout: or d),
    z or u [M,N] only if d does, the seed, and references to w, a, b, d: no mask, no x̂."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        d: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        seed: Tensor | None,
        backend: str | None,
    ) -> Tensor:
        """y, through the registered operators."""
        _, _, need_da, need_db, need_dd, *_ = ctx.needs_input_grad
        save_h = need_db or (need_dd and p > 0)
        y, h, z = _forward(x, w, a, b, d, bias, scale, p, seed, backend, save_h, need_dd)
        ctx.save_for_backward(x if need_da else None, w, a, b, d, h if save_h else None, z if need_dd else None, seed)
        ctx.dtype, ctx.scale, ctx.p, ctx.backend = x.dtype, scale, p, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx, da, db, dd and dbias: of these only what is asked."""
        x, w, a, b, d, h, z, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with no_graph(), no_autocast(dy.device.type):
            dy = dy.to(ctx.dtype)
            run = _backward_dropout if ctx.p > 0 else _backward
            gradients = run(
                dy, x, w.to(ctx.dtype), a, b, d, h, z, ctx.scale, ctx.p, seed, ctx.backend, needs[0], *needs[2:5]
            )
            dbias = dy.sum(0) if needs[5] else None
        asked = (needs[0], *needs[2:5])
        dx, da, db, dd = (t if need else None for t, need in zip(gradients, asked, strict=True))
        grads = (dx, None, da, db, dd, dbias)
        return *refuse_double_backward("dora_linear", grads), None, None, None, None


def _forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str | None,
    save_h: bool,
    save_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h, z or u). What is not to be saved is worked on in place."""
    w = w.to(x.dtype)  # under autocast; here and again in the backward, so that no copy of it is saved
    if p == 0:
        z, h = ops._forward(x, Base(w), Adapter(a, b, scale), backend, save_h)
        factor = d.to(x.dtype)
        y = z * factor if save_z or torch.compiler.is_compiling() else z.mul_(factor)
        return y if bias is None else _plus(y, bias), h, z
    assert seed is not None
    y, h = ops._forward(x, Base(w, bias), Adapter(a, _scaled_rows(b, d), scale, p, seed), backend, save_h)
    u = ops.base_gemm(ops.keep_mask(x, p, seed, backend).mul_(x), w, backend)  # x̂ = c·keep ⊙ x: c goes with d - 1
    excess = _excess(d, p, x.dtype)
    return _plus(y, u * excess if save_z else u.mul_(excess)), h, u


def _backward(dy, x, w, a, b, d, h, z, scale, p, seed, backend, need_dx, need_da, need_db, need_dd):  # type: ignore
    dd = _column_dot(dy, z) if need_dd else None
    dx = da = db = None
    if need_dx or need_da or need_db:
        dz = dy * d.to(dy.dtype)
        needs = Needs(need_dx, (need_da,), (need_db,))
        dx, da, db = ops._backward(dz, x, Base(w), Adapter(a, b, scale), h, needs, backend)
    return dx, da, db, None if dd is None else dd.to(d.dtype)


def _backward_dropout(dy, x, w, a, b, d, h, u, scale, p, seed, backend, need_dx, need_da, need_db, need_dd):  # type: ignore
    dx = da = db = dd = None
    if need_dx or need_da or need_db or need_dd:
        needs = Needs(need_dx, (need_da,), (need_db or need_dd,))
        adapter = Adapter(a, _scaled_rows(b, d), scale, p, seed)
        dx, da, low = ops._backward(dy, x, Base(w), adapter, h, needs, backend)
        if need_dd:  # Σₘ dy ⊙ (u + s·h Bᵀ), and s·dyᵀ h is the operator's db
            dd = torch.add((low * b).sum(1, dtype=d.dtype), _column_dot(dy, u), alpha=random.rescale(p)).to(d.dtype)
        if need_db:
            assert low is not None
            db = _scaled_rows(low, d)
    if need_dx:
        assert dx is not None
        part = ops.base_gemm(dy * _excess(d, p, dy.dtype), w.t(), backend)
        dx += part.mul_(ops.keep_mask(part, p, seed, backend))
    return dx, da, db, dd


def _plus(y: Tensor, t: Tensor) -> Tensor:
    """y + t, in place but for a compiler: where the result of a Function was changed in place, the code that torch 2.11
    makes gives gradients of zero. It fuses the sum anyway."""
    return y + t if torch.compiler.is_compiling() else y.add_(t)


def _scaled_rows(b: Tensor, d: Tensor) -> Tensor:
    """d ⊙ B [N,R], in B's dtype."""
    return (b * d[:, None]).to(b.dtype)


def _excess(d: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """c·(d - 1) [N]: the difference is formed before it is rounded to 16 bits."""
    return ((d - 1) * random.rescale(p)).to(dtype)


def _column_dot(u: Tensor, v: Tensor) -> Tensor:
    """Σₘ u ⊙ v [N], summed in fp32 at least. In blocks of rows, so that nothing of size M×N is allocated; a compiler
    fuses the whole."""
    wide = torch.promote_types(u.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (u.to(wide) * v.to(wide)).sum(0)
    M, N = u.shape
    rows = max(1, _BLOCK.get(u.device.type, 1 << 24) // N)
    out = u.new_zeros(N, dtype=wide)
    for m in range(0, M, rows):
        out += (u[m : m + rows].to(wide) * v[m : m + rows].to(wide)).sum(0)
    return out


# --- the norm ---


def weight_norm(
    w: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, weight_norm_sq: Tensor | None = None
) -> Tensor:
    """‖W + scale·B A‖ by rows [N], in the dtype of `magnitude`: the magnitude with which d = 1."""
    return _rounded(_dora_norm(w, a.detach(), b.detach(), scale, weight_norm_sq), magnitude)


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """d = m / n, in fp32 at least."""
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(wide) / _rounded(norm, magnitude).to(wide)


def _rounded(norm: Tensor, magnitude: Tensor) -> Tensor:
    """n in m's dtype, where a row of zeros has the smallest normal number: its d is 0, not 0/0."""
    return norm.to(magnitude.dtype).clamp_min(torch.finfo(magnitude.dtype).smallest_normal)


def _run_norm(w: Tensor, a: Tensor, b: Tensor, scale: float, weight_norm_sq: Tensor | None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    square = w.new_empty(w.shape[0], dtype=wide) if weight_norm_sq is None else weight_norm_sq.to(wide)
    low = torch.empty_like(b, memory_format=torch.contiguous_format)
    for rows in _blocks(w, wide):
        block = w[rows].to(wide)
        torch.mm(block, a.t(), out=low[rows])
        if weight_norm_sq is None:
            square[rows] = torch.linalg.vector_norm(block, dim=1).square_()
    low = torch.addmm(low, b, a @ a.t(), beta=2 * scale, alpha=scale * scale)
    norm_sq = (low * b).sum(1).add_(square)
    return torch.maximum(norm_sq, square * torch.finfo(wide).eps).sqrt_()


def _fake_norm(w, a, b, scale, weight_norm_sq):  # type: ignore
    return w.new_empty(w.shape[0], dtype=torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32))


_library.impl("dora_norm", _run_norm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::dora_norm", _fake_norm, lib=_library)
_dora_norm = torch.ops.lora_kernels.dora_norm.default


def _blocks(w: Tensor, wide: torch.dtype) -> list[slice]:
    """Of the rows of W: all at once where nothing is converted."""
    step = w.shape[0] if w.dtype == wide else _WEIGHT_ROWS
    return [slice(n, n + step) for n in range(0, w.shape[0], step)]


class WeightNorms:
    """‖W‖² by rows, kept for as long as `weight` holds the same numbers.

    They count as the same while the storage, its version (``Tensor._version``, which every in-place update raises),
    the view of it and the dtype are the same: loading, merging, ``.to()`` and in-place updates all show. The storage is
    held weakly: the cache keeps no old weight in memory, and a new one at the same address is told from it. What
    PyTorch itself does not count, a write through ``weight.data`` or NumPy's view, does not show: `clear` is there for
    it.

    A copy or an unpickled one starts empty. Under ``torch.compile``, during the capture of a CUDA graph, and for
    inference tensors and tensor subclasses nothing is kept and `of` is None: the norm is then computed each time.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget."""
        self._storage: Any = None
        self._key: object = None
        self._value: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor | None:
        """‖W‖² [N], in fp32 at least."""
        if (
            torch.compiler.is_compiling()
            or type(weight) not in (Tensor, torch.nn.Parameter)
            or weight.is_meta
            or weight.is_inference()
            or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return None
        storage = weight.untyped_storage()
        key = (weight._version, weight.dtype, weight.storage_offset(), weight.shape, weight.stride())
        if self._storage is None or self._storage.cdata != storage._cdata or self._key != key:
            self._value, self._key, self._storage = _norm_sq(weight.detach()), key, StorageWeakRef(storage)
        return self._value

    def __deepcopy__(self, memo: object) -> WeightNorms:
        return WeightNorms()

    def __reduce__(self) -> tuple[type[WeightNorms], tuple[()]]:
        return WeightNorms, ()


def _norm_sq(w: Tensor) -> Tensor:
    wide = torch.promote_types(w.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(w[rows].to(wide), dim=1) for rows in _blocks(w, wide)]
    return torch.cat(norms).square_()


def _check_rows(w: Tensor, a: Tensor, magnitude: Tensor, weight_norm_sq: Tensor | None) -> None:
    for name, t in (("magnitude", magnitude), ("weight_norm_sq", weight_norm_sq)):
        if t is not None and (t.shape != w.shape[:1] or t.device != w.device):
            raise ValueError(
                f"{name} must be [N], a number for each row of weight {tuple(w.shape)} on {w.device}; "
                f"got {tuple(t.shape)} on {t.device}"
            )
    if magnitude.dtype not in (a.dtype, torch.float32) or (a.dtype == torch.float64 != magnitude.dtype):
        raise TypeError(f"magnitude must have lora_a's dtype ({a.dtype}), or fp32; got {magnitude.dtype}")
