"""Rows of a report whose names differ in numbers share a line, which stands for these names and no others."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from lora_kernels.core.repeated import number_of, repeated


def names_of(label: str) -> list[str]:
    """Return the names that a line stands for, read from its text alone."""
    parts = []
    for part in re.split(r"(\{[^}]*\})", label.partition(" × ")[0]):
        if not part.startswith("{"):
            parts.append([part])
            continue
        numbers = []
        for run in part[1:-1].split(","):
            first, _, last = run.partition("..")
            numbers += range(int(first), int(last or first) + 1)
        parts.append([str(number) for number in numbers])
    return ["".join(each) for each in itertools.product(*parts)]


def test_blocks_share_a_line_in_the_order_of_their_first_names():
    rows = [(f"layers.{i}.{name}_proj", "4→4") for i in range(32) for name in "qv"] + [("head", "4→9")]
    assert [line.label for line in repeated(rows)] == [
        "layers.{0..31}.q_proj × 32",
        "layers.{0..31}.v_proj × 32",
        "head",
    ]


@pytest.mark.parametrize(
    ("numbers", "label"),
    [
        ([5], "h.5.q"),
        ([0, 1], "h.{0,1}.q × 2"),
        ([3, 0, 1, 2, 5], "h.{0..3,5}.q × 5"),
        ([0, 2, 4, 9, 10, 11], "h.{0,2,4,9..11}.q × 6"),
    ],
)
def test_sets_of_numbers_show_runs_and_gaps(numbers, label):
    (line,) = repeated([(f"h.{number}.q", "") for number in numbers])
    assert line.label == label and sorted(names_of(label)) == sorted(f"h.{number}.q" for number in numbers)


def test_texts_and_keys_that_differ_part_the_lines():
    rows = [("a.0", "x"), ("a.1", "y"), ("a.2", "x"), ("a.3", "x")]
    assert [line.label for line in repeated(rows)] == ["a.{0,2,3} × 3", "a.1"]
    assert [line.label for line in repeated(rows, [0, 0, 1, 0])] == ["a.{0,3} × 2", "a.1", "a.2"]


def test_what_is_no_whole_number_between_dots_is_no_number():
    rows = [(name, "") for name in ("a.01", "a.1", "a1.q", "a2.q", "a.²", f"a.{'9' * 5000}", "")]
    assert [line.label for line in repeated(rows)] == [name for name, _ in rows]


def test_numbers_of_the_own_name_in_a_text_are_sets_too_and_others_are_not():
    rows = [(f"m.{i}.experts.base", f"computed by m.{i}.experts, as m.7.x, in 4 bits") for i in range(3)]
    (line,) = repeated(rows)
    assert line.text == "computed by m.{0..2}.experts, as m.7.x, in 4 bits"
    other = [(f"m.{i}.a", f"tied to m.{i + 1}.a") for i in range(3)]
    assert [line.label for line in repeated(other)] == ["m.0.a", "m.1.a", "m.2.a"]


def test_every_name_is_in_one_line_and_no_line_has_another():
    rng = random.Random(0)
    for _ in range(200):
        places = [
            (rng.randrange(4), rng.randrange(4), rng.choice("qk"), rng.choice("xy")) for _ in range(rng.randrange(25))
        ]
        rows = list(dict.fromkeys((f"m.{i}.b.{j}.{name}", text) for i, j, name, text in places))
        lines = repeated(rows)
        told = sorted((name, line.text) for line in lines for name in names_of(line.label))
        assert told == sorted(rows)
        assert sorted(place for line in lines for place in line.places) == list(range(len(rows)))
        assert all(line.names == len(names_of(line.label)) == len(line.places) for line in lines)


def test_numbers_are_told_as_one_or_as_a_range():
    assert (number_of([4, 4]), number_of([4, 2, 3])) == ("4", "2..4")
