"""The layout for the Hugging Face Hub holds the package's own files, and runs under any name."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="not in a source tree")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_layout", ROOT / "scripts" / "hub_layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def layout(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "layout"
    assert script.main([str(folder), "--repository", "someone/lora-kernels"]) == 0
    return folder


def test_no_file_imports_the_package_by_name(layout: Path) -> None:
    files = sorted((layout / "torch-ext").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level or not (node.module or "").startswith("lora_kernels"), path
                place = path.parents[node.level - 1] if node.level else path
                assert place.is_relative_to(layout / "torch-ext" / "lora_kernels"), f"{path} imports from outside"
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lora_kernels") for alias in node.names), path
        assert 'import_module("lora_kernels' not in text and "torch.ops.lora_kernels." not in text, path
        assert '"lora_kernels::' not in text, path


def test_it_has_what_the_builder_and_the_loader_read(layout: Path) -> None:
    build = (layout / "build.toml").read_text()
    assert (
        'name = "lora-kernels"' in build and "[torch-noarch]" in build and 'repo-id = "someone/lora-kernels"' in build
    )
    for backend in ("cuda", "rocm"):
        variant = layout / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["id"].endswith(backend)
        shipped = {path.relative_to(variant) for path in variant.rglob("*.py")}
        source = layout / "torch-ext" / "lora_kernels"
        assert shipped == {path.relative_to(source) for path in source.rglob("*.py")}


def test_a_folder_with_other_files_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    with pytest.raises(SystemExit):
        script.main([str(tmp_path)])
    assert (tmp_path / "precious.txt").exists()


CHILD = """
import importlib.util, sys, torch
sys.modules["lora_kernels"] = None  # an import by name fails
path, *kernels = sys.argv[1:]
if kernels:
    from kernels import get_local_kernel
    hub = get_local_kernel(__import__("pathlib").Path(kernels[0]), backend="cpu")
else:
    spec = importlib.util.spec_from_file_location("some_name", path)
    hub = sys.modules["some_name"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
x, w, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=s != (6, 8)) for s in ((5, 8), (6, 8), (2, 8), (6, 2)))
y = hub.lora_linear(x, w, a, b, scale=2.0)
want = x @ w.T + 2.0 * (x @ a.T) @ b.T
assert torch.allclose(y, want, rtol=1e-12)
for got, right in zip(*(torch.autograd.grad(each.square().sum(), (x, a, b)) for each in (y, want))):
    assert torch.allclose(got, right, rtol=1e-12)
q = hub.quantize_weight(torch.randn(64, 128), "nf4")
x, a, b = torch.randn(3, 128), torch.randn(4, 128), torch.randn(64, 4)
assert torch.allclose(hub.lora_linear(x, q, a, b, scale=1.0), x @ q.dequantize().T + x @ a.T @ b.T, atol=1e-4)
assert "triton" in str(hub.explain(x, q, a, b))
"""


def run(*words: object, **more: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, words)],
        cwd="/",
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_computes_under_another_name(layout: Path) -> None:
    run(layout / "build" / "torch-cuda" / "__init__.py")


@pytest.mark.slow
def test_the_hubs_own_loader_loads_it(layout: Path, tmp_path: Path) -> None:
    """Here under the name of a variant that its loader takes without a GPU."""
    pytest.importorskip("kernels")
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(layout / "build" / "torch-cuda", variant)
    metadata = json.loads((variant / "metadata.json").read_text()) | {"backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    run("", tmp_path, HF_HUB_OFFLINE="1")
