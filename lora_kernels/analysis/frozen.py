"""`FrozenWeight`: the frozen W as an operator, read by blocks of rows, and its leading singular vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.quant.weight import QuantizedWeight

_ROWS = 512
"""The number of rows that are converted at a time."""
_ONCE = 1 << 26
"""A dense weight of at most so many elements, 256 MB in fp32, is converted once for all products."""
EXACT = 512
"""Where the smaller side of W is at most this, its singular values are those of the eigenvalue problem of that side."""
_LEAST, _MOST = 1e-12, 1e18
"""Between these, a norm that was computed in fp32 is right."""
_STEPS, _MORE = 4, 8
"""The blocks of a Krylov space, and the columns in each beyond the vectors that are wanted."""


class Leading(NamedTuple):
    """The leading singular values and right singular vectors of a weight."""

    s: Tensor
    """Singular values [k], from the largest on."""
    v: Tensor
    """Right singular vectors [K, k]."""

    @property
    def rank(self) -> int:
        """How many of the vectors W has: those whose singular value is above 10⁻⁶ of the largest. Others, of a W of a
        lower rank, are arbitrary."""
        return int((self.s > 1e-6 * self.s[0]).sum())


class FrozenWeight:
    """W [N, K], dense or quantised, in products with thin matrices. It is computed in fp32, or in fp64 for a W in fp64,
    on W's device. A quantised W is dequantised by blocks of 512 rows."""

    def __init__(self, weight: Tensor | QuantizedWeight, transposed: bool = False) -> None:
        """`transposed` says that `weight` holds Wᵀ [K, N], as an embedding's table and a Conv1D of transformers do.
        Raises ValueError for a weight that is no matrix, holds no values (the meta device) or values that are NaN or
        infinite, and TypeError for other dtypes than floating ones."""
        shape = tuple(weight.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"the weight {shape} is not [N, K]: flatten that of a convolution with weight.flatten(1)")
        if weight.device.type == "meta":
            raise ValueError(f"the weight {shape} is on the meta device, which holds no values: load the model first")
        if weight.device.type == "mps":  # which has no fp64
            weight = weight.to("cpu")
        if isinstance(weight, Tensor):
            if not weight.is_floating_point():
                raise TypeError(
                    f"the weight is {weight.dtype} {shape}, no floating type: pass a quantised one as a "
                    "QuantizedWeight (from_bnb reads those of bitsandbytes)"
                )
            weight = weight.detach()
            self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            if weight.numel() <= _ONCE:
                weight = weight.to(self.dtype)
        else:
            self.dtype = torch.float32
        self._stored, self._transposed, self.device = weight, transposed, weight.device
        self.shape: tuple[int, int] = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        # By rows, because torch's norm of 16 million elements in fp32 is wrong in its fourth digit.
        rows = (torch.linalg.vector_norm(block, dim=1).double() for _, block in self._blocks())
        self.norm = math.sqrt(sum(each.square().sum().item() for each in rows))
        """‖W‖_F."""
        if not _LEAST < self.norm < _MOST:  # squares of such numbers are no numbers of fp32
            parts = (part for _, block in self._blocks() for part in block.split(_ROWS))
            self.norm = math.hypot(*(torch.linalg.vector_norm(part.double()).item() for part in parts))
        if not math.isfinite(self.norm):
            raise ValueError(f"the weight {self.shape} has values that are NaN or infinite")

    def times(self, x: Tensor) -> Tensor:
        """Return W x [N, c] for x [K, c], in the dtype in which W is computed."""
        return self._product(x, self._transposed)

    def transposed_times(self, x: Tensor) -> Tensor:
        """Return Wᵀ x [K, c] for x [N, c]."""
        return self._product(x, not self._transposed)

    def gram(self) -> tuple[Tensor, bool]:
        """Return W Wᵀ or Wᵀ W in fp64, that of the smaller side of W, and whether it is Wᵀ W."""
        rows, columns = self._stored.shape
        if rows < columns:
            made = torch.empty(rows, rows, dtype=torch.float64, device=self.device)
            for one, block in self._blocks():
                block = block.double()
                for other, second in self._blocks():
                    if other.start <= one.start:
                        product = block @ second.double().T
                        made[one, other], made[other, one] = product, product.T
        else:
            made = torch.zeros(columns, columns, dtype=torch.float64, device=self.device)
            for _, block in self._blocks():
                block = block.double()
                made.addmm_(block.T, block)
        return made, (rows >= columns) != self._transposed

    @torch.no_grad()
    def leading(self, k: int, seed: int = 0) -> Leading:
        """Return the leading k singular values and right singular vectors of W, in fp64.

        They are exact to rounding where min(N, K) is at most 512, or at most 2 (k + 8). Otherwise they come from a
        block Krylov space of 4 (k + 8) dimensions (Musco and Musco, "Randomized Block Krylov Methods", 2015,
        arXiv:1504.05477) with a fixed `seed`, in seven products with W. Every value is then a lower bound of its
        singular value. It is within 6 % even for a W of independent random numbers, whose singular values lie closest
        together, and far closer where they decay; single vectors among singular values that hardly differ are not
        resolved. Raises ValueError for a k outside 1 … min(N, K).
        """
        N, K = self.shape
        if not 1 <= k <= min(N, K):
            raise ValueError(f"k={k} leading singular values of a weight {self.shape}: from 1 to {min(N, K)} are there")
        q = k + _MORE
        if min(N, K) <= max(EXACT, 2 * q):
            gram, is_right = self.gram()
            values, vectors = torch.linalg.eigh(gram)
            s, vectors = values.flip(0)[:k].clamp(min=0).sqrt(), vectors.flip(1)[:, :k]
            return Leading(s, vectors if is_right else torch.linalg.qr(self.transposed_times(vectors).double())[0])
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn(K, q, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        basis = torch.linalg.qr(new)[0]
        images = self.times(basis)
        newest = images
        for _ in range(min(_STEPS, min(N, K) // q) - 1):
            new = self.transposed_times(newest)
            for _ in range(2):  # where W has a low rank, the first leaves rounding errors, which are normalised
                new = torch.linalg.qr(new - basis @ (basis.T @ new))[0]
            newest = self.times(new)
            basis, images = torch.cat([basis, new], 1), torch.cat([images, newest], 1)
        images = images.double()
        values, vectors = torch.linalg.eigh(images.T @ images)
        s = values.flip(0)[:k].clamp(min=0).sqrt()
        return Leading(s, basis.double() @ vectors.flip(1)[:, :k])

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of what is stored, by blocks, in the dtype in which they are computed."""
        stored, rows = self._stored, self._stored.shape[0]
        if isinstance(stored, Tensor) and stored.dtype == self.dtype:
            yield slice(0, rows), stored
            return
        for n in range(0, rows, _ROWS):
            part = slice(n, min(rows, n + _ROWS))
            if isinstance(stored, Tensor):
                yield part, stored[part].to(self.dtype)
            else:
                yield part, stored.rows(part.start, part.stop, self.dtype)

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        """Return the stored matrix times x, or with `transposed` its transpose times x."""
        rows, columns = self._stored.shape
        xt = x.T.to(
            self.device, self.dtype
        ).contiguous()  # a GEMM of few rows takes half the time of one of few columns
        made = xt.new_zeros(xt.shape[0], columns if transposed else rows)
        for part, block in self._blocks():
            if transposed:
                made.addmm_(xt[:, part], block)
            else:
                made[:, part] = xt @ block.T
        return made.T
