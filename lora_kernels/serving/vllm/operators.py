"""vLLM's LoRA operators, computed once for each adapter instead of once for each row.

vLLM asks an object, its "Punica wrapper", to add the low-rank half to results of its own layers. `LowRankOperators` is
the part of such a class that computes. It needs these names of vLLM's own class, beside which it is inherited:
``update_metadata``, and ``token_lora_indices`` and ``sampler_indices``, the slot of each row of a step and of each row
that is sampled from; -1 is a row without an adapter.

In vLLM's operators, tensors named "stacked" hold the adapters by slot: A [slots, 1, largest rank, K], B [slots, 1, N,
largest rank]. There is one pair for each slice of a fused layer such as q, k and v. B holds the adapter's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter
from lora_kernels.core.rows import BASE, Rows
from lora_kernels.ops.low_rank_multi import add_low_rank_multi_
from lora_kernels.serving.vllm.slots import LayoutsOfSlots


class LowRankOperators:
    """The operators that add the low-rank half of LoRA layers in place."""

    token_lora_indices: Tensor
    sampler_indices: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layouts = LayoutsOfSlots()
        self._slots = 0
        """The number of vLLM's slots."""
        self._rows: dict[tuple[str, int], Rows] = {}
        """The rows of this step by what they are, and their number. `update_metadata` makes them stale."""

    def update_metadata(self, mapping: Any, lora_index_to_id: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """Take over which row has which adapter, at the beginning of a step."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)  # type: ignore[misc]
        self._slots = len(lora_index_to_id)
        self._rows.clear()

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add scale · (x Aᵀ) Bᵀ of each slice to its columns of y [M, ΣN], in the rows of each adapter."""
        if buffer is not None:  # the caller wants the products x Aᵀ too
            self.add_shrink(buffer, x, lora_a_stacked, scale, **kwargs)
            self.add_expand(y, buffer, lora_b_stacked, output_slices, **kwargs)
            return
        y, x = _flat(y), _flat(x)
        rows = self._rows_of("tokens", x.shape[0])
        if not rows.used:
            return
        first = 0
        for a, b, N in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            self._add(y[:, first : first + N], x, a, b, scale, rows)
            first += N

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add scale · (x Aᵀ) Bᵀ to the logits y [M, ≥ N] of the rows that are sampled from. `buffer` is room for
        x Aᵀ, which is not needed."""
        y, x = _flat(y), _flat(x)
        rows = self._rows_of("samples", x.shape[0])
        if rows.used:
            columns = min(lora_b_stacked.shape[-2], y.shape[1])  # vLLM pads the two differently
            self._add(y[:, :columns], x, lora_a_stacked, lora_b_stacked, scale, rows)

    def add_shrink(
        self, y: Sequence[Tensor] | Tensor, x: Tensor, lora_a_stacked: Sequence[Tensor], scale: float, **kwargs: Any
    ) -> None:
        """Write scale · x Aᵀ of each slice i to y[i] [M, R]; zeros in the rows without an adapter."""
        x = _flat(x)
        rows = self._rows_of("tokens", x.shape[0])
        for h, a in zip(y, lora_a_stacked, strict=True):
            own = _flat(h)[:, : a.shape[-2]]
            own.zero_()
            for slot in rows.used:
                index = rows.index(slot)
                own[index] = (x[index].to(own.dtype) @ a[slot].flatten(0, -2).to(own.dtype).t()).mul_(scale)

    def add_expand(
        self,
        y: Tensor,
        x: Sequence[Tensor] | Tensor,
        lora_b_stacked: Sequence[Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add x[i] Bᵀ of each slice i to its columns of y, or write it there, in the rows of each adapter. x[i] [M, R]
        comes from `add_shrink`. The columns of the first slice begin at `offset_start`."""
        y, first = _flat(y), offset_start
        for h, b, N in zip(x, lora_b_stacked, output_slices, strict=True):
            self._expand(y[:, first : first + N], _flat(h), b, add_inputs)
            first += N

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add x Bᵀ to y [M, N], or write it there, in the rows of each adapter. x [M, R] are rows of Aᵀ."""
        y = _flat(y)
        columns = min(lora_b_stacked.shape[-2], y.shape[1])
        self._expand(y[:, :columns], _flat(x), lora_b_stacked, add_inputs)

    def _expand(self, y: Tensor, h: Tensor, b: Tensor, add: bool) -> None:
        """Add h Bᵀ to y, or write it there, in the rows of each adapter. The product is computed in fp32."""
        wide = torch.promote_types(torch.promote_types(h.dtype, y.dtype), torch.float32)
        rows = self._rows_of("tokens", h.shape[0])
        for slot in rows.used:
            index = rows.index(slot)
            own = b[slot].flatten(0, -2)[: y.shape[1]].to(wide)
            product = h[index].to(wide) @ own.t()
            y[index] = (y[index] + product if add else product).to(y.dtype)

    def _add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, rows: Rows) -> None:
        """Add scale · (x Aᵀ) Bᵀ to y [M, N] in the rows of each adapter."""
        if x.dtype != y.dtype:  # such as logits in fp32 beside hidden states in bf16
            wide = torch.promote_types(x.dtype, y.dtype)
            own = y.to(wide)
            self._add(own, x.to(wide), a, b, scale, rows)
            if own is not y:
                y.copy_(own)
            return
        dtype = a.dtype if a.dtype == b.dtype == y.dtype else torch.float32
        adapters: AdapterStack | list[Adapter | None] = self._layouts.adapters(a, b, rows.used, dtype)
        N = y.shape[1]
        if scale != 1 or b.shape[-2] != N:
            adapters = [each and each._replace(b=each.b[:N], scale=scale) for each in adapters]
        add_low_rank_multi_(y, x, adapters, rows)

    def _rows_of(self, which: str, M: int) -> Rows:
        """Return which of M rows have which adapter, made once for each step. `which` is "tokens" or "samples".

        One slot that vLLM has named stands for all rows. Tokens after those that it has named are padding and have no
        adapter. Raises ValueError for any other difference between the numbers of rows.
        """
        rows = self._rows.get((which, M))
        if rows is None:
            ids = self.token_lora_indices if which == "tokens" else self.sampler_indices
            named = ids.shape[0]
            if named == 1:
                ids = ids.expand(M)
            elif named < M and which == "tokens":
                ids = F.pad(ids, (0, M - named), value=BASE)
            elif named != M:
                raise ValueError(f"vLLM has named the adapters of {named} {which}, and the layer has {M} rows")
            rows = self._rows[which, M] = Rows.by_id(ids, self._slots)
        return rows


def _flat(t: Tensor) -> Tensor:
    """Return a view of t with two dimensions."""
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])
