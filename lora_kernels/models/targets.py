"""PEFT's rules that choose layers, ranks and alphas by name, and the names of layers as messages show them."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_kernels.models.names import bare

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
    target_parameters: Sequence[str] | None = None
    ensure_weight_tying: bool = False


class Chosen:
    """The modules of a model that a set of rules names."""

    def __init__(self, model: nn.Module, rules: Rules) -> None:
        parameters, numbers = rules.target_parameters, rules.layers_to_transform
        self.wanted, self._excluded = _names(rules.target_modules), _names(rules.exclude_modules or ())
        self._lists = (
            (rules.layers_pattern,) if isinstance(rules.layers_pattern, str) else tuple(rules.layers_pattern or ())
        )
        self._blocks = frozenset((numbers,) if isinstance(numbers, int) else numbers or ())
        if self._blocks and isinstance(self.wanted, str):
            raise ValueError("layers_to_transform goes with a list of target_modules, not with a string")
        self.every = isinstance(self.wanted, str) and self.wanted.lower() == "all-linear"
        self._head = _output_head(bare(model)) if self.every else None
        if isinstance(parameters, str):
            raise TypeError(f"target_parameters must be a list of names, got {parameters!r:.200}")
        self.named_parameters = tuple(parameters or ())
        self._parameters = frozenset(self.named_parameters)
        self.fields = "target_modules or target_parameters" if parameters else "target_modules"
        """The fields of the rules, as errors name them."""

    def parameters(self, module: nn.Module, *names: str) -> tuple[str, ...]:
        """Return the own parameters of the module with these names that target_parameters name."""
        return parameters_of(module, self._parameters, *names)

    def why_left(self, module: nn.Module, name: str, wrapped_name: str) -> str:
        """Return why the rules leave a module as it is, or "" where they choose it."""
        if matches(self._excluded, name, wrapped_name):
            return "in exclude_modules"
        if self.every:
            return "not linear" if not looks_linear(module) else "the output head" if module is self._head else ""
        # As in PEFT, layers_to_transform does not apply to a layer whose whole name is in target_modules.
        free = not self._blocks or name in self.wanted or _block(name, self._lists) in self._blocks
        return "" if free and matches(self.wanted, name, wrapped_name) else "not in target_modules"


def parameters_of(module: nn.Module, wanted: Collection[str], *names: str) -> tuple[str, ...]:
    """Return the own parameters of the module with these names that `wanted` has, by PEFT's rule for target_parameters:
    ``module.parameter`` is one of them, or ends in a dot and one of them."""
    own = (key for key, _ in module.named_parameters(recurse=False)) if wanted else ()
    return tuple(key for key in own if matches(wanted, *(f"{name}.{key}" for name in names)))


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


def unused(rules: Rules, wanted: str | Collection[str], names: list[str]) -> tuple[str, ...]:
    """Return the names of `wanted` and the patterns of `rules` that match none of the targets' names."""
    ends = {end for name in names for end in _ends(name)}
    unused = [] if isinstance(wanted, str) else [name for name in wanted if name not in ends]
    unused += [f"target_parameters {name}" for name in rules.target_parameters or () if name not in ends]
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


def looks_linear(module: nn.Module) -> bool:
    """Return whether a module is one of those that "all-linear" stands for, or belongs in the report beside them. The
    name of its class counts too, for quantised layers and transformers' Conv1D, which need not be an nn.Linear."""
    kind = type(module).__name__
    leaf = not any(True for _ in module.children())
    return isinstance(module, nn.Linear) or (leaf and ("Linear" in kind or kind == "Conv1D"))


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that ``model.get_output_embeddings()`` returns, or None where there is no such method."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return bare(head) if isinstance(head, nn.Module) else None
