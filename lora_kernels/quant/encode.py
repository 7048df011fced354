"""The codes and scales of W [N, K] in each format, computed a slice of W at a time.

Every element gets the code that bitsandbytes 0.50.2 gives it on the CPU, down to ties and denormals. The papers are
cited in `lora_kernels.quant.weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_kernels.quant import tables

SLICE = 2**20
"""The number of elements of W that are worked on at a time: a multiple of every blocksize."""
NESTED_BLOCKSIZE = 256
"""The number of absmax that share one scale in double quantisation."""
FP8_BLOCK = 128
"""The number of rows, and of columns, of a block of W that shares one fp8 scale."""
FP8_MAX = 448.0
"""The largest number of e4m3."""


def four_bit(w: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [N, K/2], absmax fp32 [⌈NK / blocksize⌉]) in nf4 or fp4."""
    N, K = w.shape
    flat = w.contiguous().view(-1)
    codes = torch.empty(N * K // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-N * K // blocksize), dtype=torch.float32, device=w.device)
    for start in range(0, N * K, SLICE):
        v = flat[start : start + SLICE].to(torch.float32, copy=True)
        most = absmax[start // blocksize : -(-(start + v.numel()) // blocksize)]
        whole = v.numel() // blocksize
        blocks, rest = v[: whole * blocksize].view(whole, blocksize), v[whole * blocksize :]
        torch.amax(blocks.abs(), 1, out=most[:whole])
        # Whole blocks are multiplied by a reciprocal and a last, shorter one is divided, as bitsandbytes does: the two
        # give different bits.
        blocks *= (1 / most[:whole].clamp(min=1e-38))[:, None]
        if rest.numel():
            most[whole] = rest.abs().amax().clamp(min=1e-38)
            rest /= most[whole]
        nibbles = tables.nearest4(format, v.clamp_(-1, 1))
        codes[start // 2 : (start + v.numel()) // 2] = nibbles[::2] << 4 | nibbles[1::2]
    _refuse_nonfinite(w, absmax)
    return codes.view(N, K // 2), absmax


def absmax8(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (codes, table, absmax, offset) of double quantisation: absmax minus its mean in the dynamic map, in blocks
    of 256. The codes are uint8 of absmax's length, and the rest are the fields of `Nested`."""
    count = absmax.numel()
    offset = absmax.mean() if count else absmax.new_zeros(())
    if not offset.is_meta and not offset.isfinite():
        raise ValueError(
            f"the weight reaches {absmax.max().item():.4g}, and the sum of its {count} absmax overflows fp32: "
            "leave double_quant out, or scale the weight down"
        )
    v = absmax.new_zeros(-(-count // NESTED_BLOCKSIZE), NESTED_BLOCKSIZE)
    v.view(-1)[:count] = absmax - offset
    most = v.abs().amax(1)
    v = (v * (1 / most)[:, None]).clamp_(-1, 1).nan_to_num_(nan=-1.0)  # where most is 0: code 0, as in bitsandbytes
    codes = tables.nearest8(v).view(-1)[:count].clone()
    return codes, tables.dynamic(absmax.device).clone(), most, offset


def int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8 [N, K], absmax fp32 [N]) in int8."""
    N, K = w.shape
    codes = torch.empty(N, K, dtype=torch.int8, device=w.device)
    absmax = torch.zeros(N, dtype=torch.float32, device=w.device)
    step = max(1, SLICE // max(1, K))
    for n in range(0, N if K else 0, step):
        rows = w[n : n + step].float()
        most = rows.abs().amax(1)
        absmax[n : n + step] = most
        factor = (127 / most)[:, None]
        v = rows * factor
        if not w.is_meta and factor.isinf().any():  # most is 0, or so small that 127 / most overflows
            v = torch.where(factor.isinf(), rows / most[:, None].clamp(min=1e-45) * 127, v)
        codes[n : n + step] = v.round_().to(torch.int8)
    _refuse_nonfinite(w, absmax)
    if N and not w.is_meta and absmax.max() > torch.finfo(torch.float32).max / 127:
        raise ValueError(
            f"the weight reaches {absmax.max().item():.4g}, and code · absmax overflows fp32 in int8 from "
            f"{torch.finfo(torch.float32).max / 127:.4g} on: scale the weight down, or take nf4 or fp8"
        )
    return codes, absmax


def fp8(w: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Return (codes float8_e4m3fn [N, K], scales fp32) in fp8. The scales are [1, 1] for "tensor", [N, 1] for "row" and
    [⌈N/128⌉, ⌈K/128⌉] for "block"."""
    N, K = w.shape
    codes = torch.empty(N, K, dtype=torch.float8_e4m3fn, device=w.device)
    step = max(1, SLICE // max(1, K * FP8_BLOCK)) * FP8_BLOCK
    slices = [(n, min(N, n + step)) for n in range(0, N if K else 0, step)]
    shape = {"tensor": (1, 1), "row": (N, 1), "block": (-(-N // FP8_BLOCK), -(-K // FP8_BLOCK))}[scaling]
    absmax = torch.zeros(shape, dtype=torch.float32, device=w.device)
    for n0, n1 in slices:
        rows = w[n0:n1].float().abs()
        if scaling == "tensor":
            absmax = torch.maximum(absmax, rows.amax())
        elif scaling == "row":
            absmax[n0:n1] = rows.amax(1, keepdim=True)
        else:
            rows = pad(rows, (0, -K % FP8_BLOCK, 0, (n0 - n1) % FP8_BLOCK))
            tiles = rows.view(rows.shape[0] // FP8_BLOCK, FP8_BLOCK, shape[1], FP8_BLOCK)
            absmax[n0 // FP8_BLOCK : -(-n1 // FP8_BLOCK)] = tiles.amax((1, 3))
    _refuse_nonfinite(w, absmax)
    # A scale is at least the smallest normal number, so that zeros come back as zeros and 1 / scale is finite.
    scales = (absmax / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    for n0, n1 in slices:
        v = w[n0:n1].float() / fp8_spread(scales, (N, K), n0, n1)
        # A quotient rounded to just above 448 still becomes 448, since NaN begins at 464.
        codes[n0:n1] = v.to(torch.float8_e4m3fn)
    return codes, scales


def fp8_spread(scales: Tensor, shape: tuple[int, int], n0: int, n1: int) -> Tensor:
    """Return the fp8 scales of the rows n0 to n1 of W [N, K], in a shape that broadcasts with these rows."""
    N, K = shape
    if scales.shape == (N, 1) and N > 1:
        return scales[n0:n1]
    if scales.shape[0] > 1:
        scales = scales[torch.arange(n0, n1, device=scales.device) // FP8_BLOCK]
    return scales.repeat_interleave(FP8_BLOCK, dim=1)[:, :K] if scales.shape[1] > 1 else scales


def _refuse_nonfinite(w: Tensor, absmax: Tensor) -> None:
    """Raise ValueError where W is not finite. A maximum keeps NaN and infinity, so finite absmax prove a finite W."""
    if absmax.is_meta or absmax.isfinite().all():
        return
    bad = ~w.isfinite()
    first = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"{int(bad.sum())} of the {w.numel()} elements of the weight are NaN or infinite, the first of them "
        f"{w[first].item()} at {first}: it cannot be quantised"
    )
