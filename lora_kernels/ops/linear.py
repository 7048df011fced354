"""`lora_linear`: the door, the autograd Function behind it, and the two registered operators that the Function calls.

    door (checks, autocast, flatten) → LoRALinearFunction → torch.ops.lora_kernels.{forward, backward}
    → dispatch.pick → a back-end

The operators are opaque to ``torch.compile`` and take no part in autograd themselves; the Function does. Either is left
out of a call that has no use for it: the Function where no gradient is wanted, an operator where nobody would see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Adapter, Base, Call, Needs, call_of
from lora_kernels.ops import check
from lora_kernels.ops.tracing import (
    as_autocast_asks,
    as_dtype,
    device_type,
    no_autocast,
    no_graph,
    refuse_double_backward,
    refuse_transforms,
    watched,
)
from lora_kernels.quant import weight as quant
from lora_kernels.quant.weight import QuantizedWeight

_library = torch.library.Library("lora_kernels", "DEF")
# With a quantised weight w is its codes, and its other parts stand last.
_QUANTISED = 'Tensor[]? w_scales=None, str w_format="dense", int w_blocksize=0'
_library.define(
    "forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, float p, Tensor? seed, "
    f"str? backend, bool save_h, {_QUANTISED}) -> (Tensor y, Tensor h)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor w, Tensor a, Tensor b, Tensor? h, float scale, float p, Tensor? seed, "
    f"str? backend, bool need_dx, bool need_da, bool need_db, {_QUANTISED}) -> (Tensor dx, Tensor da, Tensor db)"
)
_library.define("keep_mask(Tensor x, float p, Tensor seed, str? backend) -> Tensor")
_library.define("base_gemm(Tensor x, Tensor w, str? backend) -> Tensor")


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ, in one call, with gradients for x, A, B and bias. W is frozen.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685).

    Args:
        x: [..., K], fp64, fp32, fp16 or bf16. M is the product of its leading dimensions, 0 included.
        weight: W [N, K], in x's dtype; must not require a gradient. Or a `QuantizedWeight` of 4 or 8 bits, beside an x
            of any dtype. It is dequantised in pieces, within the products; on a GPU, for many rows of x, as a whole
            into memory that is free again after the call.
        lora_a: A [R, K], in x's dtype, or fp32 beside an fp16 or bf16 x (its gradient is then fp32, not rounded through
            x's dtype).
        lora_b: B [N, R], in A's dtype.
        scale: s, α/R for plain LoRA and α/√R for rsLoRA; finite. A tensor of one element stays on its device (s·B is
            then formed in B's dtype, and the gradient reaches `scale` if it wants one).
        bias: [N], in x's dtype.
        dropout_p: p in [0, 1): the probability with which an element of x is dropped in the low-rank branch. Applied
            whenever it is above 0; there is no training flag here.
        seed: of the mask: an int in [0, 2⁶³) or an int64 tensor of one element on x's device. Drawn from torch's
            generator of x's device where None. The mask is a function of (seed, row, column), the same in every
            back-end.
        backend: the name of a back-end, which then serves the call or raises; None for the automatic choice (see
            `explain`).

    Under autocast x, weight and bias are converted to its dtype, and fp32 A and B are left as they are.

    Returns:
        y [..., N], in x's dtype, contiguous.

    Raises:
        TypeError: for dtypes other than the above, or a `seed` or `scale` that is no number.
        ValueError: for shapes that do not fit together, operands on different devices, a weight that requires a
            gradient, p outside [0, 1), a scale that is not finite, or a named back-end that is unknown or cannot serve
            the call (with all its reasons).
        RuntimeError: from autograd, on double backward; in torch.func's transforms that differentiate.
    """
    autocast, x, bias, lora_a, lora_b = as_autocast_asks(x, bias, lora_a, lora_b)
    w: Any = weight
    w_scales: tuple[Tensor, ...]
    w_format, w_blocksize, w_scales = "dense", 0, ()
    if isinstance(weight, QuantizedWeight):
        if not weight.checked:
            weight.check()
        w, w_format, w_blocksize, w_scales = weight.codes, weight.format, weight.blocksize, weight.tensors[1:]
    check.operands(x, weight, lora_a, lora_b, bias, dropout_p, autocast or w is not weight)
    scale, lora_b = check.scale(scale, lora_b)
    seed = check.seed(seed, x.device) if dropout_p > 0 else None
    refuse_transforms("lora_linear")

    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    how = (scale, dropout_p, backend, w_format, w_blocksize)
    if autocast:
        with torch.autocast(x.device.type, enabled=False):
            y = LoRALinearFunction.apply(rows, w, lora_a, lora_b, bias, seed, how, *w_scales)
    elif _recorded(rows, lora_a, lora_b, bias):
        y = LoRALinearFunction.apply(rows, w, lora_a, lora_b, bias, seed, how, *w_scales)
    else:
        base, adapter = Base(weight, bias), Adapter(lora_a, lora_b, scale, dropout_p, seed)
        y, _ = _forward(rows, base, adapter, backend, False)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def explain(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Which back-end `lora_linear` would run for these operands, and every reason why each other one was passed over.

    Takes what `lora_linear` takes, but for scale and seed, and raises what it raises; computes nothing.
    """
    check.operands(x, weight, lora_a, lora_b, bias, dropout_p, isinstance(weight, QuantizedWeight))
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return dispatch.explain(
        call_of("forward", rows, Base(weight, bias), Adapter(lora_a, lora_b, 1.0, dropout_p)), backend
    )


class LoRALinearFunction(torch.autograd.Function):
    """Saves x only if A needs a gradient, h [M,R] only if B does, the seed, and references to w, a, b: no mask, no
    x̂."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        how: tuple[float, float, str | None, str, int],
        *w_scales: Tensor,
    ) -> Tensor:
        """y. `how` is (scale, p, backend, w_format, w_blocksize): torch's own work grows with the arguments."""
        scale, p, backend, w_format, w_blocksize = how
        _, _, need_da, need_db, *_ = ctx.needs_input_grad
        # Under autocast w comes in its own dtype and is converted here and again in the backward, so that no copy of it
        # is saved.
        weight = _whole(w, w_scales, w_format, w_blocksize, x.dtype)
        y, h = _forward(x, Base(weight, bias), Adapter(a, b, scale, p, seed), backend, need_db)
        ctx.save_for_backward(x if need_da else None, w, a, b, h if need_db else None, seed, *w_scales)
        ctx.dtype, ctx.how = x.dtype, how
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx, da, db and dbias: of these only what is asked."""
        x, w, a, b, h, seed, *w_scales = ctx.saved_tensors
        need_dx, _, need_da, need_db, need_dbias, *rest = ctx.needs_input_grad
        (scale, p, backend, w_format, w_blocksize), dtype = ctx.how, ctx.dtype
        dx = da = db = dbias = None
        with no_graph(), no_autocast(device_type(dy)):
            dy = as_dtype(dy, dtype)
            if need_dx or need_da or need_db:
                weight = _whole(w, w_scales, w_format, w_blocksize, dtype)
                needs = Needs(need_dx, (need_da,), (need_db,))
                dx, da, db = _backward(dy, x, Base(weight), Adapter(a, b, scale, p, seed), h, needs, backend)
            if need_dbias:
                dbias = dy.sum(0)
        grads = (dx if need_dx else None, None, da if need_da else None, db if need_db else None, dbias)
        return *refuse_double_backward("lora_linear", grads), *[None] * len(rest)


def _whole(
    w: Tensor, w_scales: Sequence[Tensor] | None, w_format: str, w_blocksize: int, dtype: torch.dtype
) -> Tensor | QuantizedWeight:
    """The weight of a Function's or an operator's arguments, in `dtype`."""
    if w_format == "dense":
        return as_dtype(w, dtype)
    return quant.assemble(w, w_scales or (), w_format, w_blocksize, dtype)


def _last(w: Tensor | QuantizedWeight) -> tuple[()] | tuple[list[Tensor], str, int]:
    """The operators' last arguments, which a dense weight leaves out."""
    return (list(w.tensors[1:]), w.format, w.blocksize) if isinstance(w, QuantizedWeight) else ()


