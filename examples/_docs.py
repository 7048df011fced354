"""The standard library's documentation strings: text that every Python ships, so that nothing is downloaded."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip")


@dataclass
class Split:
    train: list[str]
    held_out: list[str]


def gather() -> dict[str, list[str]]:
    """{what kind of documentation: its texts}: plain prose, and text with interactive examples (``>>>``)."""
    prose, examples = set(), set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not any(part in SKIPPED for part in path.parts):
            for text in docstrings(path):
                (examples if ">>>" in text else prose).add(text)
    return {"prose": sorted(prose), "examples": sorted(examples)}


def docstrings(path: Path) -> list[str]:
    """Of the module, its classes and functions, read from the source: nothing is imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text and len(text) >= 40]


def split(texts: list[str], most: int = 10_000, fraction: float = 0.15) -> Split:
    """The same in every run: a fraction of the texts is held out. Of more than `most`, so many are taken."""
    texts = random.Random(0).sample(texts, min(len(texts), most))
    count = round(len(texts) * fraction)
    return Split(texts[count:], texts[:count])
