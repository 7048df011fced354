"""Rows of a report whose names differ in numbers alone, in one line: ``layers.{0..31}.q_proj × 32``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Repeated(NamedTuple):
    """The names of one line of a report."""

    name: str
    """The name, with a set of numbers such as {0..3,5} in the place of each number in which the names differ."""
    names: int
    """The number of names."""
    text: str
    """The text of the line. Numbers that belong to a name in it are sets too."""
    places: tuple[int, ...]
    """The places of the names among the given rows."""

    @property
    def label(self) -> str:
        """The name, and the number of names where there are several."""
        return self.name if self.names == 1 else f"{self.name} × {self.names}"


def repeated(rows: Iterable[tuple[str, str]], keys: Sequence[Hashable] | None = None) -> list[Repeated]:
    """Return the lines that stand for `rows`, each of a dotted name and a text, in the order of their first names.

    Names share a line if they differ in whole numbers between dots alone, have equal texts and equal `keys`, and if the
    sets of numbers in the line stand for these names and no others. Where a text holds a dotted name that begins like
    the row's own name, the numbers that both have in common count as equal too.
    """
    boxes: dict[tuple[str, str, Hashable], dict[tuple[frozenset[int], ...], list[int]]] = {}
    for place, (name, text) in enumerate(rows):
        numbers = [int(part) for part in name.split(".") if _is_number(part)]
        kind = _name_template(name), _text_template(text, name), None if keys is None else keys[place]
        box = tuple(frozenset((number,)) for number in numbers)
        boxes.setdefault(kind, {}).setdefault(box, []).append(place)
    lines = []
    for (template, text, _), parts in boxes.items():
        for box, places in _joined(parts).items():
            sets = [_set(numbers) for numbers in box]
            lines.append(Repeated(_filled(template, sets), len(places), _filled(text, sets), tuple(sorted(places))))
    return sorted(lines, key=lambda line: line.places)


def _joined(boxes: dict[tuple[frozenset[int], ...], list[int]]) -> dict[tuple[frozenset[int], ...], list[int]]:
    """Return fewer boxes for the same names: those that differ in one place are joined there, from the last place to
    the first."""
    for place in reversed(range(max(map(len, boxes)))):
        joined: dict[tuple[frozenset[int] | None, ...], tuple[frozenset[int], list[int]]] = {}
        for box, rows in boxes.items():
            rest = (*box[:place], None, *box[place + 1 :])
            numbers, others = joined.get(rest, (frozenset(), []))
            joined[rest] = numbers | box[place], others + rows
        boxes = {
            tuple(numbers if part is None else part for part in rest): rows for rest, (numbers, rows) in joined.items()
        }
    return boxes


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10 and str(int(part)) == part


_PLACE = "\0{}\0"


def _name_template(name: str) -> str:
    """Return the name with a mark in the place of each number between dots."""
    place, parts = 0, []
    for part in name.split("."):
        if _is_number(part):
            part, place = _PLACE.format(place), place + 1
        parts.append(part)
    return ".".join(parts)


def _text_template(text: str, name: str) -> str:
    """Return the text with marks in the places of the numbers of dotted names in it, as far as these begin like
    `name`."""
    own = name.split(".")

    def marked(match: re.Match[str]) -> str:
        parts = match[0].split(".")
        same = next((i for i, (a, b) in enumerate(zip(parts, own, strict=False)) if a != b), min(len(parts), len(own)))
        return ".".join([_name_template(".".join(parts[:same])), *parts[same:]] if same else parts)

    return re.sub(r"\w+(?:\.\w+)+", marked, text)


def _filled(template: str, sets: Sequence[str]) -> str:
    for place, numbers in enumerate(sets):
        template = template.replace(_PLACE.format(place), numbers)
    return template


def _set(numbers: frozenset[int]) -> str:
    """Return "5" for one number, and "{0..3,5}" for several."""
    if len(numbers) == 1:
        return str(next(iter(numbers)))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(told) + "}"


def number_of(values: Iterable[int]) -> str:
    """Return "5" where all values are 5, and "3..5" where they lie between these two."""
    low, high = min(every := list(values)), max(every)
    return str(low) if low == high else f"{low}..{high}"
