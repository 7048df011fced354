"""The list of caches and hooks in docs/design.md is complete, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.documentation import DOCS
from support.paths import ROOT

LIST = DOCS.joinpath("design.md").read_text(encoding="utf-8").partition("\n## Caches and hooks\n")[2]
ROWS = [line for line in LIST.splitlines() if line.startswith("| ") and not line.startswith("| what is ")]
PACKAGE = ROOT / "lora_kernels"

CACHES = {"cache", "cached_property", "lru_cache"}
STORES = {"WeakKeyDictionary", "WeakSet", "WeakValueDictionary", "defaultdict", "deque", "dict", "list", "local", "set"}
LASTS_IN_C = re.compile(r"^ *(?:static|thread_local|std::atomic<[^>]+>) (?!constexpr|std::mutex)[^(=;{]+$")
"""The declaration of a variable that outlives its scope, up to what follows its name."""


def called(node: ast.AST | None) -> str:
    """The last part of the name of what a decorator or a call names, or ""."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def kept_in(source: str) -> Iterator[str]:
    """The names under which a module keeps what outlives a call: cached functions, tables that begin empty and are
    filled later, what belongs to a thread, and variables that a function sets."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and CACHES & {called(each) for each in node.decorator_list}:
            yield node.name
        if isinstance(node, ast.Global):
            yield from node.names
        if isinstance(node, ast.ClassDef) and "local" in {called(base) for base in node.bases}:
            yield node.name
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            value, target = node.value, node.targets[0] if isinstance(node, ast.Assign) else node.target
            empty = isinstance(value, (ast.Dict, ast.List)) and ast.unparse(value) in ("{}", "[]")
            made = isinstance(value, ast.Call) and not value.args and called(value) in STORES
            if empty or made or (isinstance(value, ast.Call) and CACHES & {called(value)}):
                yield ast.unparse(target)


def kept_in_c(source: str) -> list[str]:
    """The names of the static, thread-local and atomic variables of a source in C++."""
    declarations = (re.split(r"[=;{]", line)[0].rstrip() for line in source.splitlines())
    return [each.split()[-1] for each in declarations if LASTS_IN_C.match(each)]


def hooks_in(source: str) -> list[str]:
    """The methods by which a module registers hooks."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [name for name in map(called, calls) if re.fullmatch(r"register_\w*hook", name)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_the_tests_that_a_row_names_exist(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.rstrip(" |").rpartition(" | ")[2])
    assert named, f"a row names no test: {row[:100]}"
    for path, name in named:
        tree = ast.parse(ROOT.joinpath(path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_a_module_keeps_is_in_the_list(path: Path) -> None:
    source, where = path.read_text(encoding="utf-8"), f"`{path.relative_to(PACKAGE).as_posix()}`"
    missing = [name for name in kept_in(source) if f"`{name}`" not in LIST]
    assert not missing, f"{missing} of {where} are not in the list of docs/design.md"
    assert not hooks_in(source) or where in LIST, f"the hooks of {where} are not in the list of docs/design.md"


def test_what_the_kernels_keep_is_in_the_list() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", LIST))))
    for path in sources:
        missing = set(kept_in_c(path.read_text(encoding="utf-8"))) - named
        assert not missing, f"{missing} of {path.name} are not in the list of docs/design.md"


def test_the_search_sees_every_kind_of_cache() -> None:
    source = """
import functools, threading
a = functools.lru_cache(maxsize=8)(len)
b: dict[str, int] = {}
c = threading.local()
d = set()
constant = {"one": 1}
class E(threading.local): pass
@functools.cache
def f(): pass
def g():
    global h
    module.register_forward_hook(f)
"""
    assert sorted(kept_in(source)) == ["E", "a", "b", "c", "d", "f", "h"]
    assert hooks_in(source) == ["register_forward_hook"]
    source = """
static Lut lut(const float* levels) { return levels; }
static_assert(kRows == 8);
  static constexpr size_t kKept = 32;
    thread_local Pool pool;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  static const Kernels with_bf16 = [] {
std::atomic<const Kernels*> chosen{nullptr};
"""
    assert kept_in_c(source) == ["pool", "known", "with_bf16", "chosen"]
