"""scripts/gpu_prepare.py and gpu_triton_cache.py: what is built for another machine, and that it is found there."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT

from lora_kernels.tools.verify import cases, options
from lora_kernels.tools.verify.subject import Operands, run_of

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "scripts"))
    gpu_prebuilt, gpu_prepare, gpu_triton_cache = (
        importlib.import_module(name) for name in ("gpu_prebuilt", "gpu_prepare", "gpu_triton_cache")
    )

Python, Unprepared = gpu_prepare.Python, gpu_prepare.Unprepared


def cache_of(folder: Path, *files: str) -> Path:
    """Return a cache with one kernel, as Triton writes it, and a module of C code."""
    kernel = folder / "ABC"
    kernel.mkdir(parents=True)
    for name in files:
        (kernel / name).write_text(name)
    paths = {name: str(kernel / name) for name in files}
    (kernel / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    (folder / "DEF").mkdir()
    (folder / "DEF" / "cuda_utils.so").touch()
    return folder


def paths_in(folder: Path) -> dict[str, str]:
    return json.loads((folder / "ABC" / "__grp__kernel.json").read_text())["child_paths"]


def test_a_cache_that_was_moved_names_its_files_where_they_are(tmp_path):
    moved = tmp_path / "moved"
    cache_of(tmp_path / "made", "kernel.cubin", "kernel.json").rename(moved)
    assert gpu_triton_cache.relocate(moved) == 1
    assert paths_in(moved) == {name: str(moved / "ABC" / name) for name in ("kernel.cubin", "kernel.json")}
    assert sorted(path.name for path in (moved / "ABC").iterdir()) == [
        "__grp__kernel.json",
        "kernel.cubin",
        "kernel.json",
    ]


def test_only_what_a_launch_reads_is_kept(tmp_path):
    folder = cache_of(tmp_path, "kernel.cubin", "kernel.json", "kernel.ttir", "kernel.ptx", "kernel.source")
    gpu_triton_cache.strip(folder)
    assert set(paths_in(folder)) == {"kernel.cubin", "kernel.json"}
    assert not list(folder.rglob("*.ptx")) and (folder / "DEF" / "cuda_utils.so").exists()
    assert gpu_triton_cache.count(folder) == 1


def test_the_check_makes_a_cache_that_was_brought_usable(tmp_path):
    folder = tmp_path / "brought"
    (folder / "native").mkdir(parents=True)
    cache_of(tmp_path / "made", "kernel.cubin").rename(folder / "triton")
    gpu_prebuilt.write_manifest(folder, {}, tmp_path)
    assert gpu_prebuilt.put_in_place(folder, tmp_path) == {"TRITON_CACHE_DIR": str(folder / "triton")}
    assert paths_in(folder / "triton") == {"kernel.cubin": str(folder / "triton" / "ABC" / "kernel.cubin")}


def test_a_python_that_cannot_build_is_told_what_it_lacks(monkeypatch):
    with pytest.raises(Unprepared, match=r"no such program.*with its headers"):
        gpu_prepare.find_python("python3.99")
    monkeypatch.setattr(gpu_prepare, "NEEDED", ("json", "no_such_module"))
    with pytest.raises(Unprepared, match=r"lacks no_such_module: .* -m pip install no_such_module"):
        gpu_prepare.find_python(sys.executable)
    monkeypatch.setattr(gpu_prepare, "NEEDED", ("json",))
    found = gpu_prepare.find_python(sys.executable)
    assert found.suffix == sysconfig.get_config_var("EXT_SUFFIX") and Path(found.include, "Python.h").exists()


def builder(folder: Path, code: str) -> Python:
    """Return a Python whose setup.py is a shell script."""
    script = folder / "python3.99"
    script.write_text(f"#!/bin/sh\n# setup.py -q build_ext --build-lib FOLDER\n{code.replace('FOLDER', '$5')}\n")
    script.chmod(0o755)
    return Python(str(script), "3.99", ".cpython-399.so", "")


def test_the_native_modules_are_those_of_that_python(tmp_path):
    code = 'mkdir FOLDER/lora_kernels && for name in _C _cuda; do echo "$LORA_KERNELS_CUDA" > '
    code += "FOLDER/lora_kernels/$name.cpython-399.so; done"
    names = gpu_prepare.build_native(tmp_path / "native", builder(tmp_path, code), cuda=True)
    assert names == ["_C.cpython-399.so", "_cuda.cpython-399.so"]
    assert (tmp_path / "native" / names[0]).read_text() == "1\n"
    with pytest.raises(Unprepared, match="could not be built"):
        gpu_prepare.build_native(tmp_path / "other", builder(tmp_path, "exit 1"), cuda=True)


def test_a_wheel_is_downloaded_once(tmp_path, monkeypatch):
    def pip(command, otherwise):
        assert command[command.index("--python-version") + 1] == "3.12" and command[-1] == "triton==9.9"
        (tmp_path / "triton-9.9-cp312-cp312-linux.whl").touch()
        return ""

    monkeypatch.setattr(gpu_prepare, "_run", pip)
    wheel = gpu_prepare.find_wheel("9.9", "3.12", tmp_path)
    monkeypatch.delattr(gpu_prepare, "_run")
    assert gpu_prepare.find_wheel("9.9", "3.12", tmp_path) == wheel
    with pytest.raises(NameError):
        gpu_prepare.find_wheel("9.9", "3.13", tmp_path)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Return a function that runs the script, with stand-ins for what takes long, and returns its exit status."""
    monkeypatch.setattr(gpu_prepare, "find_python", lambda command: Python(command, "3.99", ".cpython-399.so", ""))

    def build(folder, python, cuda):
        folder.mkdir(parents=True)
        (folder / f"_C{python.suffix}").write_bytes(b"x" * 1000)
        return [f"_C{python.suffix}"]

    monkeypatch.setattr(gpu_prepare, "build_native", build)
    monkeypatch.setattr(gpu_prepare, "fill_cache", lambda folder, *rest: cache_of(folder, "kernel.cubin"))
    return lambda *words: gpu_prepare.main([str(tmp_path / "dest"), *words])


