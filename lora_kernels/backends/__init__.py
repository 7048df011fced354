"""The back-ends: modules with the same four names, and the facts they judge a call by.

A back-end is a module ``lora_kernels.backends.<name>`` with

* ``name``: what ``backend="..."`` calls it,
* ``why_not(call)``: every reason why it cannot serve ``call``, as sentences; an empty list where it can,
* ``forward(x, w, a, b, bias, scale, p, seed, save_h) -> (y, h)``: ``h`` is None unless ``save_h``,
* ``backward(dy, x, w, a, b, h, scale, p, seed, need_dx, need_da, need_db) -> (dx, da, db)``: None for what is not
  needed.

``w`` is a tensor, or a `QuantizedWeight` where ``call.w_format`` says so and ``why_not`` agreed. All tensors are
two-dimensional (``bias`` one-dimensional, ``seed`` zero-dimensional int64, or None where p is 0), of
any strides. ``x`` is None where ``need_da`` is false, ``h`` where ``need_db`` is false. Results are fresh and
contiguous; nothing received is written to.

A back-end may have, for layers that read the same x,

* ``forward_group(x, branches, save_h) -> (ys, hs)``,
* ``backward_group(dys, x, branches, hs, need_dx, need_da, need_db) -> (dx, das, dbs)``, with one dx for all.

There ``branches`` is a sequence of `Branch`, and everything in the plural a list with one entry for each. One that has
not is called once for each branch.

A back-end for a GPU also has ``EVIDENCE``, the architectures ("sm_90") for which ``bench/results/`` holds a run. The
automatic choice passes over a GPU back-end without evidence; asking for it by name does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a back-end needs to know of a call to say whether it can serve it. Hashable, so that the choice is made once
    per kind of call."""

    op: str
    """"forward" or "backward"."""
    device: torch.device
    dtype: torch.dtype
    """Of x, w, bias, y, dy and dx."""
    adapter_dtype: torch.dtype
    """Of a and b, and so of da and db."""
    M: int
    N: int
    K: int
    R: int
    dropout: bool
    w_format: str = "dense"
    """Or a format of `lora_kernels.quant`: w is a `QuantizedWeight` then."""


class Branch(NamedTuple):
    """One of the layers that read the same x: the frozen w, and its adapter."""

    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float
    p: float
    seed: Tensor | None
