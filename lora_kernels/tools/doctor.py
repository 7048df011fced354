"""``python -m lora_kernels doctor``: which back-ends serve this machine, what is missing, and how to get it.

It runs where torch is missing or does not load too, and says so. No other package than torch is imported for the table
of versions, so that one that is broken does no harm.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import lora_kernels
from lora_kernels.testing.terminal import Terminal, terminal
from lora_kernels.tools import packages

_TORCH = "pip install torch, or a build for your GPU: https://pytorch.org/get-started/locally"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Return the exit status: 0 if at least one back-end serves this machine, else 1."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        _show(report, terminal())
    return 0 if any(entry["ready"] for entry in report["backends"]) else 1


def examine() -> dict[str, Any]:
    """Return the report as plain data, without absolute paths. Its `fault` says why torch cannot be imported."""
    report = {"versions": packages.versions(), "packages": packages.packages()}
    if fault := packages.without_paths(lora_kernels.torch_fault()):
        empty: dict[str, Any] = {"devices": [], "native": None, "cuda": None, "backends": [], "evidence": []}
        return report | {"fault": fault} | empty | {"missing": [{"what": "torch", "how": _TORCH}]}
    from lora_kernels.tools import kernels_here

    return report | {"fault": ""} | kernels_here.examine()


def _show(report: dict[str, Any], show: Terminal) -> None:
    rows = [["versions", ", ".join(f"{name} {report['versions'][name]}" for name in ("python", "lora_kernels"))]]
    if report["fault"]:
        rows.append(["torch", report["fault"]])
    else:
        from lora_kernels.tools import evidence_here, kernels_here

        rows += [[name, text] for name, text in kernels_here.facts(report)]
    show.table("lora_kernels doctor", ["", "what is here"], rows, words=True)
    entries = [[each["name"], each["version"] or "", each["state"], each["tested"]] for each in report["packages"]]
    show.table("Packages", ["", "version", "", "tested with"], entries, words=True)
    rows = []
    for backend in report["backends"]:
        for i, text in enumerate(kernels_here.verdict(backend)):
            state = "ready" if backend["ready"] else "not ready"
            rows.append([backend["name"], state, text] if i == 0 else ["", "", text])
    if rows:
        show.table("Back-ends", ["", "", "serves, or why not"], rows, words=True)
    if report["evidence"]:
        show.table("Evidence", ["", "what is known about the GPU"], evidence_here.rows(report["evidence"]), words=True)
    if report["missing"]:
        rows = [[entry["what"], entry["how"]] for entry in report["missing"]]
        show.table("What is missing", ["", "how to get it"], rows, words=True)
