"""The operands of the random calls of `benchmarks.fuzz`: every choice of one call is a function of (seed, k, exact).

In exact mode the operands are small integers, few enough of them not zero that every product, every sum and every
rounding to x's dtype is exact in any order. Scales, and the factors 1 / (1 - p) of dropout, are powers of two or small
integers too. So every result must have the bits of the fp64 reference, and an element that comes from a wrong place
shows, however small it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_kernels.core import dropout
from lora_kernels.quant import tables
from lora_kernels.quant.weight import BLOCKSIZES, Nested, QuantizedWeight, quantize_weight
from lora_kernels.testing.judge import Problem, truth
from lora_kernels.testing.names import SHORT

T = TypeVar("T")

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
DTYPES += [(torch.float16, torch.float16), (torch.float16, torch.float32)]
FORMATS = ["nf4", "fp4", "int8", "fp8 tensor", "fp8 row", "fp8 block"]
LAYOUTS = ["plain", "transposed", "gaps", "steps", "offset", "expanded"]
MOST = {torch.bfloat16: 2.0**7, torch.float16: 2.0**10, torch.float32: 2.0**22, torch.float64: 2.0**50}
"""The largest sum of magnitudes in exact mode, by dtype: twice as much still has every bit."""
PART = {torch.bfloat16: 1.0, torch.float16: 2.0, torch.float32: 16.0, torch.float64: 16.0}
"""How dense the operands of exact mode are at first, by dtype. They are drawn anew with fewer until all sums are
exact."""


class Layered(NamedTuple):
    """A problem. Over a quantised W it has the codes too, and w in the problem is the dequantised W in fp32."""

    q: Problem
    codes: QuantizedWeight | None

    @property
    def w(self) -> Tensor | QuantizedWeight:
        """W as the call gets it."""
        return self.q.w if self.codes is None else self.codes


class Draw:
    """The choices of call k. `said` lists them, for the report of a fault."""

    def __init__(self, seed: int, k: int, exact: bool) -> None:
        self.exact, self.said = exact, list[str]()
        self.random = random.Random(f"{seed} {k} {exact}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def pick(self, name: str, options: Sequence[T]) -> T:
        """Return one of `options`, and note it."""
        return self.say(name, self.random.choice(options))

    def say(self, name: str, value: T) -> T:
        """Note a choice, and return it."""
        values = value if isinstance(value, tuple) else (value,)
        words = [SHORT.get(v, str(v)) if isinstance(v, torch.dtype) else str(v) for v in values]
        self.said.append(f"{name}={','.join(words)}")
        return value

    def chance(self, name: str, p: float) -> bool:
        """Return True with probability p, and note it then."""
        hit = self.random.random() < p
        if hit:
            self.said.append(name)
        return hit

    def size(self, name: str, most: int, least: int = 1) -> int:
        """Return a size between `least` and `most`, whose logarithm is uniform. One in three is then made even, and one
        in six a multiple of 64, if `most` is 64 or more."""
        n = round(least * (most / least) ** self.random.random())
        kind = self.random.randrange(6)
        return self.say(name, n + n % 2 if kind < 2 else max(64, n // 64 * 64) if kind == 2 and most >= 64 else n)

    def layout(self, name: str, t: Tensor) -> Tensor:
        """Return the numbers of a matrix in another place of memory. An expanded matrix repeats the first row.

        What lies between the numbers is NaN, so that a result shows whether it was read. It is 99 for x and dy in bf16:
        torch's own GEMM multiplies the elements between such rows by 0.
        """
        if self.random.random() < 0.6 or not t.numel():
            return t
        layout, (rows, cols) = self.pick(name, LAYOUTS), t.shape
        if layout == "transposed":
            return t.t().contiguous().t()
        if layout == "expanded":
            return t[:1].expand(rows, cols)

        def room(*size: int) -> Tensor:
            between = 99.0 if t.dtype == torch.bfloat16 and name in ("x", "dy") else float("nan")
            return torch.full(size, between).to(t.dtype)

        if layout == "offset":
            return room(t.numel() + 1)[1:].view(rows, cols).copy_(t)
        if layout == "gaps":
            return room(rows, cols + 3)[:, 1 : cols + 1].copy_(t)
        return room(rows, 2 * cols)[:, ::2].copy_(t) if layout == "steps" else t

    def numbers(self, rows: int, cols: int, std: float, kept: float) -> Tensor:
        """Return a random matrix in fp32. In exact mode its elements are -2 to 2, and a part `kept` of them is not
        zero."""
        if not self.exact:
            return torch.randn(rows, cols, generator=self.generator) * std
        values = torch.randint(1, 3, (rows, cols), generator=self.generator).float()
        values *= (torch.rand(rows, cols, generator=self.generator) < 0.5) * 2.0 - 1.0
        return values * (torch.rand(rows, cols, generator=self.generator) < kept)


def sizes(draw: Draw) -> tuple[int, int, int, int]:
    """Return M, N, K and R: small in most calls, and in some large enough for several tasks, panels and threads."""
    kind = draw.random.random()
    if kind < 0.02:
        return draw.random.choice((0, 1)), draw.random.choice((1, 3)), draw.random.choice((1, 3)), draw.size("R", 9)
    if kind < 0.94:
        return draw.size("M", 48), draw.size("N", 90), draw.size("K", 90), draw.size("R", 24)
    if kind < 0.985:
        return draw.size("M", 200), draw.size("N", 300, 20), draw.size("K", 300, 20), draw.size("R", 300)
    return draw.size("M", 80, 17), draw.size("N", 1100, 200), draw.size("K", 700, 20), draw.size("R", 70)


def problems(
    draw: Draw, count: int = 1, format: str = "dense", dora: bool = False, layer: bool = False
) -> list[Layered]:
    """Return `count` problems that share x."""
    M, N, K, R = sizes(draw)
    if format in ("nf4", "fp4"):
        K += K % 2
    dtype, adapter_dtype = draw.pick("dtypes", DTYPES)
    if not layer and draw.chance("fp64", 0.02):
        dtype = adapter_dtype = torch.float64
    draw.say("MNKR", (M, N, K, R))
    drops = (0.0, 0.0, 0.5, 0.75) if draw.exact else (0.0, 0.0, 0.05, 0.5, 0.9)
    scales = (1.0, 2.0, -1.0, 0.5, 0.0, 3.0) if draw.exact else (1.0, 0.75, -1.3, 0.0, 16.0, 1e-3)
    hows = [
        (
            N if i == 0 else draw.size("N", 60),
            R if i == 0 else draw.size("R", 20),
            draw.pick("p", drops),
            draw.pick("scale", scales),
            draw.chance("bias", 0.5),
            draw.random.getrandbits(62),
        )
        for i in range(count)
    ]
    state = draw.random.getstate()
    part = PART[dtype]
    while True:
        draw.random.setstate(state)
        noted = len(draw.said)
        x = draw.layout("x", draw.numbers(M, K, 1.0, min(1.0, part * 4 / max(K, 1))).to(dtype))
        made = [_one(draw, x, how, adapter_dtype, format, part) for how in hows]
        most = MOST[dtype] / count / (4 if dora else 1)
        if not draw.exact or part < 1e-4 or all(is_exact(each.q, most) for each in made):
            return made
        del draw.said[noted:]
        part /= 3


def _one(draw: Draw, x: Tensor, how: tuple[Any, ...], adapter_dtype: torch.dtype, format: str, part: float) -> Layered:
    """Return one problem over x."""
    N, R, p, scale, bias, seed = how
    (M, K), dtype = x.shape, x.dtype
    codes = None
    if format == "dense":
        rows = 1.0 if draw.exact else 2.0 ** torch.randint(-2, 3, (N, 1), generator=draw.generator)
        w = draw.layout("w", (draw.numbers(N, K, max(K, 1) ** -0.5, 0.5) * rows).to(dtype))
    else:
        codes = quantised(draw, N, K, format)
        w = codes.dequantize(torch.float32)
    a = draw.layout("a", draw.numbers(R, K, max(K, 1) ** -0.5, 0.5).to(adapter_dtype))
    b = draw.layout("b", draw.numbers(N, R, R**-0.5, min(1.0, part * 3 / R)).to(adapter_dtype))
    dy = draw.layout("dy", draw.numbers(M, N, 1.0, min(1.0, part * 4 / max(N, 1))).to(dtype))
    bias_n = draw.layout("bias", draw.numbers(1, N, 1.0, 0.5).to(dtype))[0] if bias else None
    mask_seed = torch.tensor(seed) if p else None
    return Layered(Problem(x, w, a, b, bias_n, dy, scale, p, mask_seed), codes)


def is_exact(q: Problem, most: float) -> bool:
    """Return whether no sum of magnitudes is above `most`, in the results and in h and g."""
    bound = q.absolute().to(torch.float64)
    largest = [t.max() for t in truth(bound).values() if t is not None and t.numel()]
    c, s = dropout.rescale(q.p) if q.p else 1.0, max(1.0, bound.scale)
    for product in (c * bound.x @ bound.a.t(), s * c * bound.dy @ bound.b):
        largest += [product.max()] if product.numel() else []
    return all(value <= most for value in largest)


def quantised(draw: Draw, N: int, K: int, format: str) -> QuantizedWeight:
    """Return a quantised weight whose scales differ from row to row and block to block."""
    name, *scaling = format.split()
    dtype = draw.random.choice((torch.float32, torch.bfloat16, torch.float16))
    blocksize = draw.pick("blocksize", BLOCKSIZES) if name in ("nf4", "fp4") else 0
    nested = bool(blocksize) and draw.chance("nested", 0.4)
    if draw.exact:
        return _exact_codes(draw, N, K, name, (*scaling, "")[0], blocksize, nested, dtype)
    spread = 2.0 ** torch.randint(-3, 4, (N, 1), generator=draw.generator)
    w = (torch.randn(N, K, generator=draw.generator) * spread * max(K, 1) ** -0.5).to(dtype)
    how: dict[str, Any] = {"blocksize": blocksize, "double_quant": nested} if blocksize else {}
    return quantize_weight(w, name, **how, **({"scaling": scaling[0]} if scaling else {}))


def _exact_codes(
    draw: Draw, N: int, K: int, name: str, scaling: str, blocksize: int, nested: bool, dtype: torch.dtype
) -> QuantizedWeight:
    """Return a quantised weight whose elements are small integers: codes of -2 to 2, and scales that dequantise them
    exactly."""

    def some(values: Sequence[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=draw.generator)]

    if name == "int8":
        codes = some((-2, -1, 0, 1), N, K).to(torch.int8)
        return QuantizedWeight(name, (N, K), dtype, codes, 127.0 * some((1.0, 2.0), N)).check()
    if name == "fp8":
        shape = {"tensor": (1, 1), "row": (N, 1), "block": (-(-N // 128), -(-K // 128))}[scaling]
        codes = some((-1.0, 0.0, 1.0, 2.0), N, K).to(torch.float8_e4m3fn)
        return QuantizedWeight(name, (N, K), dtype, codes, some((1.0, 2.0), *shape)).check()
    levels = tables.LEVELS[name]
    nibbles = some([levels.index(value) for value in (-1.0, 0.0, 1.0)], N, K).to(torch.uint8)
    codes, blocks = nibbles[:, ::2] << 4 | nibbles[:, 1::2], -(-N * K // blocksize)
    if not nested:
        return QuantizedWeight(name, (N, K), dtype, codes, some((1.0, 2.0), blocks), blocksize).check()
    table = tables.dynamic(codes.device)
    known = [int((table == value).nonzero()[0]) for value in (0.0, 1.0)]
    absmax = some((1.0, 3.0), -(-blocks // 256))
    scales = some(known, blocks).to(torch.uint8)
    parts = Nested(table, absmax, torch.tensor(1.0))
    return QuantizedWeight(name, (N, K), dtype, codes, scales, blocksize, parts).check()
