"""`budget`: the rank that each choice of weights gets at the same number of trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_kernels.analysis.roles import roles_of
from lora_kernels.analysis.short_names import short_names
from lora_kernels.analysis.tables import as_table, as_text
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_names
from lora_kernels.models.pairs import pairs
from lora_kernels.models.targets import Chosen, Names, Rules, by_reason, matches, some
from lora_kernels.nn.fit import Conv1DLike

if TYPE_CHECKING:
    from rich.table import Table

ALL = "all-linear"
ROLES = ("q", "q, v", "q, k, v, o")
"""The choices of the LoRA paper that this module finds by the names of layers."""


@dataclass(frozen=True)
class Choice:
    """A choice of weights, and the rank that it gets."""

    name: str
    layers: tuple[str, ...]
    """The names of the layers."""
    target_modules: Names
    """The same layers for `lora_kernels.apply_lora` and PEFT's ``LoraConfig``, such as ["q_proj", "v_proj"]."""
    each: int
    """The parameters of one rank: Σ (in + out) over the layers."""
    r: int
    """The rank, rounded down; 0 where rank 1 costs too much, or where the model has no such layers."""
    reason: str = ""
    """Why there is no rank, or what to know about it."""

    @property
    def parameters(self) -> int:
        """The parameters of A and B that the choice really costs."""
        return self.r * self.each


@dataclass(frozen=True)
class Budget:
    """The choices at one number of trained parameters. ``print`` shows a table, and rich a coloured one."""

    parameters: int
    """The number of parameters that no choice exceeds."""
    choices: tuple[Choice, ...]

    def __getitem__(self, name: str) -> Choice:
        """Return the choice of this name. Raises KeyError, which lists the names."""
        for choice in self.choices:
            if choice.name == name:
                return choice
        raise KeyError(f"there is no choice {name!r}; there are {', '.join(repr(each.name) for each in self.choices)}")

    def table(self) -> Table:
        """Return a table of rich. Raises ImportError where rich is not installed."""
        return as_table(self._rows(), self._title())

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return f"{self._title()}\n{as_text(self._rows())}"

    def _title(self) -> str:
        return f"at most {self.parameters:,} parameters"

    def _rows(self) -> list[list[str]]:
        rows = [["weights", "layers", "one rank", "rank", "parameters", ""]]
        for choice in self.choices:
            numbers = [f"{choice.r}", f"{choice.parameters:,}"] if choice.r else ["-", "-"]
            rows.append([choice.name, f"{len(choice.layers)}", f"{choice.each:,}", *numbers, choice.reason])
        return rows


def budget(
    model: nn.Module,
    parameters: int | None = None,
    r: int | None = None,
    groups: Mapping[str, Names] | None = None,
) -> Budget:
    """Return the rank of each choice of weights that costs at most `parameters` trained parameters.

        rank = ⌊parameters / Σ (in + out)⌋ over the layers of the choice

    The choices are those of the LoRA paper's tables 5 and 6 (Hu et al., 2021, arXiv:2106.09685): the query projections,
    query and value, all four projections of attention, and every linear layer but the output head. They are found by
    the names of the layers and their places, also where one layer computes q, k and v. Only shapes count, so the model
    may lie on the meta device or be quantised.

    Args:
        model: a plain model, without adapters.
        parameters: the number of elements of A and B to spend.
        r: in the place of `parameters`: spend what rank r costs for the last choice, which is every linear layer.
        groups: choices of your own by their names, each with target_modules as PEFT has them.

    Raises ValueError unless one of `parameters` and `r` is given and at least 1; for a model with adapters, or without
    linear layers; and for a group that names no linear layer.
    """
    if (parameters is None) == (r is None):
        raise ValueError(f"give parameters or r, one of them; got parameters={parameters!r} and r={r!r}")
    for what, number in (("parameters", parameters), ("r", r)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{what} must be an integer of at least 1, got {number!r}")
    sizes = _sizes(model)
    every = [name for name, _, _ in plain_names(model) if name]
    found = _found(list(sizes)) if groups is None else {n: _named(sizes, n, group) for n, group in groups.items()}
    costs = {name: sum(sizes[layer] for layer in layers) for name, (layers, _) in found.items()}
    if parameters is None:
        assert r is not None
        parameters = r * list(costs.values())[-1]
    choices = []
    for name, (layers, reason) in found.items():
        rank = parameters // costs[name] if layers and not reason else 0
        if layers and not reason and not rank:
            reason = f"rank 1 costs {costs[name]:,}"
        targets = short_names(layers, every) if layers else []
        choices.append(Choice(name, tuple(layers), targets, costs[name], rank, reason))
    return Budget(parameters, tuple(choices))


def _sizes(model: nn.Module) -> dict[str, int]:
    """Return in + out of each layer that "all-linear" stands for."""
    adapted = dict.fromkeys([*lora_layers(model), *(pair.name for pair in pairs(model))])
    if adapted:
        raise ValueError(f"the model has adapters in {some(list(adapted))}: give the plain model")
    chosen = Chosen(model, Rules(ALL))
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    sizes = {}
    for name, own, module in plain_names(model):
        if name and id(module) not in inside and not chosen.why_left(module, name, own):
            sizes[name] = _size(module)
    if not sizes:
        raise ValueError(f"the {type(model).__name__} has no linear layers")
    return sizes


def _size(module: Any) -> int:
    if isinstance(module, Conv1DLike):
        weight: Any = module.weight
        return int(sum(weight.shape))
    return int(module.in_features + module.out_features)


def _found(names: list[str]) -> dict[str, tuple[list[str], str]]:
    """Return the layers of the paper's choices, and the reason where the model has none."""
    roles = roles_of(names)
    found = {}
    for choice in ROLES:
        wanted = set(choice.split(", "))
        layers = [name for name in names if name in roles and set(roles[name]) <= wanted]
        mixed = [name for name in names if name in roles and set(roles[name]) & wanted and name not in layers]
        missing = wanted - {role for layer in layers for role in roles[layer]}
        reason = ""
        if mixed:
            shared = by_reason({name: ", ".join(roles[name]) for name in mixed})
            told = [f"{each[0]} computes {which} at once ({len(each)} such layers)" for which, each in shared.items()]
            reason, layers = "; ".join(told), []
        elif missing:
            reason, layers = f"no layers found for {', '.join(sorted(missing))}", []
        found[choice] = (layers, reason)
    return found | {ALL: (names, "")}


def _named(sizes: Mapping[str, int], name: str, group: Names) -> tuple[list[str], str]:
    """Return the layers of a group of the caller's."""
    if isinstance(group, str) and group.lower() == ALL:
        return list(sizes), ""
    rule = group if isinstance(group, str) else tuple(group)
    layers = [each for each in sizes if matches(rule, each)]
    if not layers:
        raise ValueError(f"group {name!r} names no linear layer: {rule!r}; there are {some(list(sizes))}")
    return layers, ""
