"""LoRA in a plain PyTorch model: `apply_lora` puts layers with adapters where PEFT would put its LoRA layers.

`mark_only_lora_as_trainable` chooses the parameters that are trained, `adapter_parameters` yields the adapters',
`trainable_parameters` counts the trained ones, and `merge_and_unload` makes the model plain again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lora_kernels.backends import dispatch
from lora_kernels.models import ties
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.reports import AdaptedLayer, ApplyReport, TrainableParameters
from lora_kernels.models.selection import Selection, select
from lora_kernels.models.targets import Names, Rules, some, told_by_reason
from lora_kernels.nn import dry_run, offload, readers, shared_factors
from lora_kernels.nn.adapter import AdapterLayer, is_adapter
from lora_kernels.nn.quantized import QuantizedLoRALinear
from lora_kernels.nn.settings import LoRASettings


def apply_lora(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    target_parameters: Sequence[str] | None = None,
    ensure_weight_tying: bool = False,
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
    verify: Any = None,
) -> ApplyReport:
    """Put LoRA on every layer that matches, in place: a `FusedLoRALinear` over the same weight takes the place of an
    ``nn.Linear``, and so on, and every parameter outside the adapters is frozen. The rules and defaults are those of
    PEFT's ``LoraConfig``; PEFT itself is not needed.

    A `FusedLoRALinear` goes in the place of an ``nn.Linear``, and a layer of its kind in the place of transformers'
    Conv1D. Where target_modules name them, `FusedLoRAEmbedding`, `FusedLoRAConv1d` (2d, 3d) and
    `FusedLoRAMultiheadAttention` take the places of embeddings, convolutions and ``nn.MultiheadAttention``. Where
    target_parameters name the weights of experts, a `FusedLoRAExperts` takes the place of the module that holds them.

    Args:
        model: any module. It is changed in place. The rules see a layer that stands at several places by its first
            name, and it is replaced at each place. Weights that are tied stay tied.
        r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend: as for `FusedLoRALinear`, but
            lora_alpha is 8 by default, as in PEFT. As in PEFT too, the adapters are in fp32 beside fp16 and bf16
            weights, unless adapter_dtype is the weights' dtype.
        target_modules: "all-linear" stands for every ``nn.Linear`` and Conv1D but the one that
            ``model.get_output_embeddings()`` returns, if the model has that method. Another string is a regular
            expression that the whole dotted name must match. Several names choose the layers whose dotted name is one
            of them, or ends in ``.`` and one of them. None is "all-linear", or no layer where target_parameters are
            given.
        exclude_modules: a regular expression or names, in the same way. It wins over target_modules.
        target_parameters: the names of parameters, or their ends after a dot, such as "experts.gate_up_proj" and
            "experts.down_proj" of the experts of transformers. Their ranks and alphas go by these names too.
        ensure_weight_tying: where an embedding and other layers have one weight, and target_modules name one of them,
            all get one adapter (see `lora_kernels.nn.tied.TiedLoRALinear`), so that they can be merged into one weight
            again. There is a warning where the model has no such layers.
        rank_pattern, alpha_pattern: r and lora_alpha by name. Each key is a regular expression for the whole dotted
            name, or for its end after a dot. The first key that matches counts.
        layers_to_transform: the numbers of the blocks whose layers get LoRA, where target_modules are ends of names.
        layers_pattern: the name (or names) of the list of blocks that these numbers count in; None is any list.
        quant: "nf4", "fp4", "int8" or "fp8" keeps the frozen weights of linear layers in that format only (QLoRA): each
            becomes a `QuantizedLoRALinear`, and the report gives the bytes. Other modules that share such a weight keep
            the dense one. The dense model and all quantised weights are in memory together for a moment. Layers of
            other kinds keep their dense weights.
        blocksize, double_quant: for nf4 and fp4, as in `quantize_weight`.
        init: as for `FusedLoRALinear.from_linear`; for linear layers only.
        verify: inputs of the model, with which `ApplyReport.verify` is run at the end: a mapping of keywords, a tuple
            or list of arguments, or one argument. True stands for ``model.dummy_inputs``. There is a warning if an
            adapter turns out to be without effect.

    "all-linear" leaves every module that is not exactly an ``nn.Linear`` or Conv1D as it is, and the report gives the
    reason. These are quantised layers, subclasses (``nn.MultiheadAttention`` reads the weight of its out_proj without
    calling it, so an adapter would have no effect), layers whose weight is a subclass of Parameter (sharded,
    quantised), and layers with hooks, which would be lost. Where a pattern or a name matches a module that cannot be
    replaced, or nothing at all, ValueError is raised.

    A layer whose parent reads its weight instead of calling it, as Mamba's mixers do with out_proj, x_proj and dt_proj,
    is refused in the same two ways, and "all-linear" also warns. This is found in the source of the parent's forward.
    There is a warning for a layer that its parent calls in some cases and reads in others, unless `verify` has looked.

    ``nn.TransformerEncoderLayer`` has a path for inference that reads the weights of linear1 and linear2 without
    calling them. It is switched off in layers that get an adapter there (activation_relu_or_gelu is set to 0, and
    use_nested_tensor to False in the ``nn.TransformerEncoder`` around them), and stays off.

    Raises:
        ValueError: nothing matches, or a match cannot be replaced; `quant`, and no linear layer is chosen; the model
            has layers with adapters already; a value that a layer of its kind refuses, such as use_dora for experts; an
            unknown backend; layers_to_transform with a string; patterns that give two parameters of one module, or a
            head and the embedding that it is tied to, several ranks or alphas; a weight that `quant` cannot hold (NaN,
            or an odd K in 4 bits), by name.
        TypeError: an adapter_dtype that does not go with a weight's; target_parameters that are no list.
        ImportError: a backend that is not installed.
        re.error: a string that is no regular expression.
        After any of these, the model is unchanged.
    """
    settings = LoRASettings(
        r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend, quant, blocksize, double_quant, init
    )
    if target_modules is None:
        target_modules = () if target_parameters else "all-linear"
    rules = Rules(
        target_modules, exclude_modules, rank_pattern, alpha_pattern, layers_to_transform, layers_pattern,
        target_parameters, ensure_weight_tying,
    )  # fmt: skip
    return applied(model, select(model, settings, rules), backend, verify)


def applied(
    model: nn.Module,
    selection: Selection,
    backend: str | None,
    verify: Any,
    fill: Callable[[str, AdapterLayer], None] | None = None,
) -> ApplyReport:
    """Do what `apply_lora` does with the layers that it has chosen. `fill` is that of `put_layers`."""
    if backend is not None:
        dispatch.load(backend)
    inputs = None if verify is None or verify is False else dry_run.inputs_for(model, verify)
    report, undo = _replaced(model, selection, fill)
    try:
        if inputs is not None:
            report = report.verified_with(model, inputs)
        warn_of(selection.read, report.doubted, report.without_effect)  # which raises where warnings are errors
    except BaseException:
        undo()
        raise
    return report


def warn_of(
    read: Mapping[str, str], doubted: Mapping[str, str], without_effect: Mapping[str, str] | None = None
) -> None:
    """Warn of linear layers that the model reads past an adapter, or may read, with the reasons by name."""
    told = (
        ("these adapters take no part in the forward", without_effect),
        ("these layers got no adapter", read),
        ("whether these adapters have an effect is not certain, and verify=inputs finds out", doubted),
    )
    for what, reasons in told:
        if reasons:
            warnings.warn(f"{what}: {told_by_reason(reasons)}", stacklevel=4)


def merge_and_unload(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Replace every layer with an adapter by the plain layer that it stands for, with the adapter merged into its
    weights: W + s·B·A, or with DoRA d ⊙ that (see `FusedLoRALinear.merge`). Returns `model`, or the new layer where
    `model` is such a layer itself.

    Every parameter is frozen afterwards, as PEFT leaves it: call ``requires_grad_()`` on those that are to train. The
    layers of an offloaded model (accelerate) stay offloaded; their merged weights are kept in the CPU's memory.

    Of a table that an embedding and a head share, a merge changes only the one with the adapter. So it is refused where
    the other would be lost: for an embedding, and for every layer of a transformers model whose config ties weights,
    which would be saved and loaded with one of the two weights for both. With `untie` each gets a weight of its own,
    and ``config.tie_word_embeddings`` becomes False. Adapters that were tied (``ensure_weight_tying``) are merged into
    one weight for both. Other linear layers whose weights were tied to a merged one keep W.

    Raises:
        ValueError: there is no layer with an adapter, merging one gives weights that are not finite, a layer's adapter
            cannot be merged (a convolution with groups), a shared table would be parted without `untie`, or
            torch.compile has compiled a layer on its own.
        NotImplementedError: a layer is tensor parallel.
        After any of these, the model is unchanged.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no layer with an adapter: nothing to merge")
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
            layer.to_plain()
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    merged = ties.plan(model, layers, untie)
    places = places_of(model)
    for layer in layers.values():
        plain = layer.to_plain().requires_grad_(False)
        offload.offload_like(layer, plain)
        if layer is model:
            return plain
        for place in places[id(layer)]:
            put(model, place, plain)
    for names in merged.groups:
        ties.tie(model, names)
    if merged.parted:
        ties.untie_config(model)
    shared_factors.removed(model)
    return model


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of every adapter in `model`, also where they are frozen: A and B of each layer, and with
    DoRA its magnitude. One that layers share comes once, and the A and B of `SharedFactors` last."""
    seen: set[int] = set()
    for layer in (*lora_layers(model).values(), *shared_factors.factors_of(model)):
        for name, parameter in layer.named_parameters():
            if is_adapter(name) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def mark_only_lora_as_trainable(model: nn.Module, bias: Literal["none", "all", "lora_only"] = "none") -> None:
    """Freeze everything but the adapters, as loralib's function of this name does. Frozen adapters stay frozen.

    Args:
        model: a model with adapters.
        bias: "none" trains no bias, "all" every parameter whose own name has "bias" in it, "lora_only" the biases of
            the layers with an adapter.

    Raises:
        ValueError: another `bias`, or a model without adapters; nothing is changed.
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", got {bias!r}')
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no layer with an adapter: apply_lora(model) first")
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad = bias == "all" and "bias" in name.rpartition(".")[2]
    if bias == "lora_only":
        for layer in layers.values():
            for name, parameter in layer.named_parameters():
                if "bias" in name.rpartition(".")[2] and not is_adapter(name):
                    parameter.requires_grad = True


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Return how many elements `model` trains, and how many it holds. Shared parameters count once, and a quantised
    weight counts as many elements as the dense one."""
    packed = [layer for layer in lora_layers(model).values() if isinstance(layer, QuantizedLoRALinear)]
    elements = {id(layer.weight): layer.in_features * layer.out_features for layer in packed}
    sizes = [(p.requires_grad, elements.get(id(p), p.numel())) for p in model.parameters()]
    return TrainableParameters(sum(n for trained, n in sizes if trained), sum(n for _, n in sizes))


