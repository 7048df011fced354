"""`usage`: what really happened to each layer with an adapter, by the calls that the layers have counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_kernels.analysis.used import FUSED, LayerUsage, Usage, judged
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.nn import other_layers
from lora_kernels.nn.adapter import AdapterLayer, is_adapter
from lora_kernels.nn.bypass import function_of, suspect


def usage(model: nn.Module, *, strict: bool = False) -> Usage:
    """Return what the forwards of `model` so far have done with each layer that has an adapter: PEFT's layers, fused by
    `fuse` or not, and this package's own.

    A row tells the calls that the fused forward computed, those that were left to PEFT and why, and those without an
    adapter. A layer that was never called although the model has run is named, with the code that may compute it: the
    kernels of unsloth and axolotl read the weights past the layer. The counters begin when a layer is made or fused,
    and are never set back: ``usage(model).since(before)`` tells what happened since ``before = usage(model)``. The
    model is not changed, and nothing is run.

    Calls inside ``torch.compile`` are not counted, nor are the replays of a CUDA graph and the replicas of
    ``nn.DataParallel``. A layer without a counted call is "not counted", and not "never called", if torch.compile has
    compiled it or a module around it, or if the model has no counted call at all and torch.compile has compiled
    something in this process.

    Args:
        model: any module.
        strict: whether to raise unless every layer was computed by its fused forward in every call.

    Raises:
        RuntimeError: with `strict`, also for a model without such a layer. The text holds the report.
    """
    compiled = _Compiled(model)
    rows = _own_rows(model, compiled)
    groups: dict[str, tuple[tuple[str, ...], int]] = {}
    backend = ""
    if "peft" in sys.modules:
        from lora_kernels.peft import fusing, serving  # without PEFT they cannot be imported
        from lora_kernels.peft.layer import FusedLayer

        found = fusing.look_at(model)
        rows |= _rows_of_peft(model, found, compiled)
        groups = _groups(model)
        others = {name: n for name, n in found.others.items() if not name.startswith("lora_kernels.")}
        named = {layer._backend for layer, _ in found.layers.values() if isinstance(layer, FusedLayer)}
        backend = serving.line(found.calls, named.pop()) if len(named) == 1 else ""
    else:
        others = other_layers.other_layers(model, lambda module: isinstance(module, AdapterLayer))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    kept = [row for _, row in sorted(rows.items(), key=lambda entry: order[entry[0]])]
    ran = any(row.calls or row.trained for row in kept)
    report = Usage(judged(kept, ran, compiled.anything), groups, others, backend, compiled.anything)
    if strict and len(report.of(FUSED)) < max(len(report.rows), 1):
        raise RuntimeError(f"usage(strict=True) found layers that were not computed by their fused forward: {report}")
    return report


class _Compiled:
    """What torch.compile has compiled, as far as this process knows."""

    def __init__(self, model: nn.Module) -> None:
        self.anything = _has_compiled()
        self.inside: set[int] = set()
        for module in model.modules():
            wrapped = module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
            if wrapped or (self.anything and _is_converted(module)):
                self.inside.update(map(id, module.modules()))

    def has(self, layer: nn.Module) -> bool:
        """Return whether `layer`, or a module around it, was compiled."""
        return id(layer) in self.inside


def _has_compiled() -> bool:
    """Return whether torch.compile has compiled a function in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"]["ok"])


def _is_converted(module: nn.Module) -> bool:
    """Return whether torch.compile has begun to compile at the forward of `module`."""
    codes = getattr(sys.modules.get("torch._dynamo.convert_frame"), "input_codes", ())
    found = module.__dict__.get("forward", type(module).forward)
    forward = function_of(found)
    return hasattr(found, "_torchdynamo_orig_callable") or (forward is not None and forward.__code__ in codes)


def _own_rows(model: nn.Module, compiled: _Compiled) -> dict[str, LayerUsage]:
    """Return the rows of this package's layers."""
    rows = {}
    paths = {name: path for name, path, _ in plain_names(model)}
    for name, layer in lora_layers(model).items():
        quant = getattr(layer, "format", None)
        size = f"{layer.size}, r={layer.r}{' DoRA' if layer.use_dora else ''}" + (f", {quant}" if quant else "")
        trained = any(p.grad is not None for key, p in layer.named_parameters() if is_adapter(key))
        rows[paths[name]] = LayerUsage(
            name,
            type(layer).__name__,
            size,
            fused_calls=layer.fused_calls,
            base_calls=layer.base_calls,
            bypass=suspect(model, paths[name]),
            trained=trained,
            compiled=compiled.has(layer),
        )
    return rows


def _rows_of_peft(model: nn.Module, found: Any, compiled: _Compiled) -> dict[str, LayerUsage]:
    """Return the rows of PEFT's layers; `found` is what `look_at` returns."""
    rows = {}
    for path in (*found.fused, *found.not_fused):
        layer: Any = model.get_submodule(path)
        counts: Any = model.get_submodule(found.inner.get(path, path))
        fused = hasattr(counts, "fused_calls")
        why = found.not_fused.get(path, "")
        if not fused and not why:
            why = "PEFT's own layer, which lora_kernels.fuse(model) would fuse"
        rows[path] = LayerUsage(
            path,
            type(layer).__name__ if not fused or path in found.inner else counts.peft_class.__name__,
            found.fused.get(path, ""),
            fused_calls=counts.fused_calls if fused else 0,
            left_calls=dict(counts.passed_over) if fused else {},
            base_calls=counts.base_calls if fused else 0,
            bypass=suspect(model, path),
            trained=any(p.grad is not None for p in _adapter_of(layer)),
            compiled=compiled.has(layer),
            not_fused=why,
        )
    return rows


def _adapter_of(layer: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of the adapters of a layer of PEFT."""
    names = getattr(layer, "adapter_layer_names", ())
    return (p for key, p in layer.named_parameters() if key.partition(".")[0] in names)


def _groups(model: nn.Module) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return the groups of fused layers: name of the module → its layers, and the calls that computed several."""
    groups: dict[str, tuple[tuple[str, ...], int]] = {}
    for path, parent in model.named_modules():
        reports = {id(g): g.report for child in parent.children() if (g := getattr(child, "_group", None)) is not None}
        for i, report in enumerate(reports.values()):
            groups[path if i == 0 else f"{path} ({i + 1})"] = report.names, report.calls
    return groups
