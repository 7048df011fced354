"""The evidence about this machine's GPUs, as `doctor` reports it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.backends import dispatch
from lora_kernels.backends.proven import COMMAND
from lora_kernels.evidence import find
from lora_kernels.evidence.file import RIGHT, Evidence


def examine(devices: Sequence[torch.device]) -> list[dict[str, Any]]:
    """Return what is known about each GPU among `devices`, as plain data without absolute paths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a file is among what was found
        return [_entry(device, find.found(device)) for device in devices if device.type in dispatch.BY_EVIDENCE]


def rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return rows of a table with two columns: the device, and a sentence."""
    return [[entry["device"] if i == 0 else "", text] for entry in entries for i, text in enumerate(_told(entry))]


def missing(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return for which devices nothing was measured, and how to get it."""
    return [(f"evidence for {entry['name']}", f"run {COMMAND}") for entry in entries if not entry["buckets"]]


def _entry(device: torch.device, found: find.Found) -> dict[str, Any]:
    evidence = found.evidence
    dates = [each.date for each in evidence.verdicts.values()] + [each.date for each in evidence.timings.values()]
    return {
        "device": str(device),
        "name": evidence.identity.device,
        "used": list(map(_short, found.used)),
        "stale": [{"file": _short(place.path), "why": place.why} for place in found.passed],
        "date": max(dates, default=None),
        "buckets": len(evidence.timings),
        "plans": len(evidence.plans),
        "classes": _classes(evidence),
    }


def _classes(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Return by back-end how many classes of kernels are right, and what is known of the others."""
    found: dict[str, dict[str, Any]] = {}
    for key, verdict in evidence.verdicts.items():
        entry = found.setdefault(key.split(" ")[0], {"right": 0, "others": {}})
        if verdict.result == RIGHT:
            entry["right"] += 1
        else:
            entry["others"][key] = f"{verdict.result}: {verdict.why}"
    return found


def _told(entry: dict[str, Any]) -> list[str]:
    lines = []
    if find.off():
        lines.append(f"{find.VARIABLE}=off: no evidence is read")
    if entry["used"]:
        lines.append(f"{', '.join(entry['used'])}, last written on {entry['date'] or 'an unknown day'}")
    else:
        lines.append("none: only what is checked at its first use runs here")
    for name, known in entry["classes"].items():
        others = f", {len(known['others'])} not" if known["others"] else ""
        lines.append(f"{name}: {known['right']} classes of kernels right{others}")
        lines += [f"not used: {key}: {what}" for key, what in known["others"].items()]
    if entry["used"]:
        lines.append(f"{entry['buckets']} passes timed, {entry['plans']} plans measured")
    lines += [f"{stale['file']} does not hold here: {'; '.join(stale['why'])}" for stale in entry["stale"]]
    return lines


def _short(path: Path) -> str:
    """Return a path below the home directory as ~/..., and of any other only its name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else path.name