def _recorded(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has any use for the Function: for a gradient, or to refuse forward-mode AD, which torch.no_grad
    does not switch off."""
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and (x.requires_grad or a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad))
    )


def _forward(
    x: Tensor, base: Base, adapter: Adapter, backend: str | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, h) of the back-end that serves the call, through the operator where that is watched. h is of no use unless
    `save_h`."""
    (w, bias), (a, b, scale, p, seed) = base, adapter
    codes = w.codes if isinstance(w, QuantizedWeight) else w
    if watched(x, codes, a, b, bias):
        return _forward_op(x, codes, a, b, bias, scale, p, seed, backend, save_h, *_last(w))
    (y,), (h,) = _serving("forward", x, base, adapter, backend).forward(x, [base], [adapter], [save_h])
    return y, h


def _backward(
    dy: Tensor,
    x: Tensor | None,
    base: Base,
    adapter: Adapter,
    h: Tensor | None,
    needs: Needs,
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, da, db) likewise."""
    w, (a, b, scale, p, seed) = base.w, adapter
    codes = w.codes if isinstance(w, QuantizedWeight) else w
    # a gradient of several at once (is_grads_batched, a vectorised Jacobian) has no address of its own
    if watched(dy, codes, a, b, x) or torch._C._functorch.is_legacy_batchedtensor(dy):
        asked = (needs.dx, needs.da[0], needs.db[0])
        return _backward_op(dy, x, codes, a, b, h, scale, p, seed, backend, *asked, *_last(w))
    dx, (da,), (db,) = _serving("backward", dy, base, adapter, backend).backward([dy], x, [base], [adapter], [h], needs)
    return dx, da, db


def _serving(op: str, rows: Tensor, base: Base, adapter: Adapter, backend: str | None) -> ModuleType:
    return dispatch.pick(call_of(op, rows, base, adapter), backend)


def keep_mask(x: Tensor, p: float, seed: Tensor, backend: str | None) -> Tensor:
    """The dropout mask of x [M, K] as numbers 0 and 1 in x's dtype, by the back-end that would serve a layer over x."""
    return (_keep_mask_op if watched(x, x, x, x, None) else _run_keep_mask)(x, p, seed, backend)


def base_gemm(x: Tensor, w: Tensor, backend: str | None) -> Tensor:
    """x Wᵀ [M, N], by the back-end that would serve a layer over W."""
    return (_base_gemm_op if watched(x, w, x, x, None) else _run_base_gemm)(x, w, backend)


def _run_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str | None,
    save_h: bool,
    w_scales: Sequence[Tensor] | None = None,
    w_format: str = "dense",
    w_blocksize: int = 0,
) -> tuple[Tensor, Tensor]:
    weight = _whole(w, w_scales, w_format, w_blocksize, x.dtype)
    base, adapter = Base(weight, bias), Adapter(a, b, scale, p, seed)
    (y,), (h,) = _serving("forward", x, base, adapter, backend).forward(x, [base], [adapter], [save_h])
    return y, or_empty(h, x)


