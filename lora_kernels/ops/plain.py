"""The equations in plain torch operations, for the calls that kernels cannot serve and plain torch can.

    y = x Wᵀ + bias + s · (x̂ Aᵀ) Bᵀ                                          x̂ = dropout(x, p)
    DoRA:  y = x Wᵀ + bias + (d - 1) ⊙ (x̂ Wᵀ) + d ⊙ s · (x̂ Aᵀ) Bᵀ           d = m / ‖W + s·B A‖ by rows

These calls are

* those that torch.jit.trace or torch.export records: what is recorded is saved, and must run without this package,
* those inside a transform of torch.func (grad, vmap, jvp, ...) and with tangents of forward-mode AD, which find nothing
  to differentiate in a kernel,
* those with a nested, sparse or MKL-DNN x, whose memory no kernel reads,
* those with an x of a subclass that has a ``__torch_dispatch__`` of its own, as DTensor: it knows torch's operators.

Everything is then as in PEFT's own forward: the dtypes of all steps, autocast, and dropout, which is torch's unless the
caller gives a seed. Every tensor gets its derivative, W too. A back-end that is named never gives way to this; the
call is refused instead. Under torch.export it is recorded as the operator of that back-end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.core import dropout
from lora_kernels.core.operands import Layer
from lora_kernels.ops import check
from lora_kernels.ops.autograd import as_dtype, no_autocast
from lora_kernels.ops.dora_norm import ratio
from lora_kernels.quant import tables
from lora_kernels.quant.weight import QuantizedWeight

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether torch.export records the call. torch 2.6 does not tell; there the operator is recorded."""

_SERVE_EVERY_OPERATOR = frozenset(("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor"))
"""Subclasses of torch that serve every operator, also ours. They are named, because not every process imports them."""


def is_tracing() -> bool:
    """Return whether torch.jit.trace records the call."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def serves(name: str, x: Tensor, layer: Layer, backend: str | None) -> bool:
    """Return whether the functions below serve a call that `prepare` has found to be unusual, after a check of its
    operands. `name` is the public function, for errors.

    Raises ValueError, TypeError or RuntimeError for operands that do not fit together, and where a back-end is named
    that cannot serve such a call.
    """
    dense = x.layout is torch.strided and not x.is_nested
    differentiates = has_tangent(x, layer)
    transformed = torch._C._are_functorch_transforms_active() and not _only_functionalize()
    tracing = is_tracing()
    if backend is not None:
        _refuse_backend(name, x, backend, dense, tracing, transformed, differentiates)
        return False
    if dense and not (tracing or transformed or differentiates or is_exporting() or _dispatches(x)):
        return False
    w, a, b, scale, bias, p, seed = layer
    frozen: Tensor | QuantizedWeight = w if isinstance(w, QuantizedWeight) else w.detach()
    if isinstance(w, QuantizedWeight) and not w.checked:
        w.check()
    # torch itself checks the sizes of a nested x, which has no shape, and while it traces, where a comparison of sizes
    # gives a warning.
    if not (x.is_nested or tracing):
        any_w = isinstance(w, QuantizedWeight) or torch.is_autocast_enabled(x.device.type)
        check.operands(x, Layer(frozen, a, b, scale, bias, p, seed), any_w)
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {p}")
    recorded = tracing or is_exporting()
    if p > 0 and seed is not None and (recorded or not dense):
        what = "a call that is recorded draws a new mask in each run" if recorded else f"x is {kind_of(x)}"
        raise ValueError(f"a seed gives one mask, for the rows and columns of a dense x, and {what}: leave seed away")
    return True


def lora_linear(x: Tensor, layer: Layer) -> Tensor:
    """Return y of one layer, for an x of any layout. `serves` has checked the operands."""
    if x.layout is not torch.strided and not x.is_nested:
        return _of_a_layout(_lora_linear, x, layer)
    return _lora_linear(x, layer)


def _lora_linear(x: Tensor, layer: Layer) -> Tensor:
    """Return y as torch computes it. torch raises RuntimeError for layouts that it cannot multiply."""
    w, a, b, scale, bias, p, seed = layer
    scale, b = check.scale(scale, b)
    y = F.linear(x, dense_weight(w, x.dtype), bias)
    return as_dtype(y + _low_rank(_dropout(x, p, seed), a, b, scale), y.dtype)


def dora_linear(
    x: Tensor, layer: Layer, magnitude: Tensor, norm_of: tuple[Tensor, Tensor, float | Tensor] | None = None
) -> Tensor:
    """Return y of one DoRA layer. `serves` has checked the operands. `norm_of` is (A, B, scale) of the norm, where they
    are not the layer's."""
    if (x.is_nested and x.layout is torch.strided) or x.is_mkldnn:
        raise ValueError(
            f"x is {kind_of(x)}, and torch cannot multiply such a tensor by DoRA's d. Make a nested x with "
            "layout=torch.jagged, and call to_dense() on an MKL-DNN x"
        )
    if x.layout is not torch.strided and not x.is_nested:
        return _of_a_layout(_dora_linear, x, layer, magnitude, norm_of)
    return _dora_linear(x, layer, magnitude, norm_of)


