"""target_modules as a person would write them, for a given set of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lora_kernels.models.targets import matches


def short_names(names: Sequence[str], every: Iterable[str]) -> list[str] | str:
    """Return target_modules that choose exactly the layers `names` among `every`: the ends of their names, as short as
    they can be, such as ["q_proj", "v_proj"]; or a regular expression for their whole names."""
    others = [name for name in every if name not in set(names)]
    longest = max(name.count(".") for name in names) + 1
    for parts in range(1, longest + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in names}
        if not any(matches(ends, name) for name in others):
            return sorted(ends)
    return "|".join(map(re.escape, sorted(names)))
