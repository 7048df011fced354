"""The values that the codes of a quantised weight stand for, and the nearest code for a given number.

nf4      the 16 levels of NormalFloat4: quantiles of the normal distribution, with an exact zero, scaled to [-1, 1]
         (Dettmers, Pagnoni, Holtzman and Zettlemoyer, "QLoRA", arXiv:2305.14314, section 3 and appendix E)
fp4      a sign, two bits of exponent, one of mantissa, scaled so that the largest is 1: 0, 1/192, 1/6, 1/4, 1/3, 1/2,
         2/3, 1, in the order of their bit patterns, which is not that of their values
dynamic  the 256 levels in which double quantisation stores absmax: for i = 0 ... 6 the midpoints of 2^i equal parts of
         [0.1, 1], times 10^(i - 6), with both signs, and 0 and 1 (Dettmers, "8-Bit Approximations for Parallelism in
         Deep Learning", arXiv:1511.04561)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = _FP4_MAGNITUDES + tuple(0.0 - value for value in _FP4_MAGNITUDES)  # both zeros are +0


def _in_halves(level: float, dtype: torch.dtype) -> float:
    """Return the level rounded to bf16 or fp16, and itself for fp32."""
    if dtype == torch.float16:
        half: float = struct.unpack("<e", struct.pack("<e", level))[0]
        return half
    if dtype == torch.float32:
        return level
    bits = struct.unpack("<I", struct.pack("<f", level))[0]
    bfloat: float = struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16))[0]
    return bfloat


TORCHAO = {
    torch.float32: "nf4-torchao",
    torch.bfloat16: "nf4-torchao-bf16",
    torch.float16: "nf4-torchao-fp16",
}
"""The formats of torchao's NF4Tensor, by the dtype of the weight: it rounds the levels to 4 digits, then to it."""
LEVELS = {
    "nf4": NF4,
    "fp4": FP4,
    **{name: tuple(_in_halves(round(level, 4), dtype) for level in NF4) for dtype, name in TORCHAO.items()},
}

# The codes in the order of their values. FP4 has two zeros: numbers that round to zero get code 0 from below and code 8
# from above.
_SORTED = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}

_made: dict[tuple[str, torch.device], Tensor] = {}


def _kept(name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """Return `make()` on `device`. It is called once for each name and device, and the result is kept."""
    table = _made.get((name, device))
    if table is None or torch.compiler.is_compiling():
        with torch.inference_mode(False):
            table = make().to(device)
        # A FakeTensor must not outlive its mode, nor a tensor of a torch.func transform that transform.
        transformed = torch._C._are_functorch_transforms_active()
        if type(table) is Tensor and not transformed and not torch.compiler.is_compiling():
            _made[name, device] = table
    return table


def levels(format: str, device: torch.device) -> Tensor:
    """Return the values of the 16 codes of nf4 or fp4: fp32 [16] on `device`."""
    return _kept(format, device, lambda: torch.tensor(LEVELS[format], dtype=torch.float32, device="cpu"))


def pairs(format: str, device: torch.device) -> Tensor:
    """Return the two values that each byte stands for, the high nibble's first: int64 [256] on `device`, each element
    the bits of two fp32 numbers, so that one look-up fetches both."""

    def make() -> Tensor:
        level = torch.tensor(LEVELS[format], dtype=torch.float32, device="cpu")
        both = torch.stack([level.repeat_interleave(16), level.repeat(16)], dim=1)
        return both.view(torch.int64).flatten()

    return _kept(f"{format} pairs", device, make)


def dynamic(device: torch.device) -> Tensor:
    """Return the values of the 8-bit dynamic map in increasing order: fp32 [256] on `device`."""

    def make() -> Tensor:
        parts = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
            fractions = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
            parts += [fractions, -fractions]
        return torch.cat(parts).sort().values

    return _kept("dynamic", device, make)


def nearest4(format: str, v: Tensor) -> Tensor:
    """Return the code of the nearest level for each element of v, fp32 in [-1, 1]: uint8 of v's shape. Ties go to the
    lower level."""

    def midpoints() -> Tensor:
        level = torch.tensor(LEVELS[format], dtype=torch.float32, device="cpu")[list(_SORTED[format])]
        return (level[:-1] + level[1:]) / 2

    rank = torch.bucketize(v, _kept(f"{format} midpoints", v.device, midpoints), out_int32=True)
    if format == "nf4":
        return rank.to(torch.uint8)
    order = _kept(f"{format} order", v.device, lambda: torch.tensor(_SORTED[format], dtype=torch.uint8, device="cpu"))
    return order[rank]


def nearest8(v: Tensor) -> Tensor:
    """Return the code of the dynamic map for each element of v, fp32 in [-1, 1]: uint8 of v's shape.

    The rule is that of bitsandbytes 0.50.2 on the CPU. v goes to the nearest of 65536 points evenly spaced on [-1, 1],
    and that point goes to the nearest level, or the lower one of two. A v within 1/65535 of a midpoint may therefore
    get the farther level.
    """

    def midpoints() -> Tensor:
        table = dynamic(torch.device("cpu"))
        return (table[:-1] + table[1:]) / 2

    point = ((v + 1) * 0.5 * 65535 + 0.5).floor()  # fused or not, the sum has the same floor for every fp32 v
    return torch.bucketize(point * 2 / 65535 - 1, _kept("dynamic midpoints", v.device, midpoints)).to(torch.uint8)


def fp8_values() -> list[float]:
    """Return the value of each of the 256 codes of e4m3: (1 + m/8)·2^(e - 7), or m/8·2^-6 for e = 0, and NaN for the
    largest code of either sign (arXiv:2209.05433)."""
    values = []
    for code in range(128):
        e, m = divmod(code, 8)
        values.append(math.nan if code == 127 else math.ldexp(m / 8 + (e > 0), max(e, 1) - 7))
    return values + [-value for value in values]