def _run_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    backend: str | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    w_scales: Sequence[Tensor] | None = None,
    w_format: str = "dense",
    w_blocksize: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = _whole(w, w_scales, w_format, w_blocksize, dy.dtype)
    base, adapter, needs = Base(weight), Adapter(a, b, scale, p, seed), Needs(need_dx, (need_da,), (need_db,))
    serving = _serving("backward", dy, base, adapter, backend)
    dx, (da,), (db,) = serving.backward([dy], x, [base], [adapter], [h], needs)
    return or_empty(dx, dy), or_empty(da, a), or_empty(db, b)


def _run_keep_mask(x: Tensor, p: float, seed: Tensor, backend: str | None) -> Tensor:
    call = Call("backward", x.device, x.dtype, x.dtype, x.shape[0], 8, x.shape[1], 1, True)
    return dispatch.pick(call, backend).keep_mask(x, p, seed)


def _run_base_gemm(x: Tensor, w: Tensor, backend: str | None) -> Tensor:
    call = Call("forward", x.device, x.dtype, x.dtype, x.shape[0], w.shape[0], w.shape[1], 1, False)
    return dispatch.pick(call, backend).base_gemm(x, w)


def _fake_keep_mask(x, p, seed, backend):  # type: ignore
    return x.new_empty(x.shape)


def _fake_base_gemm(x, w, backend):  # type: ignore
    return x.new_empty(x.shape[0], w.shape[0])


def _fake_forward(x, w, a, b, bias, scale, p, seed, backend, save_h, *quantised, **named):  # type: ignore
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[0]) if save_h else x.new_empty(0)


def _fake_backward(  # type: ignore
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db, *quantised, **named
):
    return (
        dy.new_empty(dy.shape[0], a.shape[1]) if need_dx else dy.new_empty(0),
        a.new_empty(a.shape) if need_da else a.new_empty(0),
        b.new_empty(b.shape) if need_db else b.new_empty(0),
    )


for _name, _run, _fake in (
    ("forward", _run_forward, _fake_forward),
    ("backward", _run_backward, _fake_backward),
    ("keep_mask", _run_keep_mask, _fake_keep_mask),
    ("base_gemm", _run_base_gemm, _fake_base_gemm),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
_forward_op = torch.ops.lora_kernels.forward.default
_backward_op = torch.ops.lora_kernels.backward.default
_keep_mask_op = torch.ops.lora_kernels.keep_mask.default
_base_gemm_op = torch.ops.lora_kernels.base_gemm.default


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors: one of no elements stands for what was not asked for."""
    return like.new_empty(0) if t is None else t
