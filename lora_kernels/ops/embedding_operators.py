"""The passes of an embedding with LoRA as operators that torch knows, for compilers, modes and profilers: functions of
the same names and arguments as in `embedding_passes`."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import embedding_passes, flops
from lora_kernels.ops.embedding_passes import Table, is_turned
from lora_kernels.ops.registered import library

_TABLE = "Tensor ids, Tensor w, Tensor a_t, Tensor b, Tensor? d, Tensor? factor, float scale, float embed_scale, "
library.define(f"embedding_forward({_TABLE}int? padding_idx, bool save_h) -> (Tensor y, Tensor h)")
library.define(
    f"embedding_backward(Tensor dy, {_TABLE}int? padding_idx, Tensor? h, bool need_da, bool need_db, bool need_dd) "
    "-> (Tensor da_t, Tensor db, Tensor dd)"
)


def forward(table: Table, save_h: bool) -> tuple[Tensor, Tensor | None]:
    """Return (y [M, D], h [M, R]); h has no elements unless `save_h`."""
    flops.register()
    return _forward_op(*table, save_h)


def backward(
    dy: Tensor, table: Table, h: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (da_t [V, R], db [D, R], dd [D]); a gradient that `needs` does not ask for has no elements."""
    flops.register()
    return _backward_op(dy, *table, h, *needs)


def _run_forward(*args):  # type: ignore[no-untyped-def]
    *table, save_h = args
    y, h = embedding_passes.forward(Table(*table), save_h)
    return y, table[2].new_empty(0) if h is None else h


def _fake_forward(ids, w, a_t, b, d, factor, scale, embed_scale, padding_idx, save_h):  # type: ignore
    M, R = ids.shape[0], a_t.shape[1]
    return w.new_empty(M, w.shape[1]), a_t.new_empty(M, R) if save_h else a_t.new_empty(0)


def _run_backward(dy, *args):  # type: ignore[no-untyped-def]
    *table, h, need_da, need_db, need_dd = args
    a_t, b = table[2], table[3]
    found = embedding_passes.backward(dy, Table(*table), h, (need_da, need_db, need_dd))
    return tuple(like.new_empty(0) if t is None else t for t, like in zip(found, (a_t, b, b), strict=True))


def _fake_backward(  # type: ignore
    dy, ids, w, a_t, b, d, factor, scale, embed_scale, padding_idx, h, need_da, need_db, need_dd
):
    (V, R), D = a_t.shape, b.shape[0]
    da_t = a_t.new_empty(0) if not need_da else a_t.new_empty(R, V).t() if is_turned(a_t) else a_t.new_empty(V, R)
    db = b.new_empty(D, R) if need_db else b.new_empty(0)
    wide = torch.promote_types(a_t.dtype, torch.float32)
    return da_t, db, b.new_empty(D, dtype=wide) if need_dd else b.new_empty(0)


for _name, _run, _fake in (
    ("embedding_forward", _run_forward, _fake_forward),
    ("embedding_backward", _run_backward, _fake_backward),
):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=library)
_forward_op = torch.ops.lora_kernels.embedding_forward.default
_backward_op = torch.ops.lora_kernels.embedding_backward.default
