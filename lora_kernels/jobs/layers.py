"""`JobLinear`: a frozen linear layer with an adapter for each job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.core.many import Adapter
from lora_kernels.core.rows import Rows
from lora_kernels.nn.quantized import QuantizedLoRALinear, quantized_linear
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.multi import lora_linear_multi
from lora_kernels.quant.weight import QuantizedWeight


class Active(NamedTuple):
    """The adapters that a forward of the model computes with."""

    keys: tuple[str, ...]
    """The keys of the jobs, in the order of the ids of `rows`."""
    rows: Callable[[Tensor], Rows]
    """Returns which rows of a layer's x are whose."""
    seeds: Mapping[str, Tensor] | None
    """The seeds of each job's dropout, int64 with one for each of its layers. None where dropout is off, and the
    adapters get no gradients."""


class Current:
    """What the layers of one `Jobs` compute at present. All of them share it.

    It is no context variable, because on a GPU activation checkpointing computes a layer again in a thread of autograd,
    which sees no context variables of the thread that called ``backward``.
    """

    def __init__(self) -> None:
        self.active: Active | None = None

    @contextlib.contextmanager
    def computing(self, active: Active) -> Iterator[None]:
        """Compute with these adapters. Raises RuntimeError while others are computed with, as by another thread."""
        if self.active is not None:
            raise RuntimeError("this Jobs computes a forward already: it serves one thread, and one context at a time")
        self.active = active
        try:
            yield
        finally:
            self.active = None


class Entry(NamedTuple):
    """A job's place in a layer."""

    number: int
    """The number of the layer among those of the job, by which its seed is found."""
    settings: LoRASettings


class JobLinear(nn.Module):
    """y_m = W x_m + bias + s_i · B_i (A_i dropout_i(x_m)) for the job i of row m, with W and bias frozen.

    It stands in the place of `base_layer`, an ``nn.Linear`` or a `QuantizedLoRALinear` whose own adapter is not
    computed. Outside of `Jobs.step` and `Jobs.using` it computes what the frozen layer computes. A layer that a forward
    calls twice has the same dropout mask in both.
    """

    def __init__(self, base_layer: nn.Linear | QuantizedLoRALinear, current: Current, backend: str | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.backend = backend
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.entries: dict[str, Entry] = {}
        self._current = current
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or the codes of a quantised one."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., N] for x = `input` [..., K]. Raises what `lora_linear_multi` raises."""
        active, base = self._current.active, self.base_layer
        quantised = isinstance(base, QuantizedLoRALinear)
        weight: Tensor | QuantizedWeight = base.quantized_weight() if quantised else base.weight
        adapters = [] if active is None else [self._adapter(key, active.seeds) for key in active.keys]
        if active is None or all(each is None for each in adapters):
            if isinstance(weight, QuantizedWeight):
                return quantized_linear(input, weight, base.bias, self.backend)
            return base(input)
        return lora_linear_multi(input, weight, adapters, active.rows(input), bias=base.bias, backend=self.backend)

    def _adapter(self, key: str, seeds: Mapping[str, Tensor] | None) -> Adapter | None:
        """Return the adapter of a job as `lora_linear_multi` takes it, or None where the job has none here."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        a, b, (number, settings) = self.lora_A[key], self.lora_B[key], entry
        if seeds is None:
            return Adapter(a.detach(), b.detach(), settings.scaling)
        p = settings.lora_dropout
        return Adapter(a, b, settings.scaling, p, seeds[key][number] if p else None)

    def put(self, key: str, entry: Entry, a: nn.Parameter, b: nn.Parameter) -> None:
        """Add the adapter of a job."""
        self.entries[key] = entry
        self.lora_A[key], self.lora_B[key] = a, b

    def take(self, key: str) -> None:
        """Remove the adapter of a job."""
        del self.entries[key], self.lora_A[key], self.lora_B[key]

    def extra_repr(self) -> str:
        """Return the ranks that ``repr`` shows."""
        return f"ranks={[entry.settings.r for entry in self.entries.values()]}"


def shape_of(base: nn.Linear | QuantizedLoRALinear) -> tuple[int, int]:
    """Return (N, K) of a layer's W."""
    return base.out_features, base.in_features


def dtype_of(base: nn.Linear | QuantizedLoRALinear) -> torch.dtype:
    """Return the dtype of a layer's W; that of the dense W if it is quantised."""
    return base.weight_dtype if isinstance(base, QuantizedLoRALinear) else base.weight.dtype
