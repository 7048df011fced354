"""The choice of the layers of a model that get LoRA, and the reasons against the others."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora_kernels.models import kinds
from lora_kernels.models.names import bare, plain_names
from lora_kernels.models.targets import Chosen, Rules, by_pattern, looks_linear, matches, some, told_by_reason, unused
from lora_kernels.models.ties import Tied, tied_to_embedding, with_adapter_of
from lora_kernels.nn import readers
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.base import AdapterLinear
from lora_kernels.nn.settings import LoRASettings


@dataclass(frozen=True)
class Target:
    """A layer to replace."""

    name: str
    """Its first dotted name in the model, without the names of wrappers."""
    module: nn.Module
    """The layer itself."""
    settings: LoRASettings
    """The settings of the layer that replaces it."""
    kind: type[AdapterLayer]
    """The class of the layer that replaces it."""
    parameters: tuple[str, ...] = ()
    """Its parameters that target_parameters name, where they have chosen it."""
    tied_to: nn.Module | None = None
    """The embedding whose adapter it gets, where its weight is the embedding's table and stays so."""

    def adapted(self, made: Mapping[nn.Module, AdapterLayer]) -> AdapterLayer:
        """Return the layer that replaces it. `made` has those of other targets, by the layer that each replaces. Raises
        ValueError or TypeError, which names the layer."""
        experts = self.parameters and not issubclass(self.kind, AdapterLinear)
        more: dict[str, Any] = {"parameters": self.parameters} if experts else {}
        try:
            if self.tied_to is not None:
                return with_adapter_of(made[self.tied_to], self.module, self.settings)
            return self.kind.from_settings(self.module, self.settings, **more)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Selection:
    """The layers of a model that a set of rules chooses."""

    targets: list[Target]
    passed_over: dict[str, str] = field(default_factory=dict)
    """The reason why a layer that looks linear is left as it is, for each of these layers."""
    unused: tuple[str, ...] = ()
    """The names and patterns of the rules that no target matches."""
    doubted: dict[str, str] = field(default_factory=dict)
    """The targets whose weights their parents may read without calling them, and how."""
    read: dict[str, str] = field(default_factory=dict)
    """Those of `passed_over` that "all-linear" leaves because their parents read their weights, and how."""


def select(model: nn.Module, settings: LoRASettings, rules: Rules) -> Selection:
    """Return the layers that `apply_lora` replaces, each with `settings` and its own r and lora_alpha. Nothing is
    changed. Raises what `apply_lora` raises."""
    _refuse_adapted(model)
    chosen = Chosen(model, rules)
    tied = _tied(model, chosen) if rules.ensure_weight_tying else None
    targets: list[Target] = []
    reached: list[str] = []
    passed_over: dict[str, str] = {}
    unfit: dict[str, str] = {}
    doubted: dict[str, str] = {}
    read: dict[str, str] = {}
    parts: set[int] = set()  # the modules inside of targets, which go with them
    for name, wrapped_name, module in plain_names(model):
        if not name:
            continue
        parameters = chosen.parameters(module, name, wrapped_name)
        keys = [(f"{name}.{each}", f"{wrapped_name}.{each}") for each in parameters] or [(name, wrapped_name)]
        is_tied = tied is not None and (module is tied.embedding or module in tied.others)
        if left := "" if parameters or is_tied else chosen.why_left(module, name, wrapped_name):
            if looks_linear(module) and id(module) not in parts:
                passed_over[name] = left
            continue
        kind = kinds.kind_of_parameters(module, parameters) if parameters else kinds.kind_of(module)
        reason = _why_not_in_wrapper(wrapped_name) or kinds.why_not(kind, module) or _why_not_beside(kind, settings)
        if not reason and (reading := readers.reading_in(model, wrapped_name)):
            if reading.always:
                reason = read[name] = str(reading)
            else:
                doubted[name] = str(reading)
        if not reason and settings.quant and (method := readers.conversion_in(model, wrapped_name)):
            doubted[name] = f"{method} may convert x to the dtype of its weight, and quantised codes are int8"
        if not reason:
            assert kind is not None
            source = tied.embedding if tied is not None and module in tied.others else None
            own = _own_settings(settings, rules, kind, keys)
            targets.append(Target(name, module, own, kind, parameters, source))
            reached += [each for key in keys for each in key]
            parts.update(map(id, module.modules()))
        elif chosen.every and not parameters and not is_tied:
            passed_over[name] = reason
        else:
            unfit[name] = reason
    if unfit:
        raise ValueError(
            f"{chosen.fields} match modules that cannot be replaced: {told_by_reason(unfit)}. Name others, or add "
            "these to exclude_modules"
        )
    if not targets:
        raise ValueError(_nothing(model, chosen, passed_over))
    if settings.quant is not None and not any(issubclass(target.kind, AdapterLinear) for target in targets):
        raise ValueError(
            f"quant={settings.quant!r} is for linear layers, and none is chosen: {some([t.name for t in targets])}. "
            "Leave it out, or add linear layers to target_modules"
        )
    _check_tied(targets)
    _warn_of_ddp(model, targets)
    return Selection(targets, passed_over, unused(rules, chosen.wanted, reached), doubted, read)


def _tied(model: nn.Module, chosen: Chosen) -> Tied | None:
    """Return the layers that ensure_weight_tying adapts together: the embedding of the model and those with its weight,
    if the rules choose one of them. Warns where there are none, as PEFT does."""
    tied = tied_to_embedding(model)
    if tied is None:
        warnings.warn(
            "ensure_weight_tying has no effect: no layer of the model has the embedding's weight", stacklevel=4
        )
        return None
    named = {id(module): names for *names, module in plain_names(model)}
    if any(not chosen.why_left(module, *named[id(module)]) for module in (tied.embedding, *tied.others)):
        return tied
    warnings.warn(
        "ensure_weight_tying has no effect: neither the embedding nor a layer with its weight is chosen", stacklevel=4
    )
    return None


