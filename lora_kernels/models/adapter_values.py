"""The values of stored adapters in a model: in new layers, or in the layers that it has. All are written, or none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.models import inject
from lora_kernels.models.adapter_checks import (
    check_kind,
    check_names,
    check_shapes,
    check_ties,
    refuse_empty,
    refuse_unsaved_parts,
)
from lora_kernels.models.adapter_files import Parts, StoredAdapters
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.reports import AdaptedLayer, ApplyReport
from lora_kernels.models.selection import Selection
from lora_kernels.models.targets import some
from lora_kernels.models.ties import are_tied
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.settings import scaling_of


def apply_stored(
    model: nn.Module, selection: Selection, stored: StoredAdapters, others: Sequence[tuple[nn.Parameter, Tensor]] = ()
) -> ApplyReport:
    """Put LoRA layers with the values of `stored` into a plain model, write `others`, and return the report."""
    check_names(stored, {target.name for target in selection.targets}, model)

    filled: dict[str, AdapterLayer] = {}

    def fill(name: str, layer: AdapterLayer) -> None:
        filled[name] = layer
        check_shapes(stored, name, layer)
        if are_tied(filled):
            check_ties(stored, filled)
        refuse_empty({name: layer})
        with written(_pairs(layer, stored.layers[name])):
            pass

    with written(others):
        return inject.put_layers(model, selection, fill)


def fill_stored(
    model: nn.Module,
    stored: StoredAdapters,
    alphas: dict[str, float],
    rslora: bool | None,
    others: Sequence[tuple[nn.Parameter, Tensor]] = (),
) -> ApplyReport:
    """Write the values of `stored` into the layers of a model that has LoRA, and `others`. An `rslora` of None leaves
    use_rslora as it is."""
    layers = lora_layers(model)
    refuse_unsaved_parts(layers)
    check_names(stored, set(layers), model)
    check_kind(stored, layers)
    for name, layer in layers.items():
        check_shapes(stored, name, layer)
        if not math.isfinite(alphas[name]):
            raise ValueError(f"{stored.source}: lora_alpha of {name} is {alphas[name]}")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"these layers are merged: {some(merged)}. unmerge() them first")
    refuse_empty(layers)
    check_ties(stored, layers)
    with written([*others, *(pair for name, layer in layers.items() for pair in _pairs(layer, stored.layers[name]))]):
        for name, layer in layers.items():
            layer.lora_alpha = alphas[name]
            layer.use_rslora = layer.use_rslora if rslora is None else rslora
            layer.scaling = scaling_of(layer.lora_alpha, layer.r, layer.use_rslora)
    return ApplyReport(tuple(AdaptedLayer.of(name, layer) for name, layer in layers.items()), {}, ())


def _pairs(layer: AdapterLayer, adapter: Parts) -> list[tuple[nn.Parameter, Tensor]]:
    return [
        (layer.get_parameter(part.parameter), layer.from_file(key, adapter[key]))
        for key, part in layer.file_parts().items()
    ]


@contextlib.contextmanager
def written(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Write the values into the parameters. On an error, also in the body, every parameter has its old value again."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter, value in values:
                before.append((parameter, parameter.detach().clone()))
                parameter.copy_(value)
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, old in reversed(before):
                with contextlib.suppress(RuntimeError):  # one that cannot be written, which was the error
                    parameter.copy_(old)
        raise
