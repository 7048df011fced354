"""Build beforehand what `gpu_check.sh --prebuilt DEST` needs on another machine, whose GPU you have for minutes only.

This machine needs no GPU.

    scripts/gpu_prepare.sh DEST [--python python3.12] [--triton 3.6.0] [--arch sm_90] [--multiprocessors 132]

DEST gets the native modules `_C` and `_cuda`, and a cache of compiled Triton kernels (gpu_triton_cache.py).

--python is a Python on this machine, of the version that the other machine has. It needs its headers, setuptools,
pybind11 and ninja, and no torch. `_cuda` needs nvcc on this machine; its version must be one that the other machine's
driver serves. --without-cuda builds only `_C`.

The Triton kernels are compiled by the Python that runs this script, which needs torch. --triton is the version of the
other machine. If this Python has another version of Triton, or is of another version than --python, wheels are
downloaded with pip into --wheels, once. Neither the kernels nor this script's results have been used on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_prebuilt
import gpu_triton_cache
from gpu_prebuilt import MOST_BYTES, NATIVE, ROOT, TRITON

NEEDED = ("setuptools", "pybind11", "ninja")
"""The modules that the Python of --python builds with."""
ASK = """
import importlib.util, json, pathlib, sys, sysconfig
include = sysconfig.get_path("include")
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "include": include,
    "headers": (pathlib.Path(include) / "Python.h").exists(),
    "missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None],
}))
"""


class Unprepared(RuntimeError):
    """Something that is needed is not there. The message says what, and how to get it."""


class Python(NamedTuple):
    """A Python of the version that the other machine has."""

    command: str
    version: str
    """As 3.12."""
    suffix: str
    """The end of the names of its native modules."""
    include: str
    """The folder of its headers."""


def find_python(command: str) -> Python:
    """Return a Python that can build the native modules. Raises Unprepared with what it lacks."""
    path = shutil.which(command)
    if path is None:
        raise Unprepared(
            f"--python {command}: there is no such program. Install that version of Python, with its headers"
        )
    said = json.loads(_run([path, "-c", ASK, *NEEDED], f"{command} cannot be run"))
    if not said["headers"]:
        raise Unprepared(
            f"{command} has no Python.h in {said['include']} (Debian: apt install python{said['version']}-dev)"
        )
    if said["missing"]:
        lacks = " ".join(said["missing"])
        raise Unprepared(f"{command} lacks {lacks}: {command} -m pip install {lacks}")
    return Python(path, said["version"], said["suffix"], said["include"])


def build_native(folder: Path, python: Python, cuda: bool) -> list[str]:
    """Build the native modules into a folder and return their names. Raises Unprepared where the build fails."""
    folder.mkdir(parents=True)
    environment = os.environ | {"LORA_KERNELS_REQUIRE_NATIVE": "1", "LORA_KERNELS_CUDA": str(int(cuda))}
    with tempfile.TemporaryDirectory() as built:
        command = [python.command, "setup.py", "-q", "build_ext", "--build-lib", built]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            raise Unprepared(f"the native modules could not be built: {' '.join(command)}")
        for module in sorted(Path(built).rglob(f"*{python.suffix}")):
            shutil.move(module, folder / module.name)
    return sorted(path.name for path in folder.iterdir())


def fill_cache(folder: Path, python: Python, version: str, wheels: Path, options: Sequence[str]) -> None:
    """Fill a folder with Triton kernels. Raises Unprepared where Triton cannot be got or compiles nothing."""
    own, paths = f"{sys.version_info[0]}.{sys.version_info[1]}", [str(ROOT)]
    words = [sys.executable, "scripts/gpu_triton_cache.py", str(folder), *options]
    if _installed("triton") != version:
        unpacked = wheels / f"triton-{version}-python{own}"
        if not unpacked.exists():
            _unpack(find_wheel(version, own, wheels), unpacked)
        paths.insert(0, str(unpacked))
    if python.version != own:
        words += ["--wheel", str(find_wheel(version, python.version, wheels)), "--python", python.command]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    if subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}).returncode:
        raise Unprepared("no Triton kernel was compiled: the lines above say why")


def find_wheel(version: str, python: str, wheels: Path) -> Path:
    """Return Triton's wheel for a version of Python, downloaded once. Raises Unprepared where pip cannot get it."""
    tag = f"cp{python.replace('.', '')}"
    pattern = f"triton-{version}-{tag}-*.whl"
    if not list(wheels.glob(pattern)):
        wheels.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        download += ["--python-version", python, "--dest", str(wheels), f"triton=={version}"]
        _run(download, f"pip finds no triton {version} for Python {python}; put {pattern} into {wheels}")
    found = sorted(wheels.glob(pattern))
    if not found:
        raise Unprepared(f"there is no {pattern} in {wheels}")
    return found[-1]


def _unpack(wheel: Path, folder: Path) -> None:
    """Install a wheel into a folder of its own, as a whole or not at all."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    with zipfile.ZipFile(wheel) as packed:
        for each in packed.infolist():
            path = Path(packed.extract(each, beside))
            if mode := each.external_attr >> 16:  # ptxas is a program
                path.chmod(mode)
    beside.replace(folder)


def _installed(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(command: Sequence[str], otherwise: str) -> str:
    """Return what a command prints. Raises Unprepared where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise Unprepared(f"{otherwise} ({last})")
    return done.stdout


def prepare(args: argparse.Namespace) -> str:
    """Fill args.dest, and return a sentence about it. Raises Unprepared."""
    dest = args.dest.resolve()
    if dest.exists() and any(dest.iterdir()):
        raise Unprepared(f"{args.dest} is not empty: name a new folder, or empty it")
    python = find_python(args.python)
    native = build_native(dest / NATIVE, python, cuda=not args.without_cuda)
    version = args.triton or _installed("triton")
    (dest / TRITON).mkdir()
    if version is not None:
        options = ["--arch", args.arch, "--multiprocessors", str(args.multiprocessors), "--jobs", str(args.jobs)]
        fill_cache(dest / TRITON, python, version, args.wheels.resolve(), options)
    kernels = gpu_triton_cache.count(dest / TRITON)
    size = gpu_prebuilt.size(dest)
    if size > MOST_BYTES:
        raise Unprepared(f"{args.dest} has {size / 2**20:.0f} MiB, and at most {MOST_BYTES / 2**20:.0f} can be brought")
    about = {"suffix": python.suffix, "triton": version, "arch": args.arch, "kernels": kernels}
    gpu_prebuilt.write_manifest(dest, about)
    return f"{args.dest}: {', '.join(native)} and {kernels} kernels of Triton {version}, {size / 2**20:.1f} MiB"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("dest", type=Path, metavar="DEST", help="a new or empty folder")
    result.add_argument(
        "--python", default=sys.executable, help="a Python of the other machine's version (default: this one)"
    )
    result.add_argument("--triton", metavar="VERSION", help="the other machine's Triton (default: that of this Python)")
    result.add_argument("--arch", default="sm_90", help="the architecture of the other machine's GPU (default: sm_90)")
    result.add_argument(
        "--multiprocessors", type=int, default=132, metavar="N", help="those of that GPU (default: 132)"
    )
    result.add_argument("--without-cuda", action="store_true", help="do not build _cuda, which needs nvcc")
    result.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compile at once"
    )
    wheels = ROOT / "build" / "wheels"
    result.add_argument("--wheels", type=Path, default=wheels, help="where wheels are kept (default: build/wheels)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(argv)
    try:
        print(prepare(args))
    except Unprepared as error:
        print(f"gpu_prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
