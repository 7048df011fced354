"""`from_bnb`: the weight of a layer that bitsandbytes has quantised, as a `QuantizedWeight`.

bitsandbytes itself is not imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.quant import tables
from lora_kernels.quant.encode import NESTED_BLOCKSIZE
from lora_kernels.quant.weight import ODD_K, Nested, QuantizedWeight


def from_bnb(source: Any, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Return the weight of a Linear4bit or Linear8bitLt of bitsandbytes, or its Params4bit or Int8Params.

    The tensors are shared, so a later change of bitsandbytes' tensors changes the weight here too. There is one
    exception. On a CPU with AVX512-BF16, the first forward in eval mode makes bitsandbytes re-pack the weight for
    inference. `from_bnb` copies the codes of such a weight back into order. Its absmax stay rounded to bf16, as
    bitsandbytes left them; call `from_bnb` before that forward to have them unrounded.

    Args:
        source: the layer or its weight.
        dtype: the dtype that `dequantize` gives by default. None is the dtype of the weight that was quantised; for
            int8 it is fp16, which bitsandbytes converts every weight to before it quantises it.

    Raises:
        TypeError: `source` is no such layer or weight.
        ValueError: the weight is not quantised yet, or the formats here cannot hold its state.
    """
    owner = source if isinstance(source, torch.nn.Linear) else None
    weight = source if owner is None else owner.weight
    if hasattr(weight, "SCB") or hasattr(weight, "has_fp16_weights"):
        q = _from_int8(weight, owner)
    elif hasattr(weight, "quant_state") or hasattr(owner, "quant_state"):
        q = _from_4bit(weight, owner)
    else:
        raise TypeError(
            f"from_bnb takes a Linear4bit or Linear8bitLt of bitsandbytes or its weight, got {type(source).__name__}"
            + (f" with a {type(weight).__name__}" if owner is not None else "")
            + ": quantize_weight is for a plain weight"
        )
    if owner is not None and q.shape != (owner.out_features, owner.in_features):
        raise ValueError(
            f"the weight was quantised as {q.shape}, but its layer is [{owner.out_features}, {owner.in_features}]: "
            "quantise it as [out_features, in_features]"
        )
    return (q if dtype is None else replace(q, dtype=dtype)).check()


def _plain(weight: Tensor) -> Tensor:
    """Return the data of a bitsandbytes parameter as a contiguous torch.Tensor."""
    return weight.detach().as_subclass(Tensor).contiguous()


def _from_int8(weight: Any, owner: Any) -> QuantizedWeight:
    state = getattr(owner, "state", None)
    absmax = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    if weight.dtype != torch.int8:
        raise ValueError(
            f"the weight of bitsandbytes is not quantised yet: it is {weight.dtype}. Make it with "
            "has_fp16_weights=False and move it first with .to(device), even to the CPU"
        )
    if absmax is None:
        raise ValueError(
            "the Int8Params has no SCB: its Linear8bitLt took it at the first forward. "
            "Give the module in place of its weight"
        )
    N, K = weight.shape
    return QuantizedWeight("int8", (N, K), torch.float16, _plain(weight), absmax, 0)


def _from_4bit(weight: Any, owner: Any) -> QuantizedWeight:
    state = getattr(weight, "quant_state", None) or getattr(owner, "quant_state", None)
    if state is None:
        raise ValueError(
            f"the weight of bitsandbytes is not quantised yet: it is {weight.dtype} and has no quant_state. "
            "Move it first with .to(device), even to the CPU"
        )
    if len(state.shape) != 2:
        raise ValueError(f"the weight must be [N, K], but was quantised as {tuple(state.shape)}")
    (N, K), data, absmax = state.shape, _plain(weight), state.absmax
    dtype, nested = state.dtype, None
    if K % 2:
        raise ValueError(f"K is odd in {(N, K)}, and its bytes straddle rows: dequantise it with bitsandbytes, {ODD_K}")
    if data.nbytes * 2 != N * K:
        raise ValueError(
            f"the packed weight has {data.nbytes} bytes ({data.dtype} {tuple(data.shape)}), but [{N}, {K}] in 4 bits "
            f"takes {N * K / 2:g}: it was sharded or cast. Take the weight of a whole layer, as it was quantised"
        )
    codes = data.view(torch.uint8)
    if getattr(state, "packing_format_for_cpu", False):
        dtype, codes = state.original_dtype, _unpacked(codes, N, K)
        absmax = absmax.float().t().reshape(-1)
    elif absmax.dim() != 1:
        raise ValueError(
            f"the weight has absmax {absmax.dtype} {tuple(absmax.shape)}: bitsandbytes has re-packed it for inference, "
            "and its state_dict() re-packs the codes but not the absmax. Load the weight again"
        )
    elif state.nested:
        nested = _nested(state)
    if state.quant_type in tables.LEVELS and state.code is not None:
        levels = tables.levels(state.quant_type, state.code.device)
        if not torch.equal(state.code, levels):
            raise ValueError(
                f"the weight has a table of its own, not that of {state.quant_type}: {state.code.tolist()}. "
                "Dequantise it with bitsandbytes, then quantize_weight"
            )
    return QuantizedWeight(state.quant_type, (N, K), dtype, codes.view(N, K // 2), absmax, state.blocksize, nested)


def _unpacked(codes: Tensor, N: int, K: int) -> Tensor:
    """Return the codes, row by row, of a weight that bitsandbytes has re-packed for inference on the CPU.

    Its bytes are [N/32, K/2, 32]. The 32 bytes hold two columns of 32 rows: byte t has element t of the row-major
    [32, 2] in its low nibble and element 32 + t in its high one.
    """
    packed = codes.view(N // 32, K // 2, 32)
    pair = torch.cat([packed & 15, packed >> 4], dim=2).view(N // 32, K // 2, 32, 2)
    return (pair[..., 0] << 4 | pair[..., 1]).transpose(1, 2).contiguous()


def _nested(state: Any) -> Nested:
    second = state.state2
    if second.blocksize != NESTED_BLOCKSIZE or second.dtype != torch.float32:
        raise ValueError(
            f"the double quantisation must be of fp32 in blocks of {NESTED_BLOCKSIZE}, got {second.dtype} in "
            f"blocks of {second.blocksize}: load the weight again"
        )
    return Nested(second.code, second.absmax, state.offset)
