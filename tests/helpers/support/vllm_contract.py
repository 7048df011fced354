"""What vLLM's LoRA operators compute, in plain torch, and stand-ins for the classes of vLLM that call them.

The contract: x [M, K] and y [M, ≥ N] are rows of a step, ids [M] gives the slot of each, and -1 is a row without an
adapter, which keeps its y. A [slots, 1, largest rank, K] and B [slots, 1, N, largest rank] hold an adapter in their
first ranks and zeros after it; B has the adapter's scale. y's columns of a slice get scale · (x Aᵀ) Bᵀ added.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.serving.vllm.operators import LowRankOperators


class Wrapper:
    """A stand-in for vLLM's wrapper class: it remembers the slots of a step in buffers that it writes over."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: str, **kwargs: Any) -> None:
        self._tokens = torch.full((max_num_batched_tokens,), 99)
        self._samples = torch.full((max_num_batched_tokens,), 99)
        self._lengths = [0, 0]

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        slots = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
        for at, (buffer, ids) in enumerate(
            ((self._tokens, mapping.index_mapping), (self._samples, mapping.prompt_mapping))
        ):
            self._lengths[at] = len(ids)
            buffer[: len(ids)] = torch.tensor([slots[i] if i > 0 else -1 for i in ids], dtype=torch.int64)

    @property
    def token_lora_indices(self) -> Tensor:
        return self._tokens[: self._lengths[0]]

    @property
    def sampler_indices(self) -> Tensor:
        return self._samples[: self._lengths[1]]


class Operators(LowRankOperators, Wrapper):
    """Our operators beside the stand-in, as vLLM makes them."""

    def __init__(self) -> None:
        super().__init__(1024, 64, device="cpu", lora_config=None)

    def step(self, tokens: Sequence[int], samples: Sequence[int] = (), slots: int = 4) -> Operators:
        """Begin a step whose rows have the slots `tokens`, and the rows sampled from the slots `samples`."""
        mapping = SimpleNamespace(
            index_mapping=tuple(i + 1 for i in tokens), prompt_mapping=tuple(i + 1 for i in samples), is_prefill=True
        )
        self.update_metadata(mapping, [i + 1 for i in range(slots)], slots + 1, 1000)
        return self


class Layer:
    """A stand-in for a LoRA layer of vLLM: zero-padded stacks for its slices, and slots that are written in place."""

    def __init__(self, K: int, outputs: Sequence[int], slots: int = 4, largest: int = 32, dtype=torch.float32) -> None:
        self.outputs = tuple(outputs)
        self.a = tuple(torch.zeros(slots, 1, largest, K, dtype=dtype) for _ in outputs)
        self.b = tuple(torch.zeros(slots, 1, N, largest, dtype=dtype) for N in outputs)

    def reset(self, slot: int) -> None:
        for t in (*self.a, *self.b):
            t[slot] = 0

    def set(self, slot: int, R: int) -> None:
        """Put a new random adapter into a slot."""
        self.reset(slot)
        for a, b in zip(self.a, self.b, strict=True):
            K, N = a.shape[-1], b.shape[-2]
            a[slot, 0, :R].copy_((torch.randn(R, K) * K**-0.5).to(a.dtype), non_blocking=True)
            b[slot, 0, :, :R].copy_((torch.randn(N, R) * R**-0.5).to(b.dtype), non_blocking=True)

    def add(self, operators: LowRankOperators, y: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
        """Let `operators` add the layer's low-rank half to y, and return y."""
        operators.add_lora_linear(y, x, self.a, self.b, scale, self.outputs)
        return y

    def expected(self, y: Tensor, x: Tensor, ids: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Return y with the low-rank half of each row added, computed in `dtype` with one product for each slot."""
        y, first = y.to(dtype, copy=True), 0
        for a, b, N in zip(self.a, self.b, self.outputs, strict=True):
            for slot in range(a.shape[0]):
                mine = torch.tensor(ids) == slot
                h = x[mine].to(dtype) @ a[slot, 0].to(dtype).t()
                y[mine, first : first + N] += scale * (h @ b[slot, 0].to(dtype).t())
            first += N
        return y