def _check_tied(targets: list[Target]) -> None:
    """Raise ValueError where a layer that gets the adapter of an embedding would have other settings."""
    own = {target.module: target for target in targets}
    for target in targets:
        source = own.get(target.tied_to) if target.tied_to is not None else None
        if source is None:
            continue
        if target.settings.use_dora:
            raise ValueError(
                f"{target.name} cannot have the adapter of {source.name} with use_dora: DoRA's magnitudes are by "
                "columns of the table in an embedding, and by rows in a head. Leave out use_dora or ensure_weight_tying"
            )
        if source.settings != target.settings:
            raise ValueError(
                f"{target.name} gets the adapter of {source.name} (ensure_weight_tying), but r or lora_alpha differs: "
                f"{target.settings.r} and {source.settings.r}, {target.settings.lora_alpha:g} and "
                f"{source.settings.lora_alpha:g}"
            )


def _why_not_beside(kind: type[AdapterLayer] | None, settings: LoRASettings) -> str:
    """Return why a layer of class `kind` cannot have these settings."""
    if kind is None or issubclass(kind, AdapterLinear) or settings.init == "kaiming":
        return ""
    return f"init={settings.init!r} is for linear layers"


def _own_settings(
    settings: LoRASettings, rules: Rules, kind: type[AdapterLayer], keys: Sequence[tuple[str, str]]
) -> LoRASettings:
    """Return the settings of a layer whose names, or those of its adapted parameters, are `keys`. Raises ValueError
    where the patterns give two of the parameters different ones."""
    ranks = {by_pattern(rules.rank_pattern, name, settings.r, other) for name, other in keys}
    alphas = {by_pattern(rules.alpha_pattern, name, settings.lora_alpha, other) for name, other in keys}
    if len(ranks) > 1 or len(alphas) > 1:
        raise ValueError(
            f"rank_pattern or alpha_pattern gives {some([name for name, _ in keys])} several values of r "
            f"({some(list(map(str, ranks)))}) or lora_alpha ({some(list(map(str, alphas)))}): the parameters of one "
            "module have one of each"
        )
    if not issubclass(kind, AdapterLinear):  # as with bitsandbytes, only linear layers are quantised
        settings = replace(settings, quant=None, double_quant=False)
    return replace(settings, r=ranks.pop(), lora_alpha=alphas.pop())


def _why_not_in_wrapper(wrapped_name: str) -> str:
    """Return why a layer cannot be replaced inside the wrapper around it alone, or "" where it can."""
    if wrapped_name.rpartition(".")[2] == "_orig_mod":
        return "torch.compile has compiled this layer on its own and would go on calling it: apply LoRA, then compile"
    return ""


def _warn_of_ddp(model: nn.Module, targets: list[Target]) -> None:
    """Warn if DistributedDataParallel, which reduces the gradients of the parameters that it was made with, is around a
    target."""
    inside = {id(target.module) for target in targets}
    kind = nn.parallel.DistributedDataParallel
    if any(isinstance(ddp, kind) and any(id(m) in inside for m in ddp.modules()) for ddp in model.modules()):
        warnings.warn(
            "the model is in DistributedDataParallel already, which will not reduce the gradients of new adapters: "
            "add LoRA first, then wrap the model",
            stacklevel=4,
        )


def _refuse_adapted(model: nn.Module) -> None:
    layers = kinds.lora_layers(model)
    if layers:
        raise ValueError(
            f"the model has layers with adapters already ({some([name or 'itself' for name in layers])}): "
            "merge_and_unload(model) first, or give all target_modules in one call"
        )
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError("the model has layers of PEFT: call lora_kernels.fuse(model) instead")


def _nothing(model: nn.Module, chosen: Chosen, passed_over: dict[str, str]) -> str:
    """Return the error message for rules that match no layer."""
    wanted = chosen.wanted
    if isinstance(bare(model), nn.Linear):
        return "the model is an nn.Linear itself and cannot be replaced in place: FusedLoRALinear.from_linear(model)"
    if chosen.named_parameters and not wanted:
        return _no_parameter(model, chosen.named_parameters)
    classes = Counter(type(module).__name__ for module in model.modules())
    has = told_by_reason(passed_over) or some([f"{n} {name}" for name, n in classes.most_common()])
    if chosen.every and not passed_over:
        return (
            f"the model has no linear layer, which 'all-linear' stands for; it has {has}. Name its embeddings, "
            "convolutions or attentions in target_modules"
        )
    asked = repr(wanted) if isinstance(wanted, str) else some([repr(n) for n in wanted])
    end = isinstance(wanted, str) and any(matches((wanted,), name) for name in passed_over)
    hint = f". A string is a regular expression for the whole name: [{wanted!r}] is for ends of names" if end else ""
    return f"target_modules ({asked:.200}) match no layer to replace; the model has {has}{hint}"


def _no_parameter(model: nn.Module, wanted: Sequence[str]) -> str:
    """Return the error message for target_parameters that name nothing."""
    stacks = [
        f"{name}.{key}" for name, _, module in plain_names(model) for key, p in module._parameters.items()
        if p is not None and p.ndim == 3
    ]  # fmt: skip
    has = f"the model has {some(stacks)}" if stacks else "the model has no stacks of experts"
    return f"target_parameters ({some([repr(name) for name in wanted])}) name no parameter of the model; {has}"
