"""The checks of a call's operands. Every error names the values that are at fault."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_kernels.core.operands import Layer

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


def operands(x: Tensor, layer: Layer, any_w: bool) -> None:
    """Raise TypeError or ValueError where x and a layer's operands do not fit together, or p is no probability below 1.
    `any_w` allows W another dtype of `DTYPES` than x's.

    All conditions stand in one expression, so that a call that is right takes little time. `_complain` finds out which
    of them does not hold.
    """
    w, a, b, _, bias, p, _ = layer
    dtype, adapter_dtype = x.dtype, a.dtype
    x_shape, w_shape, a_shape, b_shape = x.shape, w.shape, a.shape, b.shape
    if (
        dtype in DTYPES
        and (w.dtype == dtype or (any_w and w.dtype in DTYPES))
        and (adapter_dtype == dtype or (adapter_dtype == torch.float32 and dtype in HALVES))
        and b.dtype == adapter_dtype
        and ((x.is_cpu and w.is_cpu and a.is_cpu and b.is_cpu) or w.device == a.device == b.device == x.device)
        and x_shape
        and len(w_shape) == len(a_shape) == len(b_shape) == 2
        and x_shape[-1] == w_shape[1] == a_shape[1] != 0
        and w_shape[0] == b_shape[0] != 0
        and a_shape[0] == b_shape[1] != 0
        and 0 <= p < 1
        and (bias is None or (bias.dtype == dtype and bias.device == x.device and bias.shape == w_shape[:1]))
    ):
        return
    _complain(x, layer, any_w)


def _complain(x: Tensor, layer: Layer, any_w: bool) -> None:
    """Raise the error of operands that do not fit together."""
    w, a, b, bias, p = layer.weight, layer.lora_a, layer.lora_b, layer.bias, layer.dropout_p
    operands: dict[str, Any] = {"x": x, "weight": w, "lora_a": a, "lora_b": b} | (
        {} if bias is None else {"bias": bias}
    )
    _refuse_shards(operands)
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in operands.items())
    dtypes = ", ".join(f"{name} {t.dtype}" for name, t in operands.items())
    if x.dtype not in DTYPES:
        codes = x.dtype == torch.int8 and not isinstance(w, Tensor)
        why = ". Perhaps x was converted to the dtype of a quantised layer's codes: take layer.weight_dtype" * codes
        raise TypeError(f"x must be fp64, fp32, fp16 or bf16; got {dtypes}{why}")
    if any_w and w.dtype not in DTYPES:
        raise TypeError(
            f"weight must be fp64, fp32, fp16 or bf16, or a QuantizedWeight (quantize_weight); got {dtypes}"
        )
    if w.dtype != x.dtype and not any_w:
        raise TypeError(f"weight must have x's dtype; got {dtypes}. Convert x, or run under torch.autocast")
    if bias is not None and bias.dtype != x.dtype:
        if bias.dtype not in DTYPES:
            raise TypeError(f"bias must be fp64, fp32, fp16 or bf16; got {dtypes}. Dequantise or convert the bias")
        raise TypeError(
            f"bias must have x's dtype; got {dtypes}. Convert the bias once, with "
            f"layer.bias.data = layer.bias.data.to({x.dtype}) for example"
        )
    if a.dtype != b.dtype or (a.dtype != x.dtype and not (a.dtype == torch.float32 and x.dtype in HALVES)):
        raise TypeError(
            f"lora_a and lora_b must both have x's dtype, or both fp32 beside an fp16 or bf16 x; got {dtypes}"
        )
    if len({t.device for t in operands.values()}) > 1:
        raise ValueError(
            "operands lie on different devices: " + ", ".join(f"{name} on {t.device}" for name, t in operands.items())
        )
    if x.dim() < 1 or len(w.shape) != 2 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"x must be [..., K], weight [N, K], lora_a [R, K], lora_b [N, R]; got {shapes}")
    if x.shape[-1] != w.shape[1] or a.shape[1] != w.shape[1]:
        raise ValueError(f"x, weight and lora_a differ in K, their last dimension; got {shapes}")
    if b.shape[0] != w.shape[0] or (bias is not None and bias.shape != w.shape[:1]):
        raise ValueError(f"weight, lora_b and bias differ in N, their first dimension; got {shapes}")
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"lora_a's first and lora_b's last dimension are the rank, but they differ; got {shapes}")
    if 0 in (*w.shape, a.shape[0]):
        raise ValueError(f"N, K and the rank must be at least 1; got {shapes}")
    raise ValueError(f"dropout_p must lie in [0, 1), got {p}")


def _refuse_shards(operands: dict[str, Any]) -> None:
    """Raise ValueError where an operand is the part of a parameter that another library has left on this process."""
    for name, t in operands.items():
        if hasattr(t, "ds_shape") and t.numel() == 0:
            raise ValueError(
                f"{name} has no elements, because DeepSpeed ZeRO-3 has partitioned it; its shape is "
                f"{tuple(t.ds_shape)}. Call its module, whose hooks gather it, or call under "
                "deepspeed.zero.GatheredParameters"
            )
        if getattr(t, "_fsdp_flattened", False) and t.dim() < 2 and name != "bias":
            raise ValueError(
                f"{name} is a shard of FullyShardedDataParallel, {tuple(t.shape)}. Call the wrapped model, whose "
                "forward gathers it, or call under FullyShardedDataParallel.summon_full_params"
            )


def frozen(w: Tensor) -> Tensor:
    """Return a W that requires a gradient as a constant, if its owner has frozen it and FSDP has not kept that. Raises
    ValueError for any other W, because none of the operators gives a gradient for it.

    FullyShardedDataParallel with use_orig_params=True puts frozen and trained parameters of a module into one flat
    parameter, which is trained. In a forward the module's parameters are views of it, and w is one of these, or a part
    of one: a slice of rows, or the transposed weight of a Conv1D.
    """
    flat: Any = None if torch.compiler.is_compiling() else w._base
    if getattr(flat, "_is_flat_param", False):
        for parameter, view in zip(flat._params or (), flat._tensors or (), strict=False):
            if view is not None and not parameter.requires_grad and _lies_in(w, view):
                return w.detach()
    cause = "" if w.grad_fn is None else f", because it is computed from a tensor that does ({w.grad_fn.name()})"
    raise ValueError(
        f"weight {tuple(w.shape)} requires a gradient{cause}, and none is computed for it here, because W is frozen. "
        "Call weight.requires_grad_(False) before the model is wrapped, or pass weight.detach()"
    )


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    """Return whether the memory of a view, `part`, is inside that of another view of the same tensor. `whole` is
    contiguous."""
    first = part.storage_offset() - whole.storage_offset()
    last = first + sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    return first >= 0 and last < whole.numel()


def operator(rows: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Raise TypeError where the dtypes of an operator's operands are not those that the back-ends expect. `rows` is x
    or dy, and w is dense. The public functions have converted their operands; others may call an operator as well."""
    dtype = rows.dtype
    fit = dtype in DTYPES and w.dtype == dtype and (bias is None or bias.dtype == dtype) and a.dtype == b.dtype
    if not fit or (a.dtype != dtype and not (a.dtype == torch.float32 and dtype in HALVES)):
        others = "" if bias is None else f", bias {bias.dtype}"
        got = f"x or dy {dtype}, weight {w.dtype}, lora_a {a.dtype}, lora_b {b.dtype}{others}"
        raise TypeError(
            "an operator of lora_kernels takes x, dy, weight and bias in one floating dtype, and lora_a and lora_b in "
            f"the same, or fp32 beside 16 bits; got {got}"
        )