def _dora_linear(
    x: Tensor, layer: Layer, magnitude: Tensor, norm_of: tuple[Tensor, Tensor, float | Tensor] | None
) -> Tensor:
    """Return y as torch computes it. torch raises RuntimeError for layouts that it cannot multiply."""
    w, a, b, scale, bias, p, seed = layer
    scale, b = check.scale(scale, b)
    with no_autocast(x.device.type):
        wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
        frozen = dense_weight(w, wide).detach()
        a_in, b_in, scale_in = norm_of or (a, b, scale)
        whole = frozen.to(wide) + scale_in * (b_in.detach().to(wide) @ a_in.detach().to(wide))
        norm = torch.linalg.vector_norm(whole, dim=1).to(magnitude.dtype)
        d = ratio(magnitude, norm.clamp_min(torch.finfo(magnitude.dtype).smallest_normal))
    w = dense_weight(w, x.dtype)
    x_hat = _dropout(x, p, seed)
    low = _low_rank(x_hat, a, b, scale)
    if p == 0:
        within = bias is not None and x.dtype in check.HALVES  # x Wᵀ + bias may fit where x Wᵀ overflows
        z = F.linear(x, w, bias if within else None)
        y = (z + low) * d
        return as_dtype(y if bias is None else y + (bias * (1 - d) if within else bias), z.dtype)
    y = F.linear(x, w, bias)
    return as_dtype(y + F.linear(x_hat, w) * (d - 1) + low * d, y.dtype)


def _of_a_layout(equation: Callable[..., Tensor], x: Tensor, layer: Layer, *rest: Any) -> Tensor:
    """Return the result of `equation`, one of the two functions above, for a sparse or MKL-DNN x. Raises ValueError
    with the layout and the way out where torch cannot compute it."""
    if layer.dropout_p > 0:
        raise ValueError(
            f"x is {kind_of(x)}, and torch has no dropout for such a tensor; got p = {layer.dropout_p}. Call "
            "to_dense() on x, switch dropout off with eval(), or set lora_dropout to 0"
        )
    try:
        return equation(x, layer, *rest)
    except RuntimeError as error:
        raise ValueError(
            f"x is {kind_of(x)}, {x.dtype}, {tuple(x.shape)}, and torch cannot compute a linear layer of it. Call "
            f"to_dense() on x. torch says: {str(error).partition('.')[0]}"
        ) from error


def _low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale · (x Aᵀ) Bᵀ, in the dtype of A and B."""
    return F.linear(F.linear(as_dtype(x, a.dtype), a), b) * scale


def _dropout(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """Return x̂, with torch's dropout where no seed is given."""
    if p == 0:
        return x
    if seed is None:
        return F.dropout(x, p)
    rows = x.reshape(-1, x.shape[-1])
    return dropout.dropout(rows, p, check.seed(seed, x.device)).reshape(x.shape)


