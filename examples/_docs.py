"""The documentation strings of the standard library: text that every Python ships, so that nothing is downloaded."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip")


@dataclass
class Split:
    train: list[str]
    held_out: list[str]


def gather() -> dict[str, list[str]]:
    """Return two kinds of text: "prose", and "examples" for text with interactive examples (``>>>``)."""
    prose, examples = set(), set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not any(part in SKIPPED for part in path.parts):
            for text in docstrings(path):
                (examples if ">>>" in text else prose).add(text)
    return {"prose": sorted(prose), "examples": sorted(examples)}


def docstrings(path: Path) -> list[str]:
    """Return the documentation strings of a module, its classes and functions, read from the source without importing
    it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in statements(tree) if isinstance(node, kinds))
    return [text for text in texts if text and len(text) >= 40]


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield `tree` and every statement in it. Expressions, most of a tree, hold no documentation strings."""
    found = [tree]
    for node in found:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, name, None)
            found += inner if isinstance(inner, list) else []


def split(texts: list[str], most: int = 10_000, fraction: float = 0.15) -> Split:
    """Return at most `most` of the texts, of which a fraction is held out. The split is the same in every run."""
    texts = random.Random(0).sample(texts, min(len(texts), most))
    count = round(len(texts) * fraction)
    return Split(texts[count:], texts[:count])
