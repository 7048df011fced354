"""Follow every path through a kernel's assembly and check the order of its stores, releases, acquires and loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Syntax:
    """The patterns of control flow in an assembly language. `branch` has the groups "condition", which is empty where
    the branch is always taken, and "target"."""

    label: re.Pattern[str]
    branch: re.Pattern[str]
    end: str
    predicate: re.Pattern[str]


PTX = Syntax(
    label=re.compile(r"^(\$L__BB\w+):"),
    branch=re.compile(r"^(?P<condition>@!?%p\d+\s+)?bra(?:\.uni)?\s+(?P<target>\$L\w+);"),
    end="ret;",
    predicate=re.compile(r"^@!?%p\d+\s+"),
)
AMDGCN = Syntax(
    label=re.compile(r"^(\.LBB\w+):"),
    branch=re.compile(r"^s_(?P<condition>c)?branch\w*\s+(?P<target>\.LBB\w+)"),
    end="s_endpgm",
    predicate=re.compile(r"^(?!)"),
)


@dataclass
class Block:
    instructions: list[str] = field(default_factory=list)
    """The instructions, without their predicates."""
    successors: list[int] = field(default_factory=list)


def blocks(text: str, syntax: Syntax) -> list[Block]:
    """Return the basic blocks of a module with one kernel, in the order of the text."""
    found, labels = [Block()], {}
    targets: list[str | None] = [None]
    falls_through = [True]

    def begin() -> None:
        found.append(Block())
        targets.append(None)
        falls_through.append(True)

    for line in map(str.strip, text.splitlines()):
        label, branch = syntax.label.match(line), syntax.branch.match(line)
        if label:
            begin()
            labels[label.group(1)] = len(found) - 1
        elif branch:
            targets[-1], falls_through[-1] = branch.group("target"), bool(branch.group("condition"))
            begin()
        elif line.startswith(syntax.end):
            falls_through[-1] = False
            begin()
        elif line and not line.startswith(("//", ";", ".", "$", "{", "}")):
            found[-1].instructions.append(syntax.predicate.sub("", line))
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

    _check_releases(
        state
        for instruction, state in reaching(blocks(ptx, PTX), step)
        if instruction.startswith(("atom.", "red.")) and re.search(r"\.(release|acq_rel)\.", instruction)
    )


def check_publication_amd(amdgcn: str) -> None:
    """Check the same order as `check_publication`, and that each wave waits for its own stores before the barrier,
    because another wave's release does not wait for them.

    A release is the write-back of L2 that comes before its atomic.
    """

    def step(instruction: str, state: str) -> str:
        if re.match(r"(global|buffer|flat)_store", instruction):
            return "stored"
        if instruction.startswith("s_waitcnt") and "vmcnt(0)" in instruction:
            return "stored, complete" if state == "stored" else state
        if instruction.startswith("s_barrier"):
            return "settled" if state == "stored, complete" else state
        return state

    _check_releases(
        state for instruction, state in reaching(blocks(amdgcn, AMDGCN), step) if instruction.startswith("buffer_wbl2")
    )


def _check_releases(states: Iterator[str]) -> None:
    found = set(states)
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

    loads = {state for instruction, state in reaching(blocks(ptx, PTX), step) if instruction.startswith("ld.global.cg")}
    assert loads, "nothing published is loaded"
    assert loads == {"acquired, then barrier"}, "what is published is loaded before it is waited for"