def seed(given: Tensor | int, device: torch.device) -> Tensor:
    """Return the seed as the back-ends take it: an int64 tensor of one element on `device`. Raises TypeError or
    ValueError for anything that is no such seed."""
    if isinstance(given, Tensor):
        if given.dtype != torch.int64 or given.numel() != 1 or given.device != device:
            raise ValueError(
                f"seed must be an int64 tensor of one element on {device}, "
                f"got {given.dtype}, shape {tuple(given.shape)}, on {given.device}"
            )
        return given
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {type(given).__name__}")
    if not 0 <= given < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63), got {given}")
    return torch.tensor(given, dtype=torch.int64, device=device)


def scale(given: float | Tensor, lora_b: Tensor) -> tuple[float, Tensor]:
    """Return (s, B), where s is a finite float.

    The value of a tensor on the CPU that requires no gradient is read, outside of transforms and compilers. Any other
    tensor is multiplied into B, in B's dtype, and s is then 1: reading its value would synchronise with the device, and
    autograd would not give the tensor its gradient. A float that changes from call to call becomes a symbol
    under torch.compile. An operator would fix the value in the compiled code, which would be compiled again for every
    value, so a symbol is multiplied into B too.

    A number of another type, such as an int or a Fraction, is converted to a float.

    Raises ValueError for a scale that is not finite, or a tensor that is not floating or has several elements;
    TypeError for one that no float can stand for.
    """
    if isinstance(given, Tensor):
        if given.numel() != 1 or given.dtype not in DTYPES:
            raise ValueError(
                "a tensor scale must be fp64, fp32, fp16 or bf16 and have one element, "
                f"got {given.dtype}, shape {tuple(given.shape)}"
            )
        known = given.is_cpu and not given.requires_grad and type(given) in (Tensor, Parameter)
        if known and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _is_traced()):
            return _finite(given.item()), lora_b
        # Without dimensions it does not change the dtype of the product, and a CPU does not round it to that dtype.
        return 1.0, lora_b * given.reshape(())
    _finite(given)
    if torch.compiler.is_compiling():
        from torch.fx.experimental import symbolic_shapes  # heavy to import, and loaded already while compiling

        # torch 2.8 and later have this function. Before, a scale that has changed costs a recompilation.
        if hasattr(symbolic_shapes, "has_static_value") and not symbolic_shapes.has_static_value(given):
            return 1.0, lora_b * given
    return given if isinstance(given, float) else float(given), lora_b


def _is_traced() -> bool:
    """Return whether torch.jit.trace or a mode records the call, so that a value that is read would be a constant of
    the record."""
    return torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def _finite(s: float) -> float:
    """Return s. Raises ValueError unless it is finite."""
    if not abs(s) < float("inf"):  # math.isfinite breaks torch.compile
        raise ValueError(f"scale must be finite, got {s}")
    return s
