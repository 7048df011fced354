"""A frozen weight in 4 or 8 bits: W [N, K] as codes and scales, and the way back.

    nf4, fp4   w = level[code] · absmax of its block of `blocksize` consecutive elements of row-major W
               (Dettmers, Pagnoni, Holtzman and Zettlemoyer, "QLoRA", arXiv:2305.14314)
    int8       w = code · absmax of its row / 127
               (Dettmers, Lewis, Belkada and Zettlemoyer, "LLM.int8()", arXiv:2208.07339)
    fp8        w = e4m3 code · scale, one scale for W, for each row or for each block of 128 x 128
               (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433)

What other packages have quantised comes in these formats, in nf4 with the levels of torchao (`tables.TORCHAO`), or in
integers (`lora_kernels.quant.integers`):

    integers   w = (code - zero) · scale

nf4, fp4 and int8 are bitsandbytes' formats. `lora_kernels.quant.bnb.from_bnb` reads its weights without a copy, and on
the CPU both packages give the same bits from the same weight. (With AVX512, bitsandbytes 0.50.2 departs from the
formula above in two cases: for blocks of more than K elements, and for bf16 results below 2⁻¹²⁶, which it makes zero.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant import encode, integers, tables
from lora_kernels.quant.encode import FP8_BLOCK, NESTED_BLOCKSIZE
from lora_kernels.quant.integers import Integers

FORMATS = ("nf4", "fp4", "int8", "fp8")
"""The formats that `quantize_weight` makes. A `QuantizedWeight` has one of `CODES`."""
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALINGS = ("tensor", "row", "block")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {
    **dict.fromkeys(tables.LEVELS, torch.uint8),
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    **integers.CODES,
}
ODD_K = "pad W with a column of zeros, or take int8 or fp8"
"""The way out for a W whose rows have an odd number of elements, which 4 bits cannot pack."""


class Nested(NamedTuple):
    """The second level of double quantisation: absmax of block i = table[scales[i]] · absmax[i // 256] + offset."""

    table: Tensor
    """fp32 [256]."""
    absmax: Tensor
    """fp32 [⌈blocks / 256⌉]."""
    offset: Tensor
    """fp32, zero-dimensional."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantised W [N, K], accepted wherever a frozen dense weight is.

    The constructor checks nothing, because a module makes one of these in every forward. `from_bnb` checks its result,
    `quantize_weight` makes parts that fit, and `lora_linear` checks a weight whose `checked` is False.
    """

    format: str
    """nf4, fp4, int8 or fp8, or one that only other packages make: in `tables.TORCHAO` or `integers.CODES`."""
    shape: tuple[int, int]
    """(N, K)."""
    dtype: torch.dtype
    """The dtype of the weight that was quantised, which `dequantize` gives by default: fp32, bf16 or fp16."""
    codes: Tensor
    """nf4 and fp4: uint8 [N, K/2], with element 2j of a row in the high nibble of byte j and element 2j + 1 in the low
    one. int8: int8 [N, K]. fp8: float8_e4m3fn [N, K]. The same bytes as int8 stand for them in these formats. Integers:
    see `lora_kernels.quant.integers`."""
    scales: Tensor
    """nf4 and fp4: absmax of each block, [⌈NK / blocksize⌉], in fp32, or in uint8 beside `nested`. int8: absmax of each
    row, fp32 [N]. fp8: fp32 [1, 1], [N, 1] or [⌈N/128⌉, ⌈K/128⌉]. Integers: of each group, in fp32, bf16 or fp16."""
    blocksize: int = 0
    """The number of elements in a block of nf4 or fp4, or in a group of integers; 0 for int8 and fp8."""
    nested: Nested | None = None
    """The second level, where the scales of nf4 or fp4 are quantised themselves."""
    checked: bool = field(default=False, repr=False)
    """Whether the parts are known to fit together: `check` has passed, or they come from a weight that it passed."""
    integers: Integers | None = None
    """The further parts of a weight in integers; None for the other formats."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.codes.device

    def size(self, dim: int | None = None) -> tuple[int, int] | int:
        """Return the shape, or one of its numbers, as `Tensor.size` does."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def is_cpu(self) -> bool:
        """Whether the tensors lie in the memory of the CPU."""
        return self.codes.is_cpu

    @property
    def requires_grad(self) -> bool:
        """False: a quantised weight is frozen."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every stored tensor: the codes, the scales, and the parts of `nested` or `integers`."""
        return (self.codes, self.scales, *(self.nested or self.integers or ()))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight on `device`. A tensor that lies there already is not copied."""
        nested = self.nested and Nested(*(tensor.to(device) for tensor in self.nested))
        further = self.integers and Integers(*(tensor.to(device) for tensor in self.integers))
        return replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), nested=nested, integers=further
        )

    def absmax(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return the fp32 absmax of the blocks ``first:last`` of nf4 or fp4, dequantised where they are `nested`."""
        scales = self.scales[first:last]
        if self.nested is None:
            return scales
        table, absmax, offset = self.nested
        block = torch.arange(first, first + scales.shape[0], device=self.device) // NESTED_BLOCKSIZE
        return table[scales.int()] * absmax[block] + offset

    def rows(self, n0: int, n1: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the rows ``n0:n1`` of W, dequantised: [n1 - n0, K] in `dtype`, by default the dtype of the weight that
        was quantised. No temporary is larger than these rows in fp32. Raises ValueError for rows outside W."""
        if not 0 <= n0 <= n1 <= self.shape[0]:
            raise ValueError(f"rows {n0} to {n1} of a weight of {self.shape[0]} rows: 0 <= n0 <= n1 <= N must hold")
        if self.integers is not None:
            parts = self.codes, self.scales, self.integers, self.format, self.shape, self.blocksize
            return integers.rows(*parts, n0, n1).to(dtype or self.dtype)
        make = {"int8": _rows_int8, "fp8": _rows_fp8}.get(self.format, _rows_4bit)
        return make(self, n0, n1).to(dtype or self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``dequantize_weight(self, dtype)``."""
        return dequantize_weight(self, dtype)

    def refuse_changed(self) -> None:
        """Raise what `check` raises where a tensor is not contiguous, or codes or scales have another shape. A tensor
        may have been replaced since `check`, and a kernel that takes its address would read beyond its memory."""
        fits = tuple(self.codes.shape) == codes_shape(self.shape, self.format)
        fits = fits and tuple(self.scales.shape) in _scale_shapes(self)
        if not fits or not all(tensor.is_contiguous() for tensor in self.tensors):
            self.check()

    def check(self) -> QuantizedWeight:
        """Return this weight, after a check that its parts fit together. Raises TypeError for a part of another dtype,
        and ValueError for every other fault."""
        _check(self)
        object.__setattr__(self, "checked", True)
        return self


def assemble(
    codes: Tensor, scales: Sequence[Tensor], format: str, blocksize: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight whose `tensors` are `codes` and `scales`. They must come from a weight that was checked."""
    if format in integers.CODES:
        further, shape = Integers(*scales[1:]), integers.shape_of(codes, format)
        return QuantizedWeight(format, shape, dtype, codes, scales[0], blocksize, None, True, further)
    N, stored = codes.shape  # as in `shape_of`, without the frame: every forward and backward comes here
    shape = N, stored * 2 if format in tables.LEVELS else stored
    nested = Nested(*scales[1:]) if len(scales) > 1 else None
    return QuantizedWeight(format, shape, dtype, codes, scales[0], blocksize, nested, checked=True)


def parts_in(format: str, scales: Tensor) -> int:
    """Return the number of tensors that `assemble` needs beside the codes, for a weight with these scales."""
    return 3 if format in integers.CODES else 4 if scales.dtype == torch.uint8 else 1


def shape_of(codes: Tensor, format: str) -> tuple[int, int]:
    """Return (N, K) of the weight with these codes."""
    if format in integers.CODES:
        return integers.shape_of(codes, format)
    N, stored = codes.shape
    return N, stored * 2 if format in tables.LEVELS else stored


def codes_shape(shape: tuple[int, int], format: str) -> tuple[int, int]:
    """Return the shape of the codes of a weight of this shape."""
    if format in integers.CODES:
        return integers.codes_shape(shape, format)
    N, K = shape
    return N, K // 2 if format in tables.LEVELS else K


def quantize_weight(
    w: Tensor, format: str = "nf4", *, blocksize: int = 64, double_quant: bool = False, scaling: str = "row"
) -> QuantizedWeight:
    """Return W [N, K] in 4 or 8 bits, on W's device. The working memory does not grow with W.

        nf4, fp4   v = w · (1 / absmax of the block) goes to the nearest level
        int8       code = round(w · (127 / absmax of the row)), half to even
        fp8        scale = absmax / 448, at least 2⁻¹²⁶, and code = w / scale, rounded to e4m3

    Args:
        w: W in fp32, bf16 or fp16. bitsandbytes' int8 modules round W to fp16 first: give w.half() for their bits.
        format: "nf4", "fp4", "int8" or "fp8".
        blocksize: the number of elements that share one absmax in nf4 and fp4.
        double_quant: whether nf4 and fp4 store absmax minus its mean in the 8-bit dynamic map, in blocks of 256.
        scaling: the part of W that shares one scale in fp8: the whole "tensor", a "row", or a "block" of 128 x 128.

    Raises:
        TypeError: W has another dtype.
        ValueError: W is not a matrix, has an odd K in 4 bits, has elements that are NaN, infinite, or so large that
            int8 or double_quant overflows fp32; or a setting is unknown.
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
        raise ValueError(f"{format} packs two elements of a row in a byte, and K is odd in {tuple(w.shape)}: {ODD_K}")
    w, shape = w.detach(), (w.shape[0], w.shape[1])
    with torch.no_grad():
        if format == "int8":
            return QuantizedWeight(format, shape, w.dtype, *encode.int8(w))
        if format == "fp8":
            return QuantizedWeight(format, shape, w.dtype, *encode.fp8(w, scaling))
        codes, absmax = encode.four_bit(w, format, blocksize)
        if not double_quant:
            return QuantizedWeight(format, shape, w.dtype, codes, absmax, blocksize)
        scales, *nested = encode.absmax8(absmax)
        return QuantizedWeight(format, shape, w.dtype, codes, scales, blocksize, Nested(*nested))


def quantize_like(w: Tensor, q: QuantizedWeight) -> QuantizedWeight:
    """Return w [N, K] quantised in the way that q is, with q's dtype. Raises what `quantize_weight` raises."""
    if q.format not in FORMATS:
        raise ValueError(
            f"a weight in {q.format} cannot be quantised again here: the package that made it can, or quantize_weight "
            f"into one of {', '.join(map(repr, FORMATS))}"
        )
    if q.format == "fp8":
        shape = tuple(q.scales.shape)
        scaling = "tensor" if shape == (1, 1) else "row" if shape == (q.shape[0], 1) else "block"
        new = quantize_weight(w, "fp8", scaling=scaling)
    elif q.format == "int8":
        new = quantize_weight(w, "int8")
    else:
        new = quantize_weight(w, q.format, blocksize=q.blocksize, double_quant=q.nested is not None)
    return replace(new, dtype=q.dtype)


def dequantize_weight(q: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Return W [N, K] in `dtype`, by default the dtype of the weight that was quantised. Products are computed in fp32
    and rounded at the end."""
    N, K = q.shape
    w = torch.empty(N, K, dtype=dtype or q.dtype, device=q.device)
    step = max(1, encode.SLICE // max(1, K))
    for n in range(0, N, step):
        w[n : n + step] = q.rows(n, min(N, n + step), torch.float32)
    return w


def _rows_4bit(q: QuantizedWeight, n0: int, n1: int) -> Tensor:
    K, size = q.shape[1], q.blocksize
    start, end = n0 * K, n1 * K
    codes = _in_format(q)[n0:n1].reshape(-1)
    pairs = tables.pairs(q.format, q.device)
    w = pairs.index_select(0, codes.int()).view(torch.float32)
    first = start // size
    absmax = q.absmax(first, -(-end // size))
    head = min(-start % size, end - start)  # elements of a block that began in an earlier row
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
    return _in_format(q)[n0:n1].float().mul_(encode.fp8_spread(q.scales, q.shape, n0, n1))


def _in_format(q: QuantizedWeight) -> Tensor:
    """Return the codes of q in the dtype of its format."""
    return q.codes.view(CODES[q.format]) if q.codes.dtype == torch.int8 else q.codes


def _check(q: QuantizedWeight) -> None:
    if q.format not in CODES:
        raise ValueError(f"unknown format {q.format!r}: it is one of {', '.join(map(repr, CODES))}")
    four_bit, whole = q.format in tables.LEVELS, q.format in integers.CODES
    if q.dtype not in DTYPES:
        raise TypeError(f"the dtype of a quantised weight is fp32, bf16 or fp16, got {q.dtype}")
    if len(q.shape) != 2 or min(q.shape) < 0:
        raise ValueError(f"the shape of a quantised weight is (N, K), got {tuple(q.shape)}")
    N, K = q.shape
    if four_bit and K % 2:
        raise ValueError(f"{q.format} packs two elements of a row in a byte, and K is odd in {(N, K)}: {ODD_K}")
    if (q.integers is not None) != whole:
        raise ValueError(f"`integers` goes with {', '.join(integers.CODES)}, got {q.integers} with {q.format}")
    if whole:
        return _check_integers(q)
    if q.blocksize not in (BLOCKSIZES if four_bit else (0,)):
        allowed = f"one of {', '.join(map(str, BLOCKSIZES))}" if four_bit else "0: it has no blocks of this kind"
        raise ValueError(f"the blocksize of {q.format} is {allowed}; got {q.blocksize}")
    if q.nested is not None and not four_bit:
        raise ValueError(f"nested scales go with nf4 and fp4; got them with {q.format}: give nested=None")
    scales = _scale_shapes(q)
    codes = torch.int8 if q.codes.dtype == torch.int8 else CODES[q.format]
    _fits("codes", q.codes, codes, [(N, K // 2 if four_bit else K)], q)
    _fits("scales", q.scales, torch.float32 if q.nested is None else torch.uint8, scales, q)
    if q.nested is not None:
        _fits("nested.table", q.nested.table, torch.float32, [(256,)], q)
        _fits("nested.absmax", q.nested.absmax, torch.float32, [(-(-scales[0][0] // NESTED_BLOCKSIZE),)], q)
        _fits("nested.offset", q.nested.offset, torch.float32, [()], q)
    _on_one_device(q)


def _check_integers(q: QuantizedWeight) -> None:
    assert q.integers is not None
    zeros, order = q.integers
    (N, K), turned = q.shape, q.format in integers.TURNED
    if q.blocksize < 1:
        raise ValueError(f"the blocksize of {q.format} is the size of a group, at least 1; got {q.blocksize}")
    _fits("codes", q.codes, CODES[q.format], [codes_shape(q.shape, q.format)], q)
    shapes = _scale_shapes(q)
    if order.numel():
        _fits("integers.order", order, torch.int32, [(K,)], q)
        groups = shapes[0][0]
        if not turned or (not order.is_meta and (int(order.min()) < 0 or int(order.max()) >= groups)):
            raise ValueError(
                f"the order of the columns of {q.format} must name groups from 0 to {groups - 1}: give an empty tensor "
                "for columns in order"
            )
    if q.scales.dtype not in DTYPES:
        raise TypeError(f"the scales of {q.format} must be fp32, bf16 or fp16, got {q.scales.dtype}")
    _fits("scales", q.scales, q.scales.dtype, shapes, q)
    if zeros.numel():
        packed = turned and zeros.dtype == torch.int32
        if not packed and zeros.dtype not in integers.ZEROS:
            raise TypeError(f"the zeros of {q.format} must be floating or int8, or packed in int32; got {zeros.dtype}")
        per_word = 4 if q.format == "gptq8" else 8
        _fits("integers.zeros", zeros, zeros.dtype, [(shapes[0][0], N // per_word)] if packed else shapes, q)
    _on_one_device(q)


def _on_one_device(q: QuantizedWeight) -> None:
    if len({tensor.device for tensor in q.tensors}) > 1:
        raise ValueError(
            "the tensors of a quantised weight lie on different devices: "
            f"{', '.join(str(tensor.device) for tensor in q.tensors)}. Move them to one before they are put together"
        )


def _scale_shapes(q: QuantizedWeight) -> list[tuple[int, ...]]:
    """Return the shapes that the scales of q may have."""
    N, K = q.shape
    if q.format == "int8":
        return [(N,)]
    if q.format in integers.CODES:
        if q.integers is not None and q.integers.order.numel():
            return [(q.scales.shape[0], N)]
        return [integers.scales_shape(q.shape, q.format, q.blocksize)]
    if q.format == "fp8":
        return [(1, 1), (N, 1), (-(-N // FP8_BLOCK), -(-K // FP8_BLOCK))]
    return [(-(-N * K // q.blocksize),)]


def _fits(name: str, tensor: Tensor, dtype: torch.dtype, shapes: list[tuple[int, ...]], q: QuantizedWeight) -> None:
    whose = f"{name} of {q.format} of {tuple(q.shape)}" + (f" in blocks of {q.blocksize}" if q.blocksize else "")
    if tensor.dtype != dtype:
        raise TypeError(f"{whose} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{whose} must be {' or '.join(map(str, dict.fromkeys(shapes)))}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{whose} must be contiguous, got strides {tensor.stride()}: give it .contiguous()")
