"""The choice of the layers of a model that get LoRA, by PEFT's rules for names, and the reasons against the others."""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lora_kernels.models.names import bare, plain_names
from lora_kernels.nn import fit, readers
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.settings import LoRASettings

Names = str | Iterable[str]
"""A regular expression for a layer's whole dotted name, or several names of layers. A name stands for every layer whose
dotted name is the same, or ends in a dot and this name."""


@dataclass(frozen=True)
class Rules:
    """The keywords of `apply_lora` that choose layers by name, and their ranks and alphas. `apply_lora` documents
    them."""

    target_modules: Names
    exclude_modules: Names | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names | None = None


@dataclass(frozen=True)
class Target:
    """A layer to replace."""

    name: str
    """Its first dotted name in the model, without the names of wrappers."""
    linear: nn.Linear
    """The layer itself."""
    settings: LoRASettings
    """The settings of the layer that replaces it."""


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
    wanted, excluded = _names(rules.target_modules), _names(rules.exclude_modules or ())
    lists = (rules.layers_pattern,) if isinstance(rules.layers_pattern, str) else tuple(rules.layers_pattern or ())
    numbers = rules.layers_to_transform
    blocks = frozenset((numbers,) if isinstance(numbers, int) else numbers or ())
    if blocks and isinstance(wanted, str):
        raise ValueError("layers_to_transform goes with a list of target_modules, not with a string")
    every = isinstance(wanted, str) and wanted.lower() == "all-linear"
    head = _output_head(bare(model)) if every else None

    targets: list[Target] = []
    reached: list[str] = []
    passed_over: dict[str, str] = {}
    unfit: dict[str, str] = {}
    doubted: dict[str, str] = {}
    read: dict[str, str] = {}
    for name, wrapped_name, module in plain_names(model):
        if not name:
            continue
        if every:
            matched = _looks_linear(module)
        else:
            # As in PEFT, layers_to_transform does not apply to a layer whose whole name is in target_modules.
            matched = matches(wanted, name, wrapped_name) and (
                not blocks or name in wanted or _block(name, lists) in blocks
            )
        if matches(excluded, name, wrapped_name):
            reason = "in exclude_modules"
        elif every and module is head:
            reason = "the output head"
        elif not matched:
            reason = "not in target_modules"
        else:
            reason = _why_not_in_wrapper(wrapped_name) or fit.why_not(module, in_place=True)
            if not reason and (reading := readers.reading_in(model, wrapped_name)):
                if reading.always:
                    reason = str(reading)
                    read[name] = reason
                else:
                    doubted[name] = str(reading)
            if not reason and settings.quant and (method := readers.conversion_in(model, wrapped_name)):
                doubted[name] = f"{method} may convert x to the dtype of its weight, and quantised codes are int8"
            if reason and not every:
                unfit[name] = reason
                continue
        if not reason:
            assert isinstance(module, nn.Linear)
            r = by_pattern(rules.rank_pattern, name, settings.r, wrapped_name)
            alpha = by_pattern(rules.alpha_pattern, name, settings.lora_alpha, wrapped_name)
            targets.append(Target(name, module, replace(settings, r=r, lora_alpha=alpha)))
            reached += [name, wrapped_name]
        elif _looks_linear(module):
            passed_over[name] = reason
    if unfit:
        raise ValueError(
            f"target_modules match modules that cannot be replaced: {told_by_reason(unfit)}. Name others, or add these "
            "to exclude_modules"
        )
    if not targets:
        raise ValueError(_nothing(model, wanted, passed_over))
    _warn_of_ddp(model, targets)
    return Selection(targets, passed_over, _unused(rules, wanted, reached), doubted, read)


def lora_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """Return every `FusedLoRALinear` in `model` by its first name, without the names of wrappers."""
    return {name: module for name, _, module in plain_names(model) if isinstance(module, FusedLoRALinear)}


def matches(names: str | Collection[str], *dotted: str) -> bool:
    """Return whether one of the dotted names of a module matches `names`, as `Names` describes it."""
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in dotted)
    return any(end in names for name in dotted for end in _ends(name))


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any, *other_names: str) -> Any:
    """Return the value of the first key that matches one of a module's names, or its end after a dot; else
    `default`."""
    key = _key(pattern or {}, name, *other_names)
    return default if key is None or not pattern else pattern[key]


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names as text, and the number of the others. Long names are cut, and letters that
    a terminal would obey are escaped, since the names may be those of a hostile file."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = (name if name.isprintable() else ascii(name)[1:-1] for name in names[:most])
    return ", ".join(name if len(name) <= 300 else f"{name[:300]}..." for name in shown) + more


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that share each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _names(names: Names) -> str | dict[str, None]:
    # A dictionary keeps the order for the report, and a look-up in it takes the same time however many names there are.
    return names if isinstance(names, str) else dict.fromkeys(names)


def _ends(name: str) -> Iterator[str]:
    """Yield a dotted name, and what follows each of its dots."""
    while name:
        yield name
        name = name.partition(".")[2]


def _unused(rules: Rules, wanted: str | Collection[str], names: list[str]) -> tuple[str, ...]:
    """Return the names of `wanted` and the patterns of `rules` that match none of the targets' names."""
    ends = {end for name in names for end in _ends(name)}
    unused = [] if isinstance(wanted, str) else [name for name in wanted if name not in ends]
    for kind, pattern in (("rank_pattern", rules.rank_pattern), ("alpha_pattern", rules.alpha_pattern)):
        used = {_key(pattern or {}, name) for name in names}
        unused += [f"{kind} {key}" for key in pattern or {} if key not in used]
    return tuple(unused)


