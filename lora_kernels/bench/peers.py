"""Layers of other projects, from their sources on this machine (``bench --peer NAME=PATH``), on the bench's operands.

    lorafusion   PATH is a checkout of CentML/lorafusion: its fused_linear_lora
    unsloth      PATH is a checkout of unslothai/unsloth: its LoRA_W, which has no dropout and no bias
    other names  PATH is a Python file with lora_linear(x, w, a, b, *, bias, scale, p) -> y, differentiable in x, a, b

Their code is not changed, with one exception. If a package is missing that their import asks for but their layer does
not need, a stand-in takes its place while they are imported, and a note of the bench says so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

LoRALinear = Callable[..., Tensor]
"""lora_linear(x, w, a, b, *, bias, scale, p) -> y."""


class Peer(NamedTuple):
    """The layer of another project."""

    lora_linear: LoRALinear
    dropout: bool
    notes: list[str]
    """What was done to import it, in sentences."""


def load(name: str, path: Path) -> Peer:
    """Return the layer of project `name` from `path`. Raises whatever its import raises."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return {"lorafusion": _lorafusion, "unsloth": _unsloth}.get(name, _file)(path)


def _file(path: Path) -> Peer:
    spec = importlib.util.spec_from_file_location(f"bench_peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Peer(module.lora_linear, getattr(module, "dropout", True), [])


def _lorafusion(path: Path) -> Peer:
    """Return LoRAFusion's layer. It has Triton configurations for three GPUs by name; any other GPU is given that of
    the H100. If this Triton lacks the descriptor functions that its TMA kernels call, its pointer kernels run, as they
    do on its other GPUs."""
    import triton.language as tl

    notes = []
    sys.path.insert(0, str(path))
    try:
        with _stand_ins("loguru", "tabulate", "tqdm", "mypy_extensions") as absent:
            if not hasattr(tl, "_experimental_descriptor_load"):
                notes.append("lorafusion: this Triton has no _experimental_descriptor_load: its pointer kernels run")
                for module in ("tma_utils", "fused_lora_xw_sb_tma", "fused_lora_dyw_dsa_tma"):
                    _insert(f"lorafusion.ops.triton_ops.{module}", HAS_TMA_DESC=False)
            config = importlib.import_module("lorafusion.ops.triton_ops.config")
            device = importlib.import_module("lorafusion.utils.common").get_device_short_name()
            if device not in config.HARDWARE_CONFIGS:
                notes.append(f"lorafusion: has no configuration for {device}: that of the H100 is used")
                config.HARDWARE_CONFIGS[device] = config.H100_CONFIG
            layer = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    finally:
        sys.path.remove(str(path))

    def lora_linear(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        y: Tensor = layer(x[None], w, a, b, alpha=scale, seed=1, dropout_p=p, linear_bias=bias)
        return y[0]

    return Peer(lora_linear, True, [*notes, *_said("lorafusion", absent)])


def _unsloth(path: Path) -> Peer:
    """Return Unsloth's layer, from its folder of kernels alone: importing the package patches transformers and needs a
    dozen packages."""
    package = path if (path / "kernels").is_dir() else path / "unsloth"
    for name, folder in (("unsloth", package), ("unsloth.kernels", package / "kernels")):
        _insert(name, __path__=[str(folder)])
    with _stand_ins("unsloth_zoo", "bitsandbytes") as absent:
        if "unsloth_zoo" in absent:
            from packaging.version import Version

            _insert("unsloth_zoo.utils", Version=Version)
        layer: Any = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W

    def lora_linear(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        if bias is not None:
            raise ValueError("its LoRA_W has no bias")
        return layer.apply(x[None], w, None, a, b, scale)[0]

    return Peer(lora_linear, False, _said("unsloth", absent))


def _said(name: str, absent: set[str]) -> list[str]:
    if not absent:
        return []
    return [f"{name}: imported without {', '.join(sorted(absent))} (not installed), which its layer does not call"]


def _insert(name: str, **attributes: Any) -> None:
    module = _StandIn(name)
    vars(module).update(attributes)
    sys.modules[name] = module


@contextlib.contextmanager
def _stand_ins(*packages: str) -> Iterator[set[str]]:
    """Yield those of `packages` that are not installed. Inside, importing them or anything below them gives a module
    whose attributes are `_Nothing`."""
    absent = {name for name in packages if importlib.util.find_spec(name) is None}
    finder = _Finder(absent)
    sys.meta_path.insert(0, finder)
    try:
        yield absent
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in absent]:
            del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: set[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has no code."""


class _StandIn(ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NOTHING


class _Nothing:
    """Accepts calls, attributes and indices, and does nothing. As a decorator it returns the function as it is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self


_NOTHING = _Nothing()


def faults(got: Mapping[str, Tensor | None], want: dict[str, Tensor]) -> list[str]:
    """Return why a peer cannot be compared with: its results that are missing, or further than 3% (RMS) from the
    equation in fp64. A peer may round as it likes, but it must compute the same function."""
    found = []
    for name, value in got.items():
        if value is None:
            found.append(f"{name} is missing")
            continue
        error = (value.double() - want[name]).square().mean().sqrt() / want[name].square().mean().sqrt()
        if not error <= 0.03:
            found.append(f"{name} is {100 * error.item():.3g}% (RMS) from the equation")
    return found
