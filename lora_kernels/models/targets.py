"""Which layers of a model get LoRA: PEFT's rules for names, and the reasons why a layer cannot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_kernels.nn import fit
from lora_kernels.nn.linear import FusedLoRALinear

Names = str | Iterable[str]
"""A regular expression for the whole dotted name, or names: the whole one or its last parts."""


@dataclass(frozen=True)
class Target:
    """A layer to replace: its first name and the arguments of `FusedLoRALinear.from_linear`."""

    name: str
    linear: nn.Linear
    settings: dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """What a set of rules means for a model."""

    targets: list[Target]
    passed_over: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def select(
    model: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    target_modules: Names,
    exclude_modules: Names | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
) -> Selection:
    """The layers that `apply_lora` replaces, with their r and lora_alpha; changes nothing. Raises as `apply_lora`."""
    _refuse_adapted(model)
    every = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    wanted = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    excluded = exclude_modules or ()
    if not isinstance(excluded, str):
        excluded = tuple(excluded)
    blocks = (layers_to_transform,) if isinstance(layers_to_transform, int) else tuple(layers_to_transform or ())
    if blocks and isinstance(wanted, str):
        raise ValueError("layers_to_transform goes with a list of target_modules, not with a string")
    lists = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or ())
    head = _output_head(model)

    targets: list[Target] = []
    passed_over: dict[str, str] = {}
    unfit: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name:
            continue
        why_not = fit.why_not(module, in_place=True)
        if every:
            matched = module is not head and _looks_linear(module)
        else:
            # A whole name counts in any block, as in PEFT.
            matched = matches(wanted, name) and (not blocks or name in wanted or _block(name, lists) in blocks)
        if matches(excluded, name):
            reason = "in exclude_modules"
        elif every and module is head:
            reason = "the output head"
        elif not matched:
            reason = "not in target_modules"
        elif why_not and every:
            reason = why_not
        elif why_not:
            unfit[name] = why_not
            continue
        else:
            assert isinstance(module, nn.Linear)
            settings = {
                "r": by_pattern(rank_pattern, name, r),
                "lora_alpha": by_pattern(alpha_pattern, name, lora_alpha),
            }
            targets.append(Target(name, module, settings))
            continue
        if _looks_linear(module):
            passed_over[name] = reason
    if unfit:
        raise ValueError(
            f"target_modules match what cannot be replaced: {_told(unfit)}. Name other modules, or add these to "
            "exclude_modules"
        )
    if not targets:
        raise ValueError(_nothing(model, wanted, passed_over))
    names = [target.name for target in targets]
    unused = [] if isinstance(wanted, str) else [n for n in wanted if not any(matches((n,), name) for name in names)]
    for pattern, kind in ((rank_pattern, "rank_pattern"), (alpha_pattern, "alpha_pattern")):
        used = {_key(pattern or {}, name) for name in names}
        unused += [f"{kind} {key}" for key in pattern or {} if key not in used]
    return Selection(targets, passed_over, tuple(unused))


def lora_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """Every `FusedLoRALinear` in `model` by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}


def matches(names: str | Sequence[str], name: str) -> bool:
    """Whether a dotted name matches a regular expression, or is, or ends in, one of several names."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == n or name.endswith(f".{n}") for n in names)


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name`, from a dot or the start on."""
    key = _key(pattern or {}, name)
    return default if key is None or not pattern else pattern[key]


def some(names: Sequence[str], most: int = 5) -> str:
    """A few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that have the same reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _told(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{some(names)} ({reason})" for reason, names in by_reason(reasons).items())


def _key(pattern: Iterable[str], name: str) -> str | None:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


def _block(name: str, lists: Sequence[str]) -> int | None:
    """The number of the block that a layer is in: of any list, or of those named."""
    for pattern in lists or (r"[^.]*",):
        found = re.match(rf".*\.{pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def _looks_linear(module: nn.Module) -> bool:
    # By name too: quantised layers and transformers' Conv1D are no nn.Linear, but the report should tell of them.
    kind = type(module).__name__
    leaf = not any(True for _ in module.children())
    return isinstance(module, nn.Linear) or (leaf and ("Linear" in kind or kind == "Conv1D"))


def _refuse_adapted(model: nn.Module) -> None:
    layers = lora_layers(model)
    if layers:
        raise ValueError(
            f"the model has FusedLoRALinear already ({some([name or 'itself' for name in layers])}): "
            "merge_and_unload(model) first, or give all target_modules in one call"
        )
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError("the model is one of PEFT's: lora_kernels.fuse(model) is for those")


def _nothing(model: nn.Module, wanted: str | Sequence[str], passed_over: dict[str, str]) -> str:
    """The message where no layer matched."""
    if isinstance(model, nn.Linear):
        return "the model is an nn.Linear itself and cannot be replaced in place: FusedLoRALinear.from_linear(model)"
    if not passed_over:
        kinds = Counter(type(module).__name__ for module in model.modules())
        return f"the model has no nn.Linear; it has {some([f'{n} {kind}' for kind, n in kinds.most_common()])}"
    asked = repr(wanted) if isinstance(wanted, str) else some([repr(n) for n in wanted])
    end = isinstance(wanted, str) and any(matches((wanted,), name) for name in passed_over)
    hint = f". A string is a regular expression for the whole name: [{wanted!r}] is for ends of names" if end else ""
    return f"target_modules ({asked:.200}) match no nn.Linear to replace; the model has {_told(passed_over)}{hint}"


def _output_head(model: nn.Module) -> nn.Module | None:
    """What the model's get_output_embeddings returns, if it has that method."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
