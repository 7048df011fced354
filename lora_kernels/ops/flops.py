"""The FLOPs of the registered operators, for torch.utils.flop_counter.

    forward    2·M·N·K + 2·M·R·(K + N)                       x Wᵀ, h = x̂ Aᵀ, h Bᵀ
    backward   dx  2·M·N·K + 2·M·R·K + g                     dy W, g A
               da  2·M·R·K + g                               gᵀ x̂
               db  2·M·R·N                                   dyᵀ h
               g   2·M·N·R, once                             dy B
    many       2·M·N·K, and what is above for the M_i rows and the rank R_i of each adapter
    experts    what is above for the rows that have an expert
    DoRA       2·N·K·R + 2·R·R·(K + N), its norm             W Aᵀ, A Aᵀ, B (A Aᵀ)
    embedding  2·M·R·D, and each of da and db 2·M·R·D        h Bᵀ, dy B, dyᵀ h

These are the products that plain torch counts for the same layers, whichever back-end computes them and whatever the
format of W is. Masks, sums and the dequantising of W are not counted, as torch counts none of its own.

torch.utils.flop_counter imports Triton, so it is not imported here. `register` is called before an operator is, and
does its work only where somebody else has imported that module.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def register() -> None:
    """Register the formulas with torch's FLOP counter if it is loaded, and with every active counter, which has copied
    torch's table when it was made. A formula that a counter was given by its user stays.

    Nothing is done while compiling: torch.compile leaves a call under a counter to eager mode.
    """
    if torch.compiler.is_compiling():
        return
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    ours = torch.ops.lora_kernels
    # The operators of many adapters are registered when lora_linear_multi is first asked for.
    packets = {getattr(ours, name): formula for name, formula in FORMULAS.items() if hasattr(ours, name)}
    for packet, formula in packets.items():
        if packet not in module.flop_registry:
            module.register_flop_formula(packet, get_raw=formula in _OF_VALUES)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for packet in packets:
                counter.flop_registry.setdefault(packet, module.flop_registry[packet])


# torch passes a formula the arguments of the operator, with the shape of a tensor in place of each tensor.


def _forward(x: Any, w: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    (M, K), N, R = x, b[0], a[0]
    return 2 * M * (N * K + R * (K + N))


def _backward(  # type: ignore[no-untyped-def]
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db, *_: Any, **__: Any
) -> int:
    (M, N), (R, K) = dy, a
    total = 0
    if need_dx:
        total += 2 * M * K * (N + R)
    if need_dx or need_da:
        total += 2 * M * N * R
    if need_da:
        total += 2 * M * R * K
    if need_db:
        total += 2 * M * R * N
    return total


def _forward_group(x: Any, w: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return sum(_forward(x, *each) for each in zip(w, a, b, strict=True))


def _backward_group(  # type: ignore[no-untyped-def]
    dy, x, w, a, b, h, scale, p, seed, backend, need_dx, need_da, need_db, *_: Any, **__: Any
) -> int:
    rows = zip(dy, w, a, b, need_da, need_db, strict=True)
    return sum(_backward(dy, x, w, a, b, *[None] * 5, need_dx, da, db) for dy, w, a, b, da, db in rows)


def _base_gemm(x: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    (M, inner), columns = x, out_shape[-1]  # N and K in either order; the codes of W do not tell them
    total: int = 2 * M * inner * columns
    return total


def _dora_norm(w: Any, a: Any, *_: Any, **__: Any) -> int:
    N, (R, K) = w[0], a
    return 2 * N * K * R + 2 * R * R * (K + N)


def _embedding_forward(ids: Any, w: Any, a_t: Any, b: Any, *_: Any, **__: Any) -> int:
    (M,), (D, R) = ids, b
    return 2 * M * R * D


def _embedding_backward(  # type: ignore[no-untyped-def]
    dy, ids, w, a_t, b, d, factor, scale, embed_scale, padding_idx, h, need_da, need_db, need_dd, **_: Any
) -> int:
    return (bool(need_da) + bool(need_db or need_dd)) * _embedding_forward(ids, w, a_t, b)


def _embedding_norm(w: Any, a_t: Any, b: Any, *_: Any, **__: Any) -> int:
    (V, D), R = w, a_t[1]
    return 2 * V * D * R + 2 * R * R * (V + D)


# These get the tensors themselves, since the rows of each adapter are values.


def _forward_multi(x: Any, w: Any, bias: Any, a: Any, b: Any, *args: Any, **_: Any) -> int:
    M, K = x.shape
    N = next(each.shape[0] for each in b if each is not None)
    own = [_forward((M_i, K), None, *each) - 2 * M_i * N * K for M_i, *each in _with_rows(M, a, b, args[4])]
    return 2 * M * N * K + sum(own)


def _backward_multi(  # type: ignore[no-untyped-def]
    dy, x, w, h, a, b, scale, p, seed, order, starts, backend, need_dx, need_da, need_db, *_: Any, **__: Any
) -> int:
    M, N = dy.shape
    K = next(each.shape[1] for each in a if each is not None)
    total = 2 * M * N * K if need_dx else 0
    for i, (M_i, own_a, own_b) in enumerate(_with_rows(M, a, b, starts)):
        needs = [need_dx, need_da[i], need_db[i]]
        total += _backward((M_i, N), None, None, own_a, own_b, *[None] * 5, *needs) - 2 * M_i * N * K * need_dx
    return total


def _with_rows(M: int, a: Any, b: Any, starts: Any) -> list[tuple[int, Any, Any]]:
    """Return (its number of rows, the shapes of its A and B) for each adapter; rank 0 stands for None. Of rows whose
    numbers are not known, as in fake tensors, all are counted for the adapter of the largest rank."""
    K = next(each.shape[1] for each in a if each is not None)
    ranks = [0 if each is None else each.shape[0] for each in a]
    if type(starts) is torch.Tensor:
        counts = [after - before for before, after in itertools.pairwise(starts.tolist())]
    else:
        counts = [M if i == ranks.index(max(ranks)) else 0 for i in range(len(ranks))]
    N = next(each.shape[0] for each in b if each is not None)
    return [(count, (R, K), (N, R)) for count, R in zip(counts, ranks, strict=True)]


def _forward_experts(x: Any, w: Any, a: Any, b: Any, *args: Any, **_: Any) -> int:
    (_, K), M = x.shape, _rows_of_experts(x, args[5])
    return _forward((M, K), None, a.shape[1:], b.shape[1:])


def _backward_experts(  # type: ignore[no-untyped-def]
    dy, x, w, a, b, h, scale, p, seed, order, starts, backend, *needs: Any, **_: Any
) -> int:
    rows = _rows_of_experts(dy, starts), dy.shape[1]
    return _backward(rows, None, None, a.shape[1:], b.shape[1:], *[None] * 5, *needs)


def _rows_of_experts(rows: Any, starts: Any) -> int:
    """Return the number of rows that have an expert; of a tensor without values, such as a fake one, all have."""
    return int(starts[-1]) if type(starts) is torch.Tensor else rows.shape[0]


FORMULAS = {
    "forward": _forward,
    "backward": _backward,
    "forward_group": _forward_group,
    "backward_group": _backward_group,
    "base_gemm": _base_gemm,
    "dora_norm": _dora_norm,
    "embedding_forward": _embedding_forward,
    "embedding_backward": _embedding_backward,
    "embedding_norm": _embedding_norm,
    "forward_multi": _forward_multi,
    "backward_multi": _backward_multi,
    "forward_experts": _forward_experts,
    "backward_experts": _backward_experts,
}
"""The formula of each operator that multiplies matrices, by the operator's name."""

_OF_VALUES = (_forward_multi, _backward_multi, _forward_experts, _backward_experts)
"""The formulas that read values, and not only shapes."""
