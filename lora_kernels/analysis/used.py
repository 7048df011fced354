"""The report of `usage`: what became of each layer with an adapter, by its calls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_kernels.core.repeated import number_of, repeated
from lora_kernels.nn import other_layers

FUSED = "fused"
"""Every call with an adapter was computed by the kernels."""
PARTLY = "partly fused"
"""Some calls were left to PEFT."""
LEFT = "left to PEFT"
"""All calls were left to PEFT."""
BASE = "no adapter"
"""In every call the adapter was merged, disabled or not among the active ones."""
NEVER = "never called"
"""The model has run, and has not called this layer."""
UNCOUNTED = "not counted"
"""No call outside torch.compile, which counts none."""
IDLE = "not run"
"""No layer of the model has been called."""
NOT_FUSED = "not fused"
"""PEFT's own forward serves every call."""

STATES = (FUSED, PARTLY, LEFT, BASE, NEVER, UNCOUNTED, IDLE, NOT_FUSED)
_HEADS = {
    PARTLY: "partly fused",
    LEFT: "left to PEFT in every call",
    BASE: "called without an adapter only",
    NEVER: "never called although the model has run",
    UNCOUNTED: "without a counted call, because torch.compile, which counts none, has compiled code",
    IDLE: "not run so far, as no layer has been called",
    NOT_FUSED: "not fused",
}


@dataclass(frozen=True)
class LayerUsage:
    """What became of one layer: a row of a `Usage`."""

    name: str
    layer: str
    """The name of its class."""
    size: str
    """The size of the base, and the adapters."""
    state: str = IDLE
    """One of `STATES`."""
    why: str = ""
    """The reason, where it is not fused in every call."""
    fused_calls: int = 0
    left_calls: Mapping[str, int] = field(default_factory=dict)
    """The number of calls that were left to PEFT, by reason."""
    base_calls: int = 0
    """The number of calls in which no adapter was to be computed."""
    bypass: str = ""
    """Which other code may compute it, where it has not been called at all."""
    trained: bool = False
    """Whether its adapter has a gradient at present."""
    compiled: bool = False
    """Whether torch.compile has compiled it or a module around it."""
    not_fused: str = ""
    """Why it has no fused forward."""

    @property
    def calls(self) -> int:
        """The number of calls."""
        return self.fused_calls + sum(self.left_calls.values()) + self.base_calls

    def judged(self, ran: bool, compiled: bool) -> LayerUsage:
        """Return the row with its state and reason: `ran` tells whether the model has run, and `compiled` whether
        torch.compile has compiled anything."""
        reasons = "; ".join(f"{why} ({n} of {self.calls} calls)" for why, n in self.left_calls.items())
        state, why = FUSED, ""
        if self.not_fused and not self.calls:
            state, why = NOT_FUSED, self.not_fused
        elif self.left_calls:
            state, why = PARTLY if self.fused_calls else LEFT, reasons
        elif not self.fused_calls and self.base_calls:
            state, why = BASE, "merged, disabled or not active in every call"
        elif not self.calls:
            state = UNCOUNTED if self.compiled or (compiled and not ran) else NEVER if ran else IDLE
            why = self.bypass
            if self.trained and state != IDLE:
                why += f"{'; ' * bool(why)}its adapter has a gradient, so other code has computed it"
            if not why and state == NEVER:
                why = "no input has reached it, or other code reads its weights"
                why += ", or it was called in code that torch.compile has compiled" if compiled else ""
        return replace(self, state=state, why=why)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        kept = ("name", "layer", "size", "state", "why", "fused_calls", "base_calls")
        return {key: getattr(self, key) for key in kept} | {"left_calls": dict(self.left_calls)}


