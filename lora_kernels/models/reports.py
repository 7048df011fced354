"""The reports on a plain model: which layers got LoRA, whether their adapters have an effect, and what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora_kernels.core.repeated import repeated
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.targets import by_reason, some
from lora_kernels.nn import dry_run
from lora_kernels.nn.adapter import AdapterLayer, is_adapter
from lora_kernels.nn.dry_run import Inputs, Watched
from lora_kernels.nn.quantized import QuantizedLoRALinear


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that got LoRA: one entry of an `ApplyReport`."""

    name: str
    r: int
    lora_alpha: float
    size: str
    """The size of the base, such as "768 → 3072"."""
    use_dora: bool = False
    quant: str | None = None

    @classmethod
    def of(cls, name: str, layer: AdapterLayer) -> AdaptedLayer:
        """Return the entry for `layer`."""
        quant = layer.format if isinstance(layer, QuantizedLoRALinear) else None
        return cls(name, layer.r, layer.lora_alpha, layer.size, layer.use_dora, quant)


@dataclass(frozen=True)
class ApplyReport:
    """The layers that `apply_lora` replaced, and those that it left. ``str()`` of it is a table, in which layers of
    repeated blocks share a line."""

    layers: tuple[AdaptedLayer, ...]
    passed_over: dict[str, str]
    """The reason why a linear layer was left as it is, for each of these layers."""
    unused: tuple[str, ...]
    """Names and patterns that no layer matched. They are often typing errors, but PEFT accepts them too."""
    quantised: tuple[int, int] | None = None
    """The bytes of these layers' weights before and after quantisation; None where they were not quantised."""
    doubted: dict[str, str] = field(default_factory=dict)
    """The replaced layers whose weights their parents may read without calling them, and how. `verify` finds out."""
    without_effect: dict[str, str] = field(default_factory=dict)
    """The replaced layers whose adapters a forward passes over, and why, where `verify` has looked."""
    converted: dict[str, float] = field(default_factory=dict)
    """The relative error ‖ΔW - s·B A‖ / ‖ΔW‖ of each adapter of another format that was factored anew."""

    def verify(self, model: nn.Module, *args: Any, **kwargs: Any) -> ApplyReport:
        """Run ``model(*args, **kwargs)`` to see which adapters take part in it, and return the report with
        `without_effect` filled in. Without inputs ``model.dummy_inputs`` are taken.

        The forward runs once in training and once in evaluation mode, without gradients. Parameters, buffers, modes,
        attributes of modules and random generators are as before afterwards. A layer is without effect if it is not
        called in either, or if other code reads its weight past its adapter in one of them.

        Raises:
            ValueError: no inputs, and a model without dummy_inputs, or one that cannot run with them; a model without
                adapters.
        """
        return self.verified_with(model, Inputs(args, kwargs) if args or kwargs else dry_run.inputs_for(model, True))

    def verified_with(self, model: nn.Module, inputs: Inputs) -> ApplyReport:
        """Return what `verify` returns, for inputs as one object."""
        layers = lora_layers(model)
        if not layers:
            raise ValueError("the model has no layer with an adapter: apply_lora(model) first")
        watched = {name: _watched(layer) for name, layer in layers.items() if not layer.merged}
        return replace(self, doubted={}, without_effect=dry_run.passed_over(model, watched, inputs))

    def table(self, full: bool = False) -> str:
        """Return the report as text. Layers that differ in the number of their block alone share a line, such as
        ``layers.{0..31}.q_proj × 32``; with `full` each has its own."""
        texts = []
        for layer in self.layers:
            kind = f"  {layer.quant}" if layer.quant else "  DoRA" if layer.use_dora else ""
            texts.append((layer.name, f"  {layer.r:>4}  {layer.lora_alpha:>6g}  {layer.size}{kind}"))
        rows = texts if full else [(line.label, line.text) for line in repeated(texts)]
        width = max([len(name) for name, _ in rows] + [len("module")])
        lines = [f"{'module':<{width}}  {'r':>4}  {'alpha':>6}  in → out"]
        lines += [f"{name:<{width}}{text}" for name, text in rows]
        if self.quantised is not None:
            before, after = self.quantised
            lines.append(f"their weights: {before:,} → {after:,} bytes ({100 * after / before:.1f} %)")
        for what, reasons in (
            ("passed over", self.passed_over),
            ("without effect", self.without_effect),
            ("in doubt", self.doubted),
        ):
            lines += [f"{what}, {reason}: {_some(names, full)}" for reason, names in by_reason(reasons).items()]
        if self.converted:
            told = [f"{name} ({error:.1e})" for name, error in self.converted.items()]
            shown = some(told, len(told)) if full else some(told)
            lines.append(f"factored anew, with the relative error of the update: {shown}")
        if self.unused:
            lines.append(f"matched nothing: {', '.join(self.unused)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class TrainableParameters:
    """The number of elements that a model trains, and the number that it holds."""

    trainable: int
    total: int

    def __str__(self) -> str:
        percent = 100 * self.trainable / max(self.total, 1)
        return f"trainable: {self.trainable:,} of {self.total:,} ({percent:.2f} %)"


def _some(names: list[str], full: bool) -> str:
    """Return names as text: all of them, or the first few lines of those that share a pattern."""
    if full:
        return some(names, len(names))
    return some([line.label for line in repeated([(name, "") for name in names])])


def _watched(layer: AdapterLayer) -> Watched:
    own = dict(layer.named_parameters())
    weights = [p for name, p in own.items() if not is_adapter(name) and "bias" not in name.rpartition(".")[2]]
    # A layer that shares its A with others has u to itself: u tells whether its own update is computed.
    adapter = [p for name, p in own.items() if name == "lora_u" or (is_adapter(name) and p.ndim > 1)]
    return Watched(layer, weights, adapter)
