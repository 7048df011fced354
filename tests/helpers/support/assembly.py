"""Follow every path through a kernel's assembly and check the order of its stores, releases, acquires and loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"^(?P<condition>@!?%p\d+\s+)?bra(?:\.uni)?\s+(?P<target>\$L\w+);")
_PREDICATE = re.compile(r"^@!?%p\d+\s+")


@dataclass
class Block:
    instructions: list[str] = field(default_factory=list)
    """The instructions, without their predicates."""
    successors: list[int] = field(default_factory=list)


def blocks(ptx: str) -> list[Block]:
    """Return the basic blocks of a module with one kernel, in the order of the text."""
    found, labels = [Block()], {}
    targets: list[str | None] = [None]
    falls_through = [True]

    def begin() -> None:
        found.append(Block())
        targets.append(None)
        falls_through.append(True)

    for line in map(str.strip, ptx.splitlines()):
        label, branch = _LABEL.match(line), _BRANCH.match(line)
        if label:
            begin()
            labels[label.group(1)] = len(found) - 1
        elif branch:
            targets[-1], falls_through[-1] = branch.group("target"), bool(branch.group("condition"))
            begin()
        elif line.startswith("ret;"):
            falls_through[-1] = False
            begin()
        elif line and not line.startswith(("//", ";", ".", "$", "{", "}")):
            found[-1].instructions.append(_PREDICATE.sub("", line))
    for number, block in enumerate(found):
        target = targets[number]
        if target is not None:
            block.successors.append(labels[target])
        if falls_through[number] and number + 1 < len(found):
            block.successors.append(number + 1)
    return found


def reaching(graph: list[Block], step: Callable[[str, str], str]) -> Iterator[tuple[str, str]]:
    """Yield (instruction, state) for every state in which some path reaches the instruction. `step(instruction, state)`
    returns the state after it."""
    seen: list[set[str]] = [set() for _ in graph]
    pending = [(0, "")]
    while pending:
        number, state = pending.pop()
        if state in seen[number]:
            continue
        seen[number].add(state)
        for instruction in graph[number].instructions:
            yield instruction, state
            state = step(instruction, state)
        pending += [(successor, state) for successor in graph[number].successors]


def check_publication(ptx: str) -> None:
    """Check that on every path a barrier lies between the last store to global memory and a release, so that the other
    threads' stores come before the release too.

    Raises AssertionError where none does, and where nothing is published.
    """

    def step(instruction: str, state: str) -> str:
        if instruction.startswith("st.global"):
            return "stored"
        if instruction.startswith(("bar.sync", "barrier.sync")):
            return "settled" if state else state
        return state

    found = {
        state
        for instruction, state in reaching(blocks(ptx), step)
        if instruction.startswith(("atom.", "red.")) and re.search(r"\.(release|acq_rel)\.", instruction)
    }
    assert found, "nothing is released"
    assert "settled" in found, "no store comes before a release and its barrier"
    assert found <= {"", "settled"}, "a release follows a store of another thread with no barrier between them"


def check_consumption(ptx: str) -> None:
    """Check that on every path data of other programs are loaded (through L2) only after an acquire and a barrier that
    follow the last claim.

    Raises AssertionError where they are not, and where no such data are loaded.
    """

    def step(instruction: str, state: str) -> str:
        if ".relaxed." in instruction:
            return ""
        if re.search(r"\.(acquire|acq_rel)\.", instruction):
            return "acquired"
        if instruction.startswith(("bar.sync", "barrier.sync")) and state == "acquired":
            return "acquired, then barrier"
        return state

    loads = {state for instruction, state in reaching(blocks(ptx), step) if instruction.startswith("ld.global.cg")}
    assert loads, "nothing published is loaded"
    assert loads == {"acquired, then barrier"}, "what is published is loaded before it is waited for"