def told_by_reason(reasons: Mapping[str, str]) -> str:
    """Return the names that share each reason as text."""
    return "; ".join(f"{some(names)} ({reason})" for reason, names in by_reason(reasons).items())


def expressions_of(rules: Rules) -> dict[str, dict[str, str]]:
    """Return the regular expressions in `rules` by field: as they are written, and as `select` matches them with names.
    A literal key of rank_pattern or alpha_pattern is not compiled, and stays as it is written."""
    lists = (rules.layers_pattern,) if isinstance(rules.layers_pattern, str) else tuple(rules.layers_pattern or ())
    return {
        "target_modules": {each: each for each in [rules.target_modules] if isinstance(each, str)},
        "exclude_modules": {each: each for each in [rules.exclude_modules] if isinstance(each, str)},
        "rank_pattern": {key: key if is_literal(key) else _END.format(key) for key in rules.rank_pattern or {}},
        "alpha_pattern": {key: key if is_literal(key) else _END.format(key) for key in rules.alpha_pattern or {}},
        "layers_pattern": {pattern: _BLOCK.format(pattern) for pattern in lists},
    }


_END = r"(.*\.)?({})$"
_BLOCK = r".*\.{}\.(\d+)\."


def is_literal(pattern: str) -> bool:
    """Return whether a regular expression consists of word characters and dots, so that it matches only texts as
    long as itself."""
    return _LITERAL.fullmatch(pattern) is not None


_LITERAL = re.compile(r"[\w.]+")


def _key(pattern: Iterable[str], *names: str) -> str | None:
    return next((key for key in pattern if any(_at_end(key, name) for name in names)), None)


def _at_end(key: str, name: str) -> bool:
    """Return whether `key` matches a name, or its end after a dot."""
    if not is_literal(key):
        return _compiled(_END.format(key)).match(name) is not None
    # To compile a pattern takes longer than this, and a rank_pattern may have one for each layer.
    start = len(name) - len(key)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return name.endswith(key) or all(k in (c, ".") for k, c in zip(key, name[start:], strict=True))


# The module re keeps 512 patterns, and would compile each of more of them again for every layer. A file may have 10,000
# in each of three fields (`patterns.check`), which are used in turns.
_compiled = functools.lru_cache(maxsize=1 << 15)(re.compile)


def _block(name: str, lists: Sequence[str]) -> int | None:
    """Return the number of a layer's block in one of the named lists of blocks, or in any list where none is named."""
    for pattern in lists or (r"[^.]*",):
        found = _compiled(_BLOCK.format(pattern)).match(name)
        if found:
            return int(found.group(1))
    return None


def _looks_linear(module: nn.Module) -> bool:
    # The name of the class counts too, since quantised layers and transformers' Conv1D, which need not be an nn.Linear,
    # belong in the report.
    kind = type(module).__name__
    leaf = not any(True for _ in module.children())
    return isinstance(module, nn.Linear) or (leaf and ("Linear" in kind or kind == "Conv1D"))


def _why_not_in_wrapper(wrapped_name: str) -> str:
    """Return why a layer cannot be replaced inside the wrapper around it alone, or "" where it can."""
    if wrapped_name.rpartition(".")[2] == "_orig_mod":
        return "torch.compile has compiled this layer on its own and would go on calling it: apply LoRA, then compile"
    return ""


def _warn_of_ddp(model: nn.Module, targets: list[Target]) -> None:
    """Warn if DistributedDataParallel, which reduces the gradients of the parameters that it was made with, is around a
    target."""
    inside = {id(target.linear) for target in targets}
    kind = nn.parallel.DistributedDataParallel
    if any(isinstance(ddp, kind) and any(id(m) in inside for m in ddp.modules()) for ddp in model.modules()):
        warnings.warn(
            "the model is in DistributedDataParallel already, which will not reduce the gradients of new adapters: "
            "add LoRA first, then wrap the model",
            stacklevel=4,
        )


def _refuse_adapted(model: nn.Module) -> None:
    layers = lora_layers(model)
    if layers:
        raise ValueError(
            f"the model has FusedLoRALinear already ({some([name or 'itself' for name in layers])}): "
            "merge_and_unload(model) first, or give all target_modules in one call"
        )
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError("the model has layers of PEFT: call lora_kernels.fuse(model) instead")


def _nothing(model: nn.Module, wanted: str | Collection[str], passed_over: dict[str, str]) -> str:
    """Return the error message for rules that match no layer."""
    if isinstance(bare(model), nn.Linear):
        return "the model is an nn.Linear itself and cannot be replaced in place: FusedLoRALinear.from_linear(model)"
    if not passed_over:
        kinds = Counter(type(module).__name__ for module in model.modules())
        return f"the model has no nn.Linear; it has {some([f'{n} {kind}' for kind, n in kinds.most_common()])}"
    asked = repr(wanted) if isinstance(wanted, str) else some([repr(n) for n in wanted])
    end = isinstance(wanted, str) and any(matches((wanted,), name) for name in passed_over)
    hint = f". A string is a regular expression for the whole name: [{wanted!r}] is for ends of names" if end else ""
    has = told_by_reason(passed_over)
    return f"target_modules ({asked:.200}) match no nn.Linear to replace; the model has {has}{hint}"


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that ``model.get_output_embeddings()`` returns, or None where there is no such method."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return bare(head) if isinstance(head, nn.Module) else None