@dataclass(frozen=True)
class Usage:
    """The result of `usage`. ``str()`` of it is a table, in which layers of repeated blocks share a line."""

    rows: tuple[LayerUsage, ...]
    """The layers with an adapter, PEFT's and this package's, in the order of the model."""
    groups: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    """The groups of `fuse`: name of the module → its layers, and the number of calls that computed several of them."""
    others: Mapping[str, int] = field(default_factory=dict)
    """The number of layers with adapters of other libraries and kinds, by the full name of their class."""
    backend: str = ""
    """Which back-ends serve the layers on a GPU, and on what evidence."""
    compiled: bool = False
    """Whether torch.compile has compiled anything in this process, whose calls are not counted."""

    def since(self, before: Usage) -> Usage:
        """Return the usage between two calls of `usage` for one model: the calls of this one less those of `before`."""
        old = {row.name: row for row in before.rows}
        rows = [_less(row, old[row.name]) if row.name in old else row for row in self.rows]
        groups = {}
        for name, (names, calls) in self.groups.items():
            groups[name] = names, calls - before.groups.get(name, (names, 0))[1]
        ran = any(row.calls for row in rows)  # gradients may be older than the period
        return replace(self, rows=judged(rows, ran, self.compiled), groups=groups)

    def of(self, *states: str) -> tuple[LayerUsage, ...]:
        """Return the rows in one of these states: "fused", "partly fused", "left to PEFT", "no adapter", "never
        called", "not counted", "not run" and "not fused". Raises ValueError for another one."""
        if unknown := set(states) - set(STATES):
            raise ValueError(f"there is no state {', '.join(map(repr, sorted(unknown)))}: one of {', '.join(STATES)}")
        return tuple(row for row in self.rows if row.state in states)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data: the number of layers in each state, and the rows."""
        return {
            "layers": len(self.rows),
            "states": dict(Counter(row.state for row in self.rows)),
            "rows": [row.as_dict() for row in self.rows],
            "compiled": self.compiled,
            "groups": {name: {"layers": list(names), "calls": n} for name, (names, n) in self.groups.items()},
            "others": dict(self.others),
        }

    def to_json(self, indent: int | None = 1) -> str:
        """Return the report as JSON."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)

    def table(self, full: bool = False) -> str:
        """Return the report as text; with `full` each layer has a line of its own."""
        others = other_layers.told(self.others)
        if not self.rows:
            return f"the model has no layer with an adapter that is served; it has {others or 'none at all'}"
        states = Counter(row.state for row in self.rows)
        head = f"{states[FUSED]} of {len(self.rows)} LoRA layers were computed by their fused forward in every call"
        head += "".join(f"; {states[state]} {what}" for state, what in _HEADS.items() if states[state])
        lines = [head, *self._lines(full)]
        for name, names, calls in self._groups(full):
            lines.append(f"  {name}: {', '.join(names)} in one call, {calls} so far")
        if others:
            lines.append(f"beside these, {others}")
        return "\n".join([*lines, *filter(None, [self.backend])])

    def __str__(self) -> str:
        return self.table()

    def _lines(self, full: bool) -> list[str]:
        texts = [(row.name or "the model", f"{row.size}{': ' * bool(row.why)}{row.why}") for row in self.rows]
        parts: list[tuple[str, str, tuple[int, ...]]]
        if full:
            parts = [(name, text, (i,)) for i, (name, text) in enumerate(texts)]
        else:
            parts = [(line.label, line.text, line.places) for line in repeated(texts, [row.state for row in self.rows])]
        told = [(name, self.rows[places[0]].state, self._calls(places), text) for name, text, places in parts]
        name, state, calls = (max(len(row[i]) for row in told) for i in range(3))
        return [f"  {row[0]:{name}}  {row[1]:{state}}  {row[2]:>{calls}}  {row[3]}" for row in told]

    def _calls(self, places: Sequence[int]) -> str:
        rows = [self.rows[i] for i in places]
        if rows[0].state == NOT_FUSED:
            return ""
        number = number_of(row.calls for row in rows)
        return f"{number} call{'' if number == '1' else 's'}"

    def _groups(self, full: bool) -> list[tuple[str, tuple[str, ...], str]]:
        entries = list(self.groups.items())
        if full:
            return [(name, names, str(calls)) for name, (names, calls) in entries]
        lines = repeated([(name, "") for name, _ in entries], [names for _, (names, _) in entries])
        members = [(line, [entries[i][1] for i in line.places]) for line in lines]
        return [(line.label, every[0][0], number_of(calls for _, calls in every)) for line, every in members]


def judged(rows: Sequence[LayerUsage], ran: bool, compiled: bool) -> tuple[LayerUsage, ...]:
    """Return the rows with their states: `ran` tells whether the model has run, and `compiled` whether torch.compile
    has compiled anything."""
    return tuple(row.judged(ran, compiled) for row in rows)


def _less(row: LayerUsage, old: LayerUsage) -> LayerUsage:
    """Return `row` with the calls since `old`. A layer that was fused anew has begun to count again."""
    left = {why: n - old.left_calls.get(why, 0) for why, n in row.left_calls.items()}
    fused, base = row.fused_calls - old.fused_calls, row.base_calls - old.base_calls
    if fused < 0 or base < 0 or any(n < 0 for n in left.values()):
        return row
    return replace(row, fused_calls=fused, base_calls=base, left_calls={why: n for why, n in left.items() if n})
