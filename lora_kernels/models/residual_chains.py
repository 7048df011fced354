"""The chains of a model: its layers of one kind, from block to block. The shortcuts of ResLoRA follow them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import some


@dataclass(frozen=True)
class Line:
    """Layers of one kind and size in consecutive blocks."""

    pattern: str
    """Their name, with * in the place of the block's number."""
    names: tuple[str, ...]
    """Their names, by the number of the block."""

    def around(self, model: nn.Module) -> tuple[str, nn.Module]:
        """Return the innermost module around all blocks that has a forward, and its name. Raises ValueError where there
        is none."""
        modules = {name: module for name, _, module in plain_names(model)}
        name = self.pattern.partition("*")[0].rstrip(".")
        while type(modules[name]).forward is nn.Module.forward:  # as a ModuleList, which is never called
            if not name:
                raise ValueError(f"the model is a {type(model).__name__}, which has no forward")
            name = name.rpartition(".")[0]
        return name, modules[name]


def lines_of(sizes: Mapping[str, str], blocks: str | None) -> list[Line]:
    """Return the chains of the layers `sizes`, which has the size of each layer by its name.

    Names that differ only in the number of the block belong together: the first number in the name, or the one behind
    the name `blocks` of the list of blocks. As in the official code, a layer of another size than the one before it
    begins a new chain. A layer without a number in its name is a chain of its own.

    Raises ValueError where no name has a number behind `blocks`, and where no chain has two layers.
    """
    before = "" if blocks is None else f"{re.escape(blocks)}\\."
    number = re.compile(rf"(?:^|(?<=\.)){before}(\d+)(?=\.|$)")
    found: dict[str, dict[int, str]] = {}
    alone: list[str] = []
    for name in sizes:
        match = number.search(name)
        if match is None:
            alone.append(name)
        else:
            pattern = f"{name[: match.start(1)]}*{name[match.end(1) :]}"
            found.setdefault(pattern, {})[int(match.group(1))] = name
    if blocks is not None and not found:
        raise ValueError(f"blocks={blocks!r} is the name of no list around {some(list(sizes))}")
    lines = []
    for pattern, numbered in found.items():
        names = [name for _, name in sorted(numbered.items())]
        starts = [i for i, name in enumerate(names) if i == 0 or sizes[name] != sizes[names[i - 1]]]
        lines += [Line(pattern, tuple(names[i:j])) for i, j in zip(starts, [*starts[1:], len(names)], strict=True)]
    if not any(len(line.names) > 1 for line in lines):
        raise ValueError(
            f"none of these layers has one of the same kind and size in an earlier block, so there is nothing to make "
            f"a shortcut from: {some(list(sizes))}. apply_lora is ResLoRA without shortcuts"
        )
    return [*lines, *(Line(name, (name,)) for name in alone)]


def refuse_experts(names: Sequence[str]) -> None:
    """Raise ValueError for layers of experts, which read other tokens in every block."""
    routed = [name for name in names if any(part in ("expert", "experts") for part in name.split("."))]
    if routed:
        raise ValueError(
            f"these layers belong to experts, whose tokens differ from block to block: {some(routed)}. Shortcuts of "
            'activations would add those of other tokens: take structure="bs", or exclude_modules'
        )
