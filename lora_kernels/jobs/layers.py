"""`JobLinear`: a frozen linear layer with an adapter for each job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.core.many import Adapter
from lora_kernels.core.rows import Rows
from lora_kernels.nn.in_force import current_for
from lora_kernels.nn.mixed import Mixable, Mixed
from lora_kernels.nn.quantized import QuantizedLoRALinear, quantized_linear
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.ops.multi import lora_linear_multi
from lora_kernels.quant.weight import QuantizedWeight


class Running(Mixed):
    """The context in which `Jobs` computes its model: some of the jobs, with rows that depend on a layer's x."""

    def __init__(
        self,
        mixable: Mixable,
        keys: tuple[str, ...],
        rows_of: Callable[[Tensor], Rows],
        seeds: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__(mixable, Rows.by_length([], []))
        self.keys = keys
        """The keys of the jobs, in the order of the ids of the rows."""
        self.rows_of = rows_of
        """Returns which rows of a layer's x are whose."""
        self.seeds = seeds
        """The seeds of each job's dropout, one for each of its layers. None where dropout is off."""


class Entry(NamedTuple):
    """A job's place in a layer."""

    number: int
    """The number of the layer among those of the job, by which its seed is found."""
    settings: LoRASettings


class JobLinear(nn.Module):
    """y_m = W x_m + bias + s_i · B_i (A_i dropout_i(x_m)) for the job i of row m, with W and bias frozen.

    It stands in the place of `base_layer`, an ``nn.Linear`` or a `QuantizedLoRALinear` whose own adapter is not
    computed. Outside of `Jobs.step`, `Jobs.using` and `lora_kernels.mixed` it computes what the frozen layer computes.
    A layer that a forward calls twice has the same dropout mask in both.
    """

    def __init__(
        self, base_layer: nn.Linear | QuantizedLoRALinear, jobs: Mapping[str, str], backend: str | None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.backend = backend
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.entries: dict[str, Entry] = {}
        self._jobs = jobs  # the keys of all jobs by name, which the layers share
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or the codes of a quantised one."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    @staticmethod
    def adapter_table(model: nn.Module) -> dict[str, int]:
        """Return the numbers of the jobs by name, which `lora_kernels.mixed` takes as ids."""
        jobs = next(module._jobs for module in model.modules() if isinstance(module, JobLinear))
        return {name: i for i, name in enumerate(jobs)}

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., N] for x = `input` [..., K]. Raises what `lora_linear_multi` raises."""
        base, context = self.base_layer, current_for(self)
        weight: Tensor | QuantizedWeight = (
            base.quantized_weight() if isinstance(base, QuantizedLoRALinear) else base.weight
        )
        if context is None:
            return self._frozen(input, weight)
        if isinstance(context, Running):
            keys, rows, seeds = context.keys, context.rows_of(input), context.seeds
        else:
            keys, rows, seeds = tuple(self._jobs.values()), context.of(input), None
        adapters = [self._adapter(key, seeds) for key in keys]
        if all(each is None for each in adapters):
            return self._frozen(input, weight)
        y = lora_linear_multi(input, weight, adapters, rows, bias=base.bias, backend=self.backend)
        return context.computed(self, y)

    def _frozen(self, x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        """Return x Wᵀ + bias."""
        if isinstance(weight, QuantizedWeight):
            return quantized_linear(x, weight, self.base_layer.bias, self.backend)
        return F.linear(x, weight, self.base_layer.bias)

    def _adapter(self, key: str, seeds: Mapping[str, Sequence[Tensor]] | None) -> Adapter | None:
        """Return the adapter of a job as `lora_linear_multi` takes it, or None where the job has none here."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        number, settings = entry
        p = 0.0 if seeds is None else settings.lora_dropout
        seed = seeds[key][number] if seeds is not None and p else None
        return Adapter(self.lora_A[key], self.lora_B[key], settings.scaling, p, seed)

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
