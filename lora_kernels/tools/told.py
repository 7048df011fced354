"""The line that ``python -m lora_kernels run`` prints at its end, of what its processes have told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(folder: str) -> list[dict[str, Any]]:
    """Return what the processes of a run have written."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def line(told: Iterable[Mapping[str, Any]]) -> str:
    """Return the line that `run` prints, of what its processes have told."""
    told = list(told)
    if not told:
        return "PEFT made no LoRA layer, so that nothing was fused"
    made = sum(each["made"] for each in told)
    not_fused, passed_over = Counter[str](), Counter[str]()
    for each in told:
        not_fused.update(each["not_fused"])
        passed_over.update(each["passed_over"])
    calls = sum(each["fused_calls"] for each in told)
    text = f"{made - not_fused.total()} of {made} LoRA layers fused{_reasons(not_fused)}, {calls} fused calls"
    text += f", {passed_over.total()} left to PEFT{_reasons(passed_over)}"
    if len(told) > 1:
        text += f", in {len(told)} processes"
    if killed := sum(not each["ended"] for each in told):
        text += f"; {killed} of them ended without telling their calls" if len(told) > 1 else "; it was killed"
    elif not (calls or passed_over):
        text += " (calls within torch.compile are not counted)"
    return text


def _reasons(counts: Counter[str]) -> str:
    """Return the most frequent reason in parentheses, and how many there are besides."""
    if not counts:
        return ""
    (reason, _), *others = counts.most_common()
    return f" ({reason}{f'; {len(others)} more reasons' if others else ''})"
