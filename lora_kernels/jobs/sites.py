"""The layers of a model that jobs adapt: which they are, and how `JobLinear` gets into their places and out of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.core.rows import Rows
from lora_kernels.jobs.job import LoRAConfig
from lora_kernels.jobs.layers import Entry, JobLinear, Running, dtype_of, shape_of
from lora_kernels.models.names import plain_names
from lora_kernels.models.selection import Target, select
from lora_kernels.models.targets import some
from lora_kernels.nn import readers
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.mixed import Mixable
from lora_kernels.nn.quantized import QuantizedLoRALinear

AdapterValues = dict[str, tuple[nn.Parameter, nn.Parameter]]
"""A and B of a job by the name of the layer."""


class Sites:
    """The layers of one model that jobs adapt. The model is frozen as long as it is in use."""

    def __init__(self, model: nn.Module, adapter_dtype: torch.dtype | None, backend: str | None) -> None:
        self.model = model
        self._keys: dict[str, str] = {}
        self.adapter_dtype, self._backend = adapter_dtype, backend
        self._layers: dict[str, JobLinear] = {}
        self._reopen: list[Callable[[], None]] = []
        _refuse_adapted(model)
        self.frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self.frozen:
            parameter.requires_grad = False

    def choose(self, config: LoRAConfig) -> list[Target]:
        """Return the layers that a job adapts, each with its settings. Raises what `lora_kernels.apply_lora` raises."""
        with self._plain():
            targets = select(self.model, config.settings(self.adapter_dtype), config.rules).targets
        for target in targets:
            target.settings.check()
        other = [f"{t.name} (a {type(t.module).__name__})" for t in targets if t.kind is not FusedLoRALinear]
        if other:
            raise ValueError(f"jobs adapt nn.Linear layers only, and target_modules match {some(other)}: name others")
        return targets

    def new_values(self, targets: list[Target], generator: torch.Generator) -> AdapterValues:
        """Return the first A and B of each layer: A Kaiming-uniform(√5), that is uniform in ±1/√K, and B zero."""
        values: AdapterValues = {}
        for name, settings in ((each.name, each.settings) for each in targets):
            base = self._base(name)
            (N, K), dtype, device = shape_of(base), settings.dtype_beside(dtype_of(base)), base.weight.device
            bound = K**-0.5
            a = torch.empty(settings.r, K).uniform_(-bound, bound, generator=generator)
            values[name] = (
                nn.Parameter(a.to(device, dtype)),
                nn.Parameter(torch.zeros(N, settings.r, dtype=dtype, device=device)),
            )
        return values

    def put(self, name: str, key: str, targets: list[Target], values: AdapterValues) -> None:
        """Put the adapter of a job into its layers. The layers know it by `key`."""
        new = {t.name: JobLinear(self._base(t.name), self._keys, self._backend) for t in targets}
        new = {place: layer for place, layer in new.items() if place not in self._layers}
        _swap(self.model, {layer.base_layer: layer for layer in new.values()})
        self._layers.update(new)
        for number, target in enumerate(targets):
            self._layers[target.name].put(key, Entry(number, target.settings), *values[target.name])
        self._keys[name] = key
        if new:
            self._reopen.append(readers.close_fast_paths(self.model, JobLinear))

    def take(self, name: str) -> None:
        """Take the adapter of a job out of the model, and the layers that no job adapts any more."""
        key = self._keys.pop(name)
        for layer in self._layers.values():
            if key in layer.entries:
                layer.take(key)
        unused = {name: layer for name, layer in self._layers.items() if not layer.entries}
        _swap(self.model, {layer: layer.base_layer for layer in unused.values()})
        for place in unused:
            del self._layers[place]

    def close(self) -> None:
        """Put every layer back, with the choice of what is trained that was found."""
        _swap(self.model, {layer: layer.base_layer for layer in self._layers.values()})
        self._layers.clear()
        self._keys.clear()
        while self._reopen:
            self._reopen.pop()()
        for parameter, requires_grad in self.frozen:
            parameter.requires_grad = requires_grad

    def entries(self, name: str) -> dict[str, Entry]:
        """Return a job's place in each of its layers, by the name of the layer."""
        key = self._keys[name]
        return {place: layer.entries[key] for place, layer in self._layers.items() if key in layer.entries}

    def running(
        self, names: Sequence[str], rows_of: Callable[[Tensor], Rows], seeds: Sequence[Sequence[Tensor]] | None = None
    ) -> Running:
        """Return a context in which the model computes with the adapters of these jobs, and with dropout of these
        seeds."""
        layers = frozenset(id(layer) for layer in self._layers.values())
        mixable = Mixable(layers, {name: i for i, name in enumerate(self._keys)})
        keys = tuple(self._keys[name] for name in names)
        return Running(mixable, keys, rows_of, None if seeds is None else dict(zip(keys, seeds, strict=True)))

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        """Give the model plain ``nn.Linear`` layers, by which the rules choose: those that were there, and layers
        without values for quantised ones."""
        stand_ins: dict[nn.Module, nn.Module] = {layer: _plain_of(layer.base_layer) for layer in self._layers.values()}
        inside = {id(layer.base_layer) for layer in self._layers.values()}
        for module in self.model.modules():
            if isinstance(module, QuantizedLoRALinear) and id(module) not in inside:
                stand_ins[module] = _plain_of(module)
        _swap(self.model, stand_ins)
        try:
            yield
        finally:
            _swap(self.model, {plain: layer for layer, plain in stand_ins.items()})

    def _base(self, name: str) -> nn.Linear | QuantizedLoRALinear:
        """Return the frozen layer with this plain name."""
        if name in self._layers:
            return self._layers[name].base_layer
        found = next(module for plain, _, module in plain_names(self.model) if plain == name)
        assert isinstance(found, (nn.Linear, QuantizedLoRALinear))
        return found