def put_layers(
    model: nn.Module, selection: Selection, fill: Callable[[str, AdapterLayer], None] | None = None
) -> ApplyReport:
    """Replace every target by its layer with an adapter, freeze the rest and return the report. `fill` gets the name of
    each new layer and the layer, to write values into its adapter. On an error nothing is changed."""
    return _replaced(model, selection, fill)[0]


def _replaced(
    model: nn.Module, selection: Selection, fill: Callable[[str, AdapterLayer], None] | None = None
) -> tuple[ApplyReport, Callable[[], None]]:
    """Do what `put_layers` does, and return the report and a function that undoes it."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    places = places_of(model)

    def put_back() -> None:
        for target in selection.targets:
            for place in places[id(target.module)]:
                put(model, place, target.module)
        for parameter, requires_grad in trained:  # from_settings freezes the weights that it takes over
            parameter.requires_grad = requires_grad

    try:
        made: dict[nn.Module, AdapterLayer] = {}
        for target in sorted(selection.targets, key=lambda target: target.tied_to is not None):
            made[target.module] = target.adapted(made)
        layers = [made[target.module] for target in selection.targets]
        for target, layer in zip(selection.targets, layers, strict=True) if fill else ():
            fill(target.name, layer)  # type: ignore[misc]
        packed = [layer for layer in layers if isinstance(layer, QuantizedLoRALinear)]
        before = sum(
            target.module.weight.nbytes  # type: ignore[union-attr, misc]
            for target, layer in zip(selection.targets, layers, strict=True)
            if isinstance(layer, QuantizedLoRALinear)
        )
        for parameter, _ in trained:
            parameter.requires_grad = False  # not requires_grad_(), which a lazy layer's parameter refuses
        for target, layer in zip(selection.targets, layers, strict=True):
            for place in places[id(target.module)]:
                put(model, place, layer)
    except BaseException:
        put_back()
        raise
    reopen = readers.close_fast_paths(model, AdapterLayer)

    def undo() -> None:
        reopen()
        put_back()

    report = ApplyReport(
        tuple(AdaptedLayer.of(target.name, layer) for target, layer in zip(selection.targets, layers, strict=True)),
        selection.passed_over,
        selection.unused,
        (before, sum(layer.quantized_weight().nbytes for layer in packed)) if packed else None,
        selection.doubted,
    )
    return report, undo


def places_of(model: nn.Module) -> dict[int, list[str]]:
    """Return every dotted name of each module in `model`, by the module's id."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the one that has the dotted name `name` in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
