"""Lay out the GPU kernels in Triton, and all that they need of the package, as a kernel of the Hugging Face Hub.

    python scripts/hub_layout.py build/hub [--repository OWNER/NAME]

writes what kernel-builder reads (`build.toml`, `flake.nix`, `torch-ext/lora_kernels/`), and what it makes of it
(`build/torch-cuda/`, `build/torch-rocm/`), which `kernels.get_local_kernel` loads. Nothing is kept twice: every file is
the package's own, with relative imports in the place of those by name, because a kernel of the Hub is imported under a
name that nobody knows beforehand, several versions of it in one process. Their operators have names of their own too.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_kernels"
NAME = "lora_kernels"
VERSION = 1
"""The version of the Hub's kernel. It changes where its functions change, and names the branch that users load."""
BACKENDS = ("cuda", "rocm")
EXPORTS = {
    "core.many": ["Adapter", "AdapterStack"],
    "core.rows": ["Rows"],
    "core.version": ["__version__"],
    "ops.dora": ["dora_linear"],
    "ops.experts": ["lora_linear_experts"],
    "ops.group": ["lora_linear_group"],
    "ops.linear": ["explain", "lora_linear"],
    "ops.multi": ["lora_linear_multi"],
    "quant.weight": ["QuantizedWeight", "dequantize_weight", "quantize_weight"],
}
"""What the kernel offers, by module."""
BY_NAME = [f"backends.{name}" for name in ("eager", "triton", "composite", "proven")]
"""Modules that `backends/dispatch.py` imports by name."""


NATIVE = ("backends.cpu", "backends.cuda")
"""What needs a native extension. It is imported where it is used, and its absence is a reason against a back-end."""


def module_path(module: str) -> Path | None:
    """Return the file of a module, named from the package on, or None where there is none."""
    base = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def imports_of(path: Path) -> list[ast.ImportFrom]:
    """Return the imports of this package in a file. Each is `from lora_kernels... import ...`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == NAME for alias in node.names):
            raise SystemExit(f"{path}:{node.lineno}: write `from {NAME}... import ...`, which can be made relative")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            found.append(node)
    return found


def needed() -> dict[str, Path]:
    """Return the modules that the exports need, and their files. A native extension is not among them."""
    modules: dict[str, Path] = {}
    waiting = [*EXPORTS, *BY_NAME]
    while waiting:
        module = waiting.pop()
        path = module_path(module)
        if path is None or module in modules or module.startswith(NATIVE):
            continue
        modules[module] = path
        waiting += [module.rpartition(".")[0]] if "." in module else []
        for node in imports_of(path):
            base = (node.module or "").partition(".")[2]
            waiting += [base] if base else []
            waiting += [f"{base}.{alias.name}" if base else alias.name for alias in node.names]
    return modules


def relative(path: Path, namespace: str) -> str:
    """Return a file's text with relative imports, and with operators in a namespace."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    depth = len(path.relative_to(PACKAGE).parts)
    for node in imports_of(path):
        target = "." * depth + (node.module or "").partition(".")[2]
        before = f"from {node.module} import"
        line = lines[node.lineno - 1]
        assert before in line, f"{path}:{node.lineno}"
        lines[node.lineno - 1] = line.replace(before, f"from {target} import", 1)
    text = "".join(lines).replace(f"{NAME}::", f"{namespace}::").replace(f"torch.ops.{NAME}", f"torch.ops.{namespace}")
    return text.replace(f'Library("{NAME}"', f'Library("{namespace}"')


def entry() -> str:
    """Return the text of the kernel's `__init__.py`."""
    lines = ['"""LoRA in one call, forward and backward: y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ."""\n']
    lines += [f"from .{module} import {', '.join(names)}" for module, names in EXPORTS.items()]
    names = sorted(name for names in EXPORTS.values() for name in names)
    return "\n".join([*lines, "", f"__all__ = {json.dumps(names)}", ""])


def lay_out(folder: Path, repository: str) -> str:
    """Write everything into a new folder, and return the namespace of the operators."""
    if folder.exists():
        shutil.rmtree(folder)
    modules = needed()
    sources = {str(path.relative_to(PACKAGE)): path for path in modules.values()}
    digest = hashlib.sha256("".join(relative(sources[name], NAME) for name in sorted(sources)).encode()).hexdigest()[
        :12
    ]
    namespace = f"{NAME}_{digest}"
    source = folder / "torch-ext" / NAME
    for name, path in sources.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(relative(path, namespace), encoding="utf-8")
    (source / "__init__.py").write_text(entry(), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (folder / "build.toml").write_text(
        f"""[general]
name = "{NAME.replace("_", "-")}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repository}"

[torch-noarch]
""",
        encoding="utf-8",
    )
    (folder / "flake.nix").write_text(
        """{
  description = "Fused LoRA linear layers";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
""",
        encoding="utf-8",
    )
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        metadata = {
            "name": NAME.replace("_", "-"),
            "id": f"{namespace}_{backend}",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    return namespace


def main(argv: list[str] | None = None) -> int:
    """Write the layout and tell where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder that is written anew, such as build/hub")
    parser.add_argument("--repository", default=f"{NAME}/{NAME.replace('_', '-')}", help="the repository on the Hub")
    args = parser.parse_args(argv)
    if args.folder.exists() and not (args.folder / "build.toml").exists() and any(args.folder.iterdir()):
        parser.error(f"{args.folder} has other files than a layout: name a new folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        parser.error(f"--repository {args.repository!r}: expected OWNER/NAME")
    namespace = lay_out(args.folder, args.repository)
    files = sum(1 for path in (args.folder / "torch-ext").rglob("*.py"))
    print(f"{args.folder}: {files} files, operators {namespace}::*, variants {', '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
