"""Imports inside the package point downwards: no folder imports one above it, and no files import each other in
circles.

Every import statement counts, also those inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from pathlib import Path

from support.paths import ROOT

PACKAGE = ROOT / "lora_kernels"

ORDER: list[set[str]] = [
    {"quant"},
    {"core"},
    {"_C", "_cuda"},  # the native extensions, whose stubs name the operands
    {"reference"},
    {"evidence"},
    {"plans"},
    {"backends"},
    {"ops"},
    {"nn"},
    {"models", "peft"},
    {"serving", "jobs", "train", "analysis", "plugins"},
    {"group", "parallel", "initialise", "__init__"},
    {"testing"},
    {"bench"},
    {"tools"},
    {"__main__"},
]
"""The folders and files of the package, from the lowest to the highest. Those in one set may not import each
other."""
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
BACKENDS = {"cpu", "cuda", "triton", "composite", "eager"}


def module_of(path: Path) -> str:
    """Return "ops.linear" for lora_kernels/ops/linear.py, and "ops" for lora_kernels/ops/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_of(path): path for pattern in ("*.py", "*.pyi") for path in sorted(PACKAGE.rglob(pattern))}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, named as by `module_of`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, name = name.partition(".")
            if head == "lora_kernels":
                while name and name not in FILES:  # the name is defined in a module
                    name = name.rpartition(".")[0]
                found.add(name or "__init__")
    return found


IMPORTS = {module: imports_of(path) for module, path in FILES.items()}
PAIRS = [(module, other) for module, others in IMPORTS.items() for other in sorted(others)]


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_folder_has_its_place_in_the_order():
    assert {top(module) for module in FILES} == set(LEVEL)


def test_no_import_points_upwards():
    wrong = [
        f"{module} imports {other}"
        for module, other in PAIRS
        if top(module) != top(other) and LEVEL[top(other)] >= LEVEL[top(module)]
    ]
    assert not wrong, wrong


SHARES = {("composite", "triton")}
"""(a back-end, one whose kernels' parts it is made of): the mask of a tile, its loads and stores, the launch."""


def test_no_backend_imports_another():
    def backend(module: str) -> str:
        """Return "cpu" for "backends.cpu.gemm", and "" for a file that all back-ends share."""
        name = module.split(".")[1] if module.startswith("backends.") else ""
        return name if name in BACKENDS else ""

    wrong = [
        f"{module} imports {other}"
        for module, other in PAIRS
        if top(module) == "backends"
        and backend(other)
        and backend(module) != backend(other)
        and (backend(module), backend(other)) not in SHARES
    ]
    assert not wrong, wrong


def test_no_files_import_each_other_in_a_circle():
    done: set[str] = set()
    circles: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circles.append(" imports ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())
    assert not circles, circles