def test_the_folder_says_what_it_is_for(prepared, tmp_path, capsys):
    assert prepared("--triton", "9.9") == 0
    manifest = json.loads((tmp_path / "dest" / "manifest.json").read_text())
    assert manifest["suffix"] == ".cpython-399.so" and manifest["csrc"] == gpu_prebuilt.source_hash()
    assert manifest["triton"] == "9.9" and manifest["kernels"] == 1
    assert "_C.cpython-399.so and 1 kernels of Triton 9.9" in capsys.readouterr().out
    assert prepared("--triton", "9.9") == 1
    assert "is not empty" in capsys.readouterr().err


def test_a_folder_that_is_too_large_cannot_be_used(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_prepare, "MOST_BYTES", 999)
    assert prepared("--triton", "9.9") == 1
    assert "can be brought" in capsys.readouterr().err and not (tmp_path / "dest" / "manifest.json").exists()


def wheel_of_triton(path: Path, change: bytes = b"") -> Path:
    """Write a wheel with the Python files of the installed Triton and another native library."""
    triton = Path(pytest.importorskip("triton", "3.6").__file__).parent
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(triton.rglob("*.py")):
            name = file.relative_to(triton.parent).as_posix()
            packed.writestr(name, file.read_bytes() + change * (name == "triton/compiler/compiler.py"))
        packed.writestr("triton/_C/libtriton.so", b"that of another Python")
    return path


def test_the_key_of_another_python_differs_in_the_native_library_alone(tmp_path):
    pytest.importorskip("triton", "3.6")
    from triton.runtime import cache

    theirs, mine = gpu_triton_cache.key_of_wheel(wheel_of_triton(tmp_path / "a.whl")).split("-"), cache.triton_key()
    assert sum(a != b for a, b in zip(theirs, mine.split("-"), strict=True)) == 1
    with pytest.raises(ValueError, match=r"is not a wheel of Triton .*: triton/compiler/compiler.py differs"):
        gpu_triton_cache.key_of_wheel(wheel_of_triton(tmp_path / "b.whl", b"# changed"))


def test_the_kernels_of_every_layer_that_is_timed_are_compiled():
    from lora_kernels.bench.shapes import SUITES

    layers = {(each.M, each.K, each.N, each.R, each.p) for each in gpu_triton_cache.problems()}
    wanted = {(s.M, s.K, s.N, s.R, cell.p) for s in SUITES["llama"]["cuda"] for cell in s.cells}
    assert wanted <= layers


COMPILE = """
import sys
sys.path.insert(0, {scripts!r})
import gpu_triton_cache as cache
from triton import knobs
hits = []
knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
problem = cache.Problem(256, 256, 256, 16, "bfloat16", "bfloat16", 0.1, True, {training})
print(cache.compile_problems([problem], cache.Machine("sm_90", 132, {key!r})))
print(hits.count(True), hits.count(False))
cache.strip(cache.Path({folder!r}))
"""