def _plain_of(base: nn.Linear | QuantizedLoRALinear) -> nn.Linear:
    if isinstance(base, nn.Linear):
        return base
    return nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")


def _swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules into the places of others, wherever these stand in the model."""
    if not new:
        return
    for parent in list(model.modules()):
        if isinstance(parent, JobLinear):
            continue
        for child, module in list(parent._modules.items()):
            if module is not None and module in new:
                parent._modules[child] = new[module]


def _refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError for a model with adapters that jobs would not compute, or that another `Jobs` trains."""
    modules = {name or "the model": module for name, _, module in plain_names(model)}
    own = [name for name, module in modules.items() if isinstance(module, JobLinear)]
    if own:
        raise ValueError(f"the model belongs to another Jobs ({some(own)}): call its close() first, or its add()")
    foreign = [name for name, module in modules.items() if type(module).__module__.partition(".")[0] == "peft"]
    if foreign:
        raise ValueError(
            f"the model has layers of PEFT ({some(foreign)}), and jobs put adapters of their own on the plain model: "
            "take model.unload(), or model.merge_and_unload() where its adapter is to stay in the base"
        )
    fused = [
        name
        for name, module in modules.items()
        if isinstance(module, AdapterLayer) and not isinstance(module, QuantizedLoRALinear)
    ]
    if fused:
        raise ValueError(
            f"the model has layers with adapters already ({some(fused)}), and jobs put adapters of their own on the "
            "plain model: merge_and_unload(model) first"
        )
    trained = [
        name
        for name, module in modules.items()
        if isinstance(module, QuantizedLoRALinear) and (module.merged or bool(module.lora_B.detach().any()))
    ]
    if trained:
        raise ValueError(
            f"these quantised layers have a trained or merged adapter, which jobs would not compute: {some(trained)}. "
            "Start from layers whose adapter is new, as apply_lora(model, quant=...) makes them"
        )
