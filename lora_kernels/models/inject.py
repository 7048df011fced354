"""LoRA in a plain PyTorch model: `apply_lora` puts `FusedLoRALinear` where PEFT would put its LoRA layers.

`mark_only_lora_as_trainable` chooses the parameters that are trained, `adapter_parameters` yields the adapters',
`trainable_parameters` counts the trained ones, and `merge_and_unload` makes the model plain again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lora_kernels.backends import dispatch
from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import Names, Rules, Selection, Target, by_reason, lora_layers, select, some
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.nn.settings import LoRASettings


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that got LoRA: one entry of an `ApplyReport`."""

    name: str
    r: int
    lora_alpha: float
    in_features: int
    out_features: int
    use_dora: bool = False
    quant: str | None = None

    @classmethod
    def of(cls, name: str, layer: FusedLoRALinear) -> AdaptedLayer:
        """Return the entry for `layer`."""
        quant = layer.format if isinstance(layer, QuantizedLoRALinear) else None
        return cls(name, layer.r, layer.lora_alpha, layer.in_features, layer.out_features, layer.use_dora, quant)


@dataclass(frozen=True)
class ApplyReport:
    """The layers that `apply_lora` replaced, and those that it left. ``str()`` of it is a table."""

    layers: tuple[AdaptedLayer, ...]
    passed_over: dict[str, str]
    """The reason why a linear layer was left as it is, for each of these layers."""
    unused: tuple[str, ...]
    """Names and patterns that no layer matched. They are often typing errors, but PEFT accepts them too."""
    quantised: tuple[int, int] | None = None
    """The bytes of these layers' weights before and after quantisation; None where they were not quantised."""

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("module")])
        lines = [f"{'module':<{width}}  {'r':>4}  {'alpha':>6}  in → out"]
        for layer in self.layers:
            kind = f"  {layer.quant}" if layer.quant else "  DoRA" if layer.use_dora else ""
            shape = f"{layer.in_features} → {layer.out_features}{kind}"
            lines.append(f"{layer.name:<{width}}  {layer.r:>4}  {layer.lora_alpha:>6g}  {shape}")
        if self.quantised is not None:
            before, after = self.quantised
            lines.append(f"their weights: {before:,} → {after:,} bytes ({100 * after / before:.1f} %)")
        lines += [f"passed over, {reason}: {some(names)}" for reason, names in by_reason(self.passed_over).items()]
        if self.unused:
            lines.append(f"matched nothing: {', '.join(self.unused)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class TrainableParameters:
    """The number of elements that a model trains, and the number that it holds."""

    trainable: int
    total: int

    def __str__(self) -> str:
        percent = 100 * self.trainable / max(self.total, 1)
        return f"trainable: {self.trainable:,} of {self.total:,} ({percent:.2f} %)"


def apply_lora(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: Names = "all-linear",
    exclude_modules: Names | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    adapter_dtype: torch.dtype | None = None,
    backend: str | None = None,
    quant: str | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    init: str = "kaiming",
) -> ApplyReport:
    """Replace every ``nn.Linear`` layer that matches, in place, by a `FusedLoRALinear` over the same weight, and freeze
    every parameter outside the adapters. The rules and defaults are those of PEFT's ``LoraConfig``; PEFT itself is not
    needed.

    Args:
        model: any module. It is changed in place. The rules see a layer that stands at several places by its first
            name, and it is replaced at each place. Weights that are tied stay tied.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend: as for `FusedLoRALinear`, but
            lora_alpha is 8 by default, as in PEFT. adapter_dtype None is the weight's dtype; PEFT would choose fp32
            beside fp16 and bf16.
        target_modules: "all-linear" stands for every ``nn.Linear`` but the one that ``model.get_output_embeddings()``
            returns, if the model has that method. Another string is a regular expression that the whole dotted name
            must match. Several names choose the layers whose dotted name is one of them, or ends in ``.`` and one of
            them.
        exclude_modules: a regular expression or names, in the same way. It wins over target_modules.
        rank_pattern, alpha_pattern: r and lora_alpha by name. Each key is a regular expression for the whole dotted
            name, or for its end after a dot. The first key that matches counts.
        layers_to_transform: the numbers of the blocks whose layers get LoRA, where target_modules are ends of names.
        layers_pattern: the name (or names) of the list of blocks that these numbers count in; None is any list.
        quant: "nf4", "fp4", "int8" or "fp8" keeps the frozen weights in that format only (QLoRA): each layer becomes a
            `QuantizedLoRALinear`, and the report gives the bytes. Other modules that share such a weight keep the dense
            one. The dense model and all quantised weights are in memory together for a moment.
        blocksize, double_quant: for nf4 and fp4, as in `quantize_weight`.
        init: as for `FusedLoRALinear.from_linear`.

    "all-linear" leaves every module that is not exactly an ``nn.Linear`` as it is, and the report gives the reason.
    These are quantised layers, GPT-2's Conv1D (its checkpoints hold W transposed; use PEFT and `fuse`), subclasses
    (``nn.MultiheadAttention`` reads the weight of its out_proj without calling it, so an adapter would have no effect),
    layers whose weight is a subclass of Parameter (sharded, quantised), and layers with hooks, which would be lost.
    Where a pattern or a name matches such a module, or no linear layer at all, ValueError is raised.

    ``nn.TransformerEncoderLayer`` has a path for inference that reads the weights of linear1 and linear2 without
    calling them. It is switched off in layers that get an adapter there (activation_relu_or_gelu is set to 0, and
    use_nested_tensor to False in the ``nn.TransformerEncoder`` around them), and stays off.

    Raises:
        ValueError: nothing matches, or a match cannot be replaced; the model has LoRA layers already; a value that
            `FusedLoRALinear` refuses; an unknown backend; layers_to_transform with a string; a weight that `quant`
            cannot hold (NaN, or an odd K in 4 bits), by name.
        TypeError: an adapter_dtype that does not go with a weight's.
        ImportError: a backend that is not installed.
        re.error: a string that is no regular expression.
        After any of these, the model is unchanged.
    """
    settings = LoRASettings(
        r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend, quant, blocksize, double_quant, init
    )
    rules = Rules(target_modules, exclude_modules, rank_pattern, alpha_pattern, layers_to_transform, layers_pattern)
    selection = select(model, settings, rules)
    if backend is not None:
        dispatch.load(backend)
    return replace(model, selection)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Replace every `FusedLoRALinear` by a plain ``nn.Linear`` with weight W + s·B·A, or with DoRA d ⊙ that (see
    `FusedLoRALinear.merge`). Returns `model`, or the new layer where `model` is a `FusedLoRALinear` itself.

    Every parameter is frozen afterwards, as PEFT leaves it: call ``requires_grad_()`` on those that are to train.
    Other modules whose weights were tied to a merged one keep W.

    Raises:
        ValueError: there is no `FusedLoRALinear`, merging one gives weights that are not finite, or torch.compile has
            compiled one on its own.
        NotImplementedError: a layer is tensor parallel.
        After any of these, the model is unchanged.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no FusedLoRALinear: nothing to merge")
    own = {name: own_name for name, own_name, _ in plain_names(model)}
    compiled = [name or "the model" for name in layers if own[name].rpartition(".")[2] == "_orig_mod"]
    if compiled:
        raise ValueError(
            f"torch.compile has compiled these layers on their own, and would go on calling them: {some(compiled)}. "
            "Put the layer itself, which is the wrapper's _orig_mod, in the wrapper's place first"
        )
    # All merges are tried before anything is changed. Keeping their results would hold every weight twice in memory.
    for name, layer in layers.items():
        try:
            layer.to_linear()
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    places = _places(model)
    for layer in layers.values():
        linear = layer.to_linear().requires_grad_(False)
        if layer is model:
            return linear
        for place in places[id(layer)]:
            _put(model, place, linear)
    return model


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the adapter's parameters of every `FusedLoRALinear` in `model`, also where they are frozen: lora_A, lora_B
    and with DoRA lora_magnitude_vector."""
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            if name.startswith("lora_"):
                yield parameter


def mark_only_lora_as_trainable(model: nn.Module, bias: Literal["none", "all", "lora_only"] = "none") -> None:
    """Freeze everything but the adapters, as loralib's function of this name does. Frozen adapters stay frozen.

    Args:
        model: a model with `FusedLoRALinear` layers.
        bias: "none" trains no bias, "all" every parameter whose own name has "bias" in it, "lora_only" the biases of
            the layers with an adapter.

    Raises:
        ValueError: another `bias`, or a model without `FusedLoRALinear`; nothing is changed.
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", got {bias!r}')
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no FusedLoRALinear: apply_lora(model) first")
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad = bias == "all" and "bias" in name.rpartition(".")[2]
    if bias == "lora_only":
        for layer in layers.values():
            if layer.bias is not None:
                layer.bias.requires_grad_(True)


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Return how many elements `model` trains, and how many it holds. Shared parameters count once, and a quantised
    weight counts as many elements as the dense one."""
    packed = [layer for layer in lora_layers(model).values() if isinstance(layer, QuantizedLoRALinear)]
    elements = {id(layer.weight): layer.in_features * layer.out_features for layer in packed}
    sizes = [(p.requires_grad, elements.get(id(p), p.numel())) for p in model.parameters()]
    return TrainableParameters(sum(n for trained, n in sizes if trained), sum(n for _, n in sizes))


def replace(
    model: nn.Module, selection: Selection, fill: Callable[[str, FusedLoRALinear], None] | None = None
) -> ApplyReport:
    """Replace every target by a `FusedLoRALinear`, freeze the rest and return the report. `fill` gets the name of each
    new layer and the layer, to write values into its adapter. On an error nothing is changed."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    places = _places(model)
    try:
        layers = [_adapted(target) for target in selection.targets]
        for target, layer in zip(selection.targets, layers, strict=True) if fill else ():
            fill(target.name, layer)  # type: ignore[misc]
        packed = [layer for layer in layers if isinstance(layer, QuantizedLoRALinear)]
        before = sum(target.linear.weight.nbytes for target in selection.targets)
        for parameter, _ in trained:
            parameter.requires_grad = False  # not requires_grad_(), which a lazy layer's parameter refuses
        for target, layer in zip(selection.targets, layers, strict=True):
            for place in places[id(target.linear)]:
                _put(model, place, layer)
    except BaseException:
        for target in selection.targets:
            for place in places[id(target.linear)]:
                _put(model, place, target.linear)
        for parameter, requires_grad in trained:  # from_linear freezes the weights that it takes over
            parameter.requires_grad = requires_grad
        raise
    _close_fast_paths(model)
    return ApplyReport(
        tuple(AdaptedLayer.of(target.name, layer) for target, layer in zip(selection.targets, layers, strict=True)),
        selection.passed_over,
        selection.unused,
        (before, sum(layer.quantized_weight().nbytes for layer in packed)) if packed else None,
    )


def _adapted(target: Target) -> FusedLoRALinear:
    try:
        return FusedLoRALinear.from_settings(target.linear, target.settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{target.name}: {error}") from None


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Return every dotted name of each module in `model`, by the module's id."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _close_fast_paths(model: nn.Module) -> None:
    """Switch off the inference paths of nn.TransformerEncoder that read weights without calling their layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and lora_layers(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and lora_layers(module):
            module.use_nested_tensor = False