LAUNCH = """
import importlib, torch
from support.stand_in import driver
driver.start()
driver.use("sm_90")
from triton import knobs
from lora_kernels.backends.triton import device
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.plans.tiles import Gpu
device.TARGETS[driver.CPU] = device.TARGETS[driver.CPU]._replace(gpu=Gpu("sm_90", 132))
hits = []
knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
def bf16(*size):
    return torch.zeros(size, dtype=torch.bfloat16)
x, base = bf16(256, 256), Base(bf16(256, 256), bf16(256))
adapter = Adapter(bf16(16, 256), bf16(256, 16), 0.75, 0.1, torch.tensor(5))
for name in ("composite", "triton"):
    module = importlib.import_module(f"lora_kernels.backends.{name}")
    _, hs = module.forward(x, [base], [adapter], [True])
    module.backward([bf16(256, 256)], x, [Base(base.w, None)], [adapter], hs, Needs(True, (True,), (True,)))
print(hits.count(True), hits.count(False))
"""


def compile_in_a_process(folder: Path, key: str | None, training: bool = True) -> list[str]:
    """Return the faults, and the numbers of kernels that were found and that were compiled."""
    code = COMPILE.format(scripts=str(ROOT / "scripts"), folder=str(folder), key=key, training=training)
    return in_a_process(folder, code)[:2]


def in_a_process(folder: Path, code: str) -> list[str]:
    """Run code with a cache, and return the lines that it prints."""
    paths = f"PYTHONPATH={ROOT}:{ROOT / 'tests' / 'helpers'}"
    command = ["env", f"TRITON_CACHE_DIR={folder}", paths, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_kernels_are_found_where_they_were_brought(tmp_path):
    """A process that calls the back-ends with a driver, which is a stand-in, finds every kernel and every module of C
    code, in another folder and without the intermediate languages. With the key of another Triton it finds none."""
    pytest.importorskip("triton", "3.6")
    made, moved = tmp_path / "made", tmp_path / "moved"
    faults, counts = compile_in_a_process(made, None)
    hits, compiled = map(int, counts.split())
    assert faults == "[]" and hits == 0 and compiled >= 4
    assert len(list(made.rglob("*.cubin"))) == compiled and list(made.rglob("cuda_utils*.so"))
    made.rename(moved)
    gpu_triton_cache.relocate(moved)
    there = set(moved.iterdir())
    assert in_a_process(moved, LAUNCH)[-1] == f"{compiled} 0"
    assert set(moved.iterdir()) == there, "nothing was built anew"
    assert compile_in_a_process(moved, "another", training=False)[1].startswith("0 "), "nothing has that key"


def test_the_kernels_that_verify_runs_are_compiled(monkeypatch):
    """All of them have the types, constants and options of a kernel that is compiled."""
    pytest.importorskip("triton", "3.6")
    from lora_kernels.backends.triton import device

    launched: set[tuple[str, str, str]] = set()

    def record(frame, **others):
        binder = frame.kernel.device_caches[0][4]
        _, specialised, options = binder(**frame.arguments, **others, **frame.options)
        launched.add((frame.kernel.__name__, str(specialised), str(sorted(options.items()))))

    monkeypatch.setattr(gpu_triton_cache, "_c_code", lambda machine: contextlib.nullcontext())
    with gpu_triton_cache._without_gpu(gpu_triton_cache.Machine("sm_90", 132)), monkeypatch.context() as patch:
        patch.setattr(device.Frame, "run", record)  # and undone first, since _without_gpu has set another
        for problem, name in itertools.product(gpu_triton_cache.problems(), gpu_triton_cache.BACKENDS):
            assert gpu_triton_cache._compile(problem, name) is None
        compiled, launched = launched, set()
        for setting, size, op in passes_of_verify():
            for name in gpu_triton_cache.BACKENDS:
                run_of(importlib.import_module(f"lora_kernels.backends.{name}"), op)(operands(setting, size), {})
    assert len(launched) > 50 and launched <= compiled


def passes_of_verify():
    """Yield the passes that `verify` judges and times if no option is given."""
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    wanted = options.wanted(parser.parse_args([]))
    for setting, (size, p), op in itertools.product(wanted.judged, cases.CASES, cases.PASSES):
        yield setting._replace(p=p), size, op
    for timed in wanted.passes:
        yield wanted.timed._replace(p=timed.p), timed.size, timed.op


def operands(setting, size):
    """Return the operands that `verify` makes, as tensors without memory."""
    (M, K, N, R), result = size, object.__new__(Operands)

    def empty(*shape, dtype=setting.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    a, b = empty(R, K, dtype=setting.adapter_dtype), empty(N, R, dtype=setting.adapter_dtype)
    seed = empty(dtype=torch.int64) if setting.p else None
    result.q = SimpleNamespace(x=empty(M, K), dy=empty(M, N), a=a, b=b, bias=None, scale=0.75, p=setting.p, seed=seed)
    result.w, result.h = empty(N, K), empty(M, R, dtype=setting.adapter_dtype)
    return result