def dense_weight(w: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return W, dequantised to `dtype` where it is quantised."""
    if not isinstance(w, QuantizedWeight):
        return w
    if not is_tracing():
        return _recorded(w, dtype) if is_exporting() else w.rows(0, w.shape[0], dtype)
    with warnings.catch_warnings():  # about the sizes of W, which a trace makes constants
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return _recorded(w, dtype)


def _recorded(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return W, dequantised to `dtype` by operations that TorchScript and ONNX have."""
    if w.blocksize and w.integers is None:
        return _four_bits(w).to(dtype)
    if w.codes.dtype == torch.int8 and w.format == "fp8":
        w = replace(w, codes=_fp8(w.codes))
    return w.rows(0, w.shape[0], dtype)


def _four_bits(w: QuantizedWeight) -> Tensor:
    """Return W [N, K] of nf4 or fp4 in fp32, for codes in signed or unsigned bytes. It takes more memory than
    `QuantizedWeight.rows`, which TorchScript and ONNX cannot record."""
    N, K = w.shape
    absmax = w.absmax()
    levels = torch.tensor(tables.LEVELS[w.format], dtype=torch.float32, device=w.device)  # a kept one is not recorded
    codes = w.codes.int()
    codes = torch.stack(((codes >> 4) & 15, codes & 15), -1).flatten().long()
    blocks = F.pad(levels[codes], (0, absmax.shape[0] * w.blocksize - N * K))
    return (blocks.view(-1, w.blocksize) * absmax[:, None]).flatten()[: N * K].view(N, K)


def _fp8(codes: Tensor) -> Tensor:
    """Return the values of e4m3 codes that are stored as int8, in fp32. TorchScript and ONNX know no view in another
    dtype."""
    return torch.tensor(tables.fp8_values(), dtype=torch.float32, device=codes.device)[codes.int() & 255]


def _dispatches(x: Tensor) -> bool:
    """Return whether x is of a subclass with a ``__torch_dispatch__`` of its own, except for those of torch that serve
    every operator."""
    kind = type(x)
    of_torch = kind.__module__.startswith("torch.") and kind.__name__ in _SERVE_EVERY_OPERATOR
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not of_torch


def _tensors(x: Tensor, layer: Layer) -> Iterator[Tensor]:
    w, a, b, scale, bias, _, _ = layer
    return (t for t in (x, w, a, b, scale, bias) if isinstance(t, Tensor))


def has_tangent(x: Tensor, layer: Layer) -> bool:
    """Return whether forward-mode AD has a tangent for one of the operands, outside of torch.func."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(x, layer))


def _only_functionalize() -> bool:
    """Return whether torch.func.functionalize is the only transform that is active. It sees the operators."""
    if torch.compiler.is_compiling():
        return False
    functionalize = torch._C._functorch.TransformType.Functionalize  # type: ignore[attr-defined]
    stack = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    return all(each.key() == functionalize for each in stack)


def kind_of(x: Tensor) -> str:
    """Return what kind of tensor an x is that is not dense, for errors."""
    return f"a nested tensor of layout {x.layout}" if x.is_nested else f"of layout {x.layout}"


def _refuse_backend(
    name: str, x: Tensor, backend: str, dense: bool, tracing: bool, transformed: bool, differentiates: bool
) -> None:
    """Raise where the back-end that was named cannot serve the call."""
    way_out = (
        f"With backend=None {name} computes such calls by plain torch operations, with the same results but for the "
        "bits of dropout"
    )
    if not dense:
        raise ValueError(f"x is {kind_of(x)}, which backend={backend!r} does not read. {way_out}")
    if tracing:
        raise ValueError(
            f"torch.jit.trace records plain torch operations, so that a saved trace runs without this package, and "
            f"backend={backend!r} was asked for. {way_out}. Merged layers can be traced too"
        )
    autocast = torch.is_autocast_enabled(x.device.type)
    if differentiates or (transformed and (torch.is_grad_enabled() or autocast or forward_ad._current_level >= 0)):
        raise RuntimeError(
            f"backend={backend!r} does not go with torch.func's transforms (grad, vjp, jvp, per-sample gradients) and "
            f"forward-mode AD, which find nothing to differentiate in it, nor with vmap under autocast. {way_out}"
        )
