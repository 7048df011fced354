"""A frozen weight in 4 or 8 bits: how W [N,K] becomes codes and scales, and comes back.

    nf4, fp4   w = level[code] · absmax of its block of `blocksize` consecutive elements of row-major W
               (Dettmers, Pagnoni, Holtzman and Zettlemoyer, "QLoRA", arXiv:2305.14314)
    int8       w = code · absmax of its row / 127
               (Dettmers, Lewis, Belkada and Zettlemoyer, "LLM.int8()", arXiv:2208.07339)
    fp8        w = e4m3 code · scale, one scale for W, for each row or for each block of 128 x 128
               (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433)

nf4, fp4 and int8 are bitsandbytes' formats: what it quantised is read here without a copy (`from_bnb`), and on the CPU
both give the same bits from the same weight. (On AVX512 bitsandbytes 0.50.2 differs in two cases, where it does not
compute the formula above: blocks of more than K elements, and bf16 results below 2⁻¹²⁶, which it makes zero.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant import encode as quant_encode
from lora_kernels.quant import tables as quant_tables
from lora_kernels.quant.encode import FP8_BLOCK, NESTED_BLOCKSIZE

FORMATS = ("nf4", "fp4", "int8", "fp8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALINGS = ("tensor", "row", "block")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {"nf4": torch.uint8, "fp4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_ODD = "pad W with a column of zeros, or take int8 or fp8"


class Nested(NamedTuple):
    """The second level of double quantisation: absmax of block i = table[scales[i]] · absmax[i // 256] + offset."""

    table: Tensor
    """fp32 [256]"""
    absmax: Tensor
    """fp32 [⌈blocks / 256⌉]"""
    offset: Tensor
    """fp32, zero-dimensional"""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """What stands where W [N,K] stands.

    The constructor checks nothing, because a module makes one of these at every forward. `lora_linear` checks the first
    time that it sees one; `quantize_weight` and `from_bnb` have done so.
    """

    format: str
    """nf4, fp4, int8 or fp8"""
    shape: tuple[int, int]
    """(N, K)"""
    dtype: torch.dtype
    """of the weight that was quantised, and what `dequantize` gives: fp32, bf16 or fp16"""
    codes: Tensor
    """nf4, fp4: uint8 [N, K/2], element 2j of a row in the high nibble of byte j and 2j + 1 in the low one; int8: int8
    [N, K]; fp8: float8_e4m3fn [N, K]"""
    scales: Tensor
    """nf4, fp4: absmax of each block, fp32 [⌈NK / blocksize⌉], or uint8 where `nested`; int8: absmax of each row, fp32
    [N]; fp8: fp32 [1, 1], [N, 1] or [⌈N/128⌉, ⌈K/128⌉]"""
    blocksize: int = 0
    """elements of a block of nf4 or fp4; 0 for the others"""
    nested: Nested | None = None
    """double quantisation of the scales of nf4 or fp4"""
    checked: bool = field(default=False, repr=False)
    """whether `check` has found that the parts fit together"""

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.codes.device

    @property
    def is_cpu(self) -> bool:
        """As of a tensor."""
        return self.codes.is_cpu

    @property
    def requires_grad(self) -> bool:
        """Never."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return (self.codes, self.scales, *(self.nested or ()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device; itself where it lies there already."""
        nested = self.nested and Nested(*(tensor.to(device) for tensor in self.nested))
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), nested=nested)

    def absmax(self, first: int = 0, last: int | None = None) -> Tensor:
        """The scales of the blocks first to last of nf4 or fp4, out of double quantisation where they are: fp32."""
        scales = self.scales[first:last]
        if self.nested is None:
            return scales
        table, absmax, offset = self.nested
        block = torch.arange(first, first + scales.shape[0], device=self.device) // NESTED_BLOCKSIZE
        return table[scales.int()] * absmax[block] + offset

    def rows(self, n0: int, n1: int, dtype: torch.dtype | None = None) -> Tensor:
        """The rows n0 to n1 of W, dequantised: [n1 - n0, K] in `dtype`. Nothing larger than them in fp32 is made."""
        if not 0 <= n0 <= n1 <= self.shape[0]:
            raise ValueError(f"rows {n0} to {n1} of a weight of {self.shape[0]} rows: 0 <= n0 <= n1 <= N must hold")
        make = {"int8": _rows_int8, "fp8": _rows_fp8}.get(self.format, _rows_4bit)
        return make(self, n0, n1).to(dtype or self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`dequantize_weight(self, dtype)`."""
        return dequantize_weight(self, dtype)

    def check(self) -> QuantizedWeight:
        """Itself, if its parts fit together; else TypeError for a dtype, ValueError for everything else."""
        _check(self)
        object.__setattr__(self, "checked", True)
        return self


def assemble(
    codes: Tensor, scales: Sequence[Tensor], format: str, blocksize: int, dtype: torch.dtype
) -> QuantizedWeight:
    """From the `tensors` of one that was checked, codes and the rest."""
    N, stored = codes.shape
    shape = (N, stored * 2 if format in ("nf4", "fp4") else stored)
    nested = Nested(*scales[1:]) if len(scales) > 1 else None
    return QuantizedWeight(format, shape, dtype, codes, scales[0], blocksize, nested, checked=True)


def quantize_weight(
    w: Tensor, format: str = "nf4", *, blocksize: int = 64, double_quant: bool = False, scaling: str = "row"
) -> QuantizedWeight:
    """W [N,K] in fp32, bf16 or fp16 to 4 or 8 bits, on its device, in working memory that does not grow with W.

    blocksize and double_quant are for nf4 and fp4, scaling ("tensor", "row" or "block", of 128 x 128) is for fp8.

    nf4, fp4: v = w · (1 / absmax of the block) goes to the nearest level. With double_quant, absmax minus its mean is
    stored in the 8-bit dynamic map in blocks of 256. int8: round(w · (127 / absmax of the row)), half to even;
    bitsandbytes' modules round W to fp16 first: give w.half() for their bits. fp8: scale = absmax / 448, at least
    2⁻¹²⁶; codes = w / scale, rounded to e4m3.

    Raises TypeError for another dtype; ValueError for a W that is not a matrix, for an odd K in 4 bits, for NaN or
    infinite elements, for so large ones that int8 or double_quant overflows fp32, and for unknown settings.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: it is one of {', '.join(map(repr, FORMATS))}")
    if scaling not in SCALINGS:
        raise ValueError(f"unknown scaling {scaling!r}: it is one of {', '.join(map(repr, SCALINGS))}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")
    if double_quant and format not in ("nf4", "fp4"):
        raise ValueError(f"double_quant is for nf4 and fp4, got format {format!r}: leave it out")
    if w.dtype not in DTYPES:
        raise TypeError(
            f"the weight must be fp32, bf16 or fp16 to be quantised, got {w.dtype}: "
            "from_bnb takes what bitsandbytes has quantised"
        )
    if w.dim() != 2:
        raise ValueError(f"the weight must be [N, K] to be quantised, got {tuple(w.shape)}")
    if format in ("nf4", "fp4") and w.shape[1] % 2:
        raise ValueError(f"{format} packs two elements of a row in a byte, and K is odd in {tuple(w.shape)}: {_ODD}")
    w, shape = w.detach(), (w.shape[0], w.shape[1])
    with torch.no_grad():
        if format == "int8":
            return QuantizedWeight(format, shape, w.dtype, *quant_encode.int8(w))
        if format == "fp8":
            return QuantizedWeight(format, shape, w.dtype, *quant_encode.fp8(w, scaling))
        codes, absmax = quant_encode.four_bit(w, format, blocksize)
        if not double_quant:
            return QuantizedWeight(format, shape, w.dtype, codes, absmax, blocksize)
        scales, *nested = quant_encode.absmax8(absmax)
        return QuantizedWeight(format, shape, w.dtype, codes, scales, blocksize, Nested(*nested))


def dequantize_weight(q: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """W [N,K] in `dtype`, by default that of the weight that was quantised: products in fp32, rounded at the end."""
    N, K = q.shape
    w = torch.empty(N, K, dtype=dtype or q.dtype, device=q.device)
    step = max(1, quant_encode.SLICE // max(1, K))
    for n in range(0, N, step):
        w[n : n + step] = q.rows(n, min(N, n + step), torch.float32)
    return w


def from_bnb(source: Any, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """The weight of a Linear4bit or Linear8bitLt of bitsandbytes, or its Params4bit or Int8Params, without a copy.

    `dtype` is what `dequantize` shall give by default: where it is None, that of the weight that was quantised, and
    fp16 for int8, which bitsandbytes always quantises from. The tensors are shared: what changes them there changes the
    weight here. Not shared is a weight that bitsandbytes has re-packed for inference on the CPU (in the first forward
    in eval mode on a machine with AVX512-BF16): its codes are put back in order, and its absmax stay as they are there
    now, rounded to bf16. Take the weight before that forward to have them unrounded.

    bitsandbytes itself is not imported. Raises TypeError for what is none of these; ValueError for a weight that is not
    quantised yet, or whose state is not one that the formats here can hold.
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


def _rows_4bit(q: QuantizedWeight, n0: int, n1: int) -> Tensor:
    K, size = q.shape[1], q.blocksize
    start, end = n0 * K, n1 * K
    codes = q.codes[n0:n1].reshape(-1)
    pairs = quant_tables.pairs(q.format, q.device)
    w = pairs.index_select(0, codes.int()).view(torch.float32)
    first = start // size
    absmax = q.absmax(first, -(-end // size))
    head = min(-start % size, end - start)  # of a block that began in an earlier row
    body = (end - start - head) // size
    if head:
        w[:head] *= absmax[0]
        absmax = absmax[1:]
    w[head : head + body * size].view(body, size).mul_(absmax[:body, None])
    if head + body * size < end - start:
        w[head + body * size :] *= absmax[body]
    return w.view(n1 - n0, K)


def _rows_int8(q: QuantizedWeight, n0: int, n1: int) -> Tensor:
    return (q.codes[n0:n1] * q.scales[n0:n1, None]).mul_(1 / 127)


def _rows_fp8(q: QuantizedWeight, n0: int, n1: int) -> Tensor:
    return q.codes[n0:n1].float().mul_(quant_encode.fp8_spread(q.scales, q.shape, n0, n1))


def _check(q: QuantizedWeight) -> None:
    if q.format not in FORMATS:
        raise ValueError(f"unknown format {q.format!r}: it is one of {', '.join(map(repr, FORMATS))}")
    four_bit = q.format in ("nf4", "fp4")
    if q.dtype not in DTYPES:
        raise TypeError(f"the dtype of a quantised weight is fp32, bf16 or fp16, got {q.dtype}")
    if len(q.shape) != 2 or min(q.shape) < 0:
        raise ValueError(f"the shape of a quantised weight is (N, K), got {tuple(q.shape)}")
    N, K = q.shape
    if four_bit and K % 2:
        raise ValueError(f"{q.format} packs two elements of a row in a byte, and K is odd in {(N, K)}: {_ODD}")
    if q.blocksize not in (BLOCKSIZES if four_bit else (0,)):
        allowed = f"one of {', '.join(map(str, BLOCKSIZES))}" if four_bit else "0: it has no blocks of this kind"
        raise ValueError(f"the blocksize of {q.format} is {allowed}; got {q.blocksize}")
    if q.nested is not None and not four_bit:
        raise ValueError(f"nested scales go with nf4 and fp4; got them with {q.format}: give nested=None")
    blocks = -(-N * K // q.blocksize) if four_bit else 0
    scales: list[tuple[int, ...]]
    if four_bit:
        scales = [(blocks,)]
    elif q.format == "int8":
        scales = [(N,)]
    else:
        scales = [(1, 1), (N, 1), (-(-N // FP8_BLOCK), -(-K // FP8_BLOCK))]
    _fits("codes", q.codes, CODES[q.format], [(N, K // 2 if four_bit else K)], q)
    _fits("scales", q.scales, torch.float32 if q.nested is None else torch.uint8, scales, q)
    if q.nested is not None:
        _fits("nested.table", q.nested.table, torch.float32, [(256,)], q)
        _fits("nested.absmax", q.nested.absmax, torch.float32, [(-(-blocks // NESTED_BLOCKSIZE),)], q)
        _fits("nested.offset", q.nested.offset, torch.float32, [()], q)
    if len({tensor.device for tensor in q.tensors}) > 1:
        raise ValueError(
            "the tensors of a quantised weight lie on different devices: "
            f"{', '.join(str(tensor.device) for tensor in q.tensors)}. Move them to one before they are put together"
        )


def _fits(name: str, tensor: Tensor, dtype: torch.dtype, shapes: list[tuple[int, ...]], q: QuantizedWeight) -> None:
    whose = f"{name} of {q.format} of {tuple(q.shape)}" + (f" in blocks of {q.blocksize}" if q.blocksize else "")
    if tensor.dtype != dtype:
        raise TypeError(f"{whose} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{whose} must be {' or '.join(map(str, dict.fromkeys(shapes)))}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{whose} must be contiguous, got strides {tensor.stride()}: give it .contiguous()")


def _plain(weight: Tensor) -> Tensor:
    """The data of a bitsandbytes parameter: contiguous, and no longer of its class."""
    return weight.detach().as_subclass(Tensor).contiguous()


def _from_int8(weight: Any, owner: Any) -> QuantizedWeight:
    state = getattr(owner, "state", None)
    absmax = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    if weight.dtype != torch.int8:
        raise ValueError(
            f"the weight of bitsandbytes is not quantised yet: it is {weight.dtype}. Make it with "
            "has_fp16_weights=False and move it first, .to(device), the CPU included"
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
            "Move it first: .to(device), the CPU included"
        )
    if len(state.shape) != 2:
        raise ValueError(f"the weight must be [N, K], but was quantised as {tuple(state.shape)}")
    (N, K), data, absmax = state.shape, _plain(weight), state.absmax
    dtype, nested = state.dtype, None
    if K % 2:
        raise ValueError(f"K is odd in {(N, K)}, and its bytes straddle rows: dequantise it with bitsandbytes, {_ODD}")
    if data.nbytes * 2 != N * K:
        raise ValueError(
            f"the packed weight has {data.nbytes} bytes ({data.dtype} {tuple(data.shape)}), but [{N}, {K}] in 4 bits "
            f"takes {N * K / 2:g}: it was sharded or cast. Take the weight of a whole layer, as it was quantised"
        )
    codes = data.view(torch.uint8)
    if getattr(state, "packing_format_for_cpu", False):
        # [N/32, K/2, 32] bytes. The 32 hold two columns of 32 rows: byte t has element t of the row-major [32, 2] in
        # its low nibble, element 32 + t in its high one.
        dtype = state.original_dtype
        packed = codes.view(N // 32, K // 2, 32)
        pair = torch.cat([packed & 15, packed >> 4], dim=2).view(N // 32, K // 2, 32, 2)
        codes = (pair[..., 0] << 4 | pair[..., 1]).transpose(1, 2).contiguous()
        absmax = absmax.float().t().reshape(-1)
    elif absmax.dim() != 1:
        raise ValueError(
            f"the weight has absmax {absmax.dtype} {tuple(absmax.shape)}: bitsandbytes has re-packed it for inference "
            "and back, as state_dict() does, and left them so. Load the weight again"
        )
    elif state.nested:
        second = state.state2
        if second.blocksize != NESTED_BLOCKSIZE or second.dtype != torch.float32:
            raise ValueError(
                f"the double quantisation must be of fp32 in blocks of {NESTED_BLOCKSIZE}, got {second.dtype} in "
                f"blocks of {second.blocksize}: load the weight again"
            )
        nested = Nested(second.code, second.absmax, state.offset)
    if state.quant_type in quant_tables.LEVELS and state.code is not None:
        levels = quant_tables.levels(state.quant_type, state.code.device)
        if not torch.equal(state.code, levels):
            raise ValueError(
                f"the weight has a table of its own, not that of {state.quant_type}: {state.code.tolist()}. "
                "Dequantise it with bitsandbytes, then quantize_weight"
            )
    return QuantizedWeight(state.quant_type, (N, K), dtype, codes.view(N, K // 2), absmax, state.blocksize, nested)
