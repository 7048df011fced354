"""The base GEMM on a CPU: torch's own path (MKL for fp32) or oneDNN's linear, whichever is faster here for such a call.

Which one wins depends on the processor (in fp32 oneDNN on AMD, mostly MKL on Intel), the dtype and the shape, so the
first call of each class times both on its own operands. A class is the dtype, the number of threads, whether w is a
transposed view (dx = dy w), and the powers of four that M and the size of w lie between. The choice holds for the life
of the process: results do not change from call to call.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_REPEATS = 3
_MARGIN = 0.95
"""oneDNN is taken where its time is below this part of torch's: noise alone should not decide."""

Key = tuple[torch.dtype, int, bool, int, int]
_choices: dict[Key, str] = {}


def base_gemm(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + bias [M,N], fresh and contiguous; w [N,K] of any strides."""
    M, N, K = x.shape[0], *w.shape
    key = (x.dtype, torch.get_num_threads(), w.stride(1) != 1, M.bit_length() // 2, (N * K).bit_length() // 2)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _faster(x, w, bias)
    return _GEMMS[choice](x, w, bias)


def base_gemm_choices() -> dict[str, str]:
    """What this process has settled on so far: a description of the class of calls, and "torch" or "onednn"."""
    return {
        f"{str(dtype).removeprefix('torch.')}, {threads} threads, {'w transposed' if transposed else 'w as stored'}, "
        f"M {4**m // 2 or 1}..{2 * 4**m - 1}, {4**n // 2 or 1}..{2 * 4**n - 1} weights": choice
        for (dtype, threads, transposed, m, n), choice in sorted(_choices.items(), key=str)
    }


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


_GEMMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"torch": F.linear, "onednn": _onednn}


def _faster(x: Tensor, w: Tensor, bias: Tensor | None) -> str:
    mkldnn = torch.backends.mkldnn
    if not (x.numel() and w.numel() and mkldnn.is_available() and mkldnn.enabled):
        return "torch"
    best = dict.fromkeys(_GEMMS, float("inf"))
    for repeat in range(_REPEATS + 1):
        for name, gemm in _GEMMS.items():
            start = time.perf_counter()
            try:
                gemm(x, w, bias)
            except (RuntimeError, AttributeError, NotImplementedError):
                if name == "torch":
                    raise
                return "torch"  # a private operator: absent, or it refuses the dtype on this processor
            if repeat:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return "onednn" if best["onednn"] < _MARGIN * best["torch"] else "torch"
