"""The report of `fuse`: which layers are fused, and which of them the model's forward really computes by their fused
forward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora_kernels.core.operands import Call
from lora_kernels.core.repeated import repeated
from lora_kernels.nn import dry_run, other_layers
from lora_kernels.nn.dry_run import Inputs
from lora_kernels.peft import merged_models, serving, ways_out
from lora_kernels.peft.layer import FusedLayer
from lora_kernels.peft.shared import SharedInput


@dataclass(frozen=True)
class FuseReport:
    """The result of `fuse`. ``str()`` of it is a table, in which layers of repeated blocks share a line."""

    fused: dict[str, str]
    """The modules of which every adapter is on the fused path: name → size and adapters."""
    not_fused: dict[str, str]
    """The modules of which PEFT's own forward serves at least one adapter: name → reason."""
    groups: dict[str, SharedInput] = field(default_factory=dict)
    """The groups that ``fuse(group=...)`` has made: name of a module → its children that one call computes."""
    calls: tuple[Call, ...] = ()
    """The forwards of the fused layers, where the choice of a back-end depends on evidence about the device."""
    backend: str | None = None
    """The back-end that `fuse` was asked for."""
    layers: Mapping[str, weakref.ref[Any]] = field(default_factory=dict, repr=False, compare=False)
    """The layers of `fused`, whose counters ``str()`` reads. They are not kept alive."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """The layers that a layer around them computes: name → the name of that layer."""
    others: Mapping[str, int] = field(default_factory=dict)
    """The number of layers with adapters that are not LoRA of PEFT, by the full name of their class."""

    def verify(self, model: nn.Module, *args: Any, **kwargs: Any) -> FuseReport:
        """Run ``model(*args, **kwargs)`` to see which layers it computes by their fused forward, and return a report
        in which the others are in `not_fused`, each with its reason. Without inputs ``model.dummy_inputs`` are taken.

        The forward runs once in training and once in evaluation mode, without gradients. Parameters, buffers, modes,
        counters, attributes of modules and random generators are as before afterwards. A layer stays in `fused` if one
        of the two computes it by its fused forward, and if neither reads its weight past its adapter. Layers whose
        adapters are merged or disabled at present are not judged.

        Raises:
            ValueError: no inputs, and a model without dummy_inputs, or one that cannot run with them; no LoRA layer.
        """
        return self.verified_with(model, Inputs(args, kwargs) if args or kwargs else dry_run.inputs_for(model, True))

    def verified_with(self, model: nn.Module, inputs: Inputs) -> FuseReport:
        """Return what `verify` returns, for inputs as one object."""
        if not self.fused and not self.not_fused:
            raise ValueError(f"there is nothing to verify: {self}")
        layers = {name: layer for name, ref in self.layers.items() if isinstance(layer := ref(), FusedLayer)}
        watched = {name: found for name, layer in layers.items() if (found := layer.watched()) is not None}
        groups = [group for group in self.groups.values() if hasattr(group, "__dict__")]
        over = dry_run.passed_over(model, watched, inputs, groups)
        over |= {name: f"computed by {outer}: {over[outer]}" for name, outer in self.inner.items() if outer in over}
        fused = {name: what for name, what in self.fused.items() if name not in over}
        return replace(self, fused=fused, not_fused=self.not_fused | over)

    def table(self, full: bool = False) -> str:
        """Return the report as text. Layers that differ in the number of their block alone share a line, such as
        ``layers.{0..31}.q_proj × 32``; with `full` each has its own."""
        alive = {name: layer for name, ref in self.layers.items() if (layer := ref()) is not None}
        calls = {name: layer for name, layer in alive.items() if isinstance(layer, FusedLayer)}
        ran = any(layer.fused_calls or layer.passed_over or layer.base_calls for layer in calls.values())
        rows, idle = [], 0
        for name, what in self.fused.items():
            since = _since(calls[name]) if ran and name in calls else ""
            idle += bool(since)
            if name in alive and name not in calls:
                since = ", but no longer: unfuse was called"
            rows.append((name, "fused", what + since))
        rows += [(name, "not fused", why) for name, why in self.not_fused.items()]
        head = f"{len(self.fused)} of {len(rows)} LoRA layers fused"
        if idle:
            head += f"; {idle} of them had no fused call so far, though the model has run"
        others = other_layers.told(self.others)
        if not rows:
            return f"{head}: the model has none" + (f" of PEFT; it has {others}" if others else "")
        rows += [(name, "grouped", str(group)) for name, group in self.groups.items()]
        lines = [head, *lines_of(rows, full)]
        lines += ways_out.lines(
            [*self.not_fused.values(), *(why for each in calls.values() for why in each.passed_over)]
        )
        if idle:
            lines.append("lora_kernels.usage(model) tells which code computes them")
        if others:
            lines.append(f"beside these, {others}")
        told = merged_models.told(calls.values()), serving.line(self.calls, self.backend)
        return "\n".join([*lines, *filter(None, told)])

    def __str__(self) -> str:
        return self.table()


def lines_of(rows: Sequence[tuple[str, str, str]], full: bool = False) -> list[str]:
    """Return the lines of a table whose rows are a name, a state and a text."""
    if full:
        labels = list(rows)
    else:
        shared = repeated([(name, what) for name, _, what in rows], [state for _, state, _ in rows])
        labels = [(line.label, rows[line.places[0]][1], line.text) for line in shared]
    width, state_width = (max(len(row[i]) for row in labels) for i in (0, 1))
    return [f"  {name:{width}}  {state:{state_width}}  {what}" for name, state, what in labels]


def _since(layer: FusedLayer) -> str:
    """Return what a report adds about a layer that has had no fused call although the model has run."""
    if layer.fused_calls:
        return ""
    if not layer.passed_over:
        return ", called without an adapter only" if layer.base_calls else ", not called so far"
    reasons = "; ".join(f"{why} ({n} call{'s' if n > 1 else ''})" for why, n in layer.passed_over.most_common())
    return f", left to PEFT in every call so far: {reasons}"
