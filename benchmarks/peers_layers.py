"""The LoRA layers of other projects as they are installed here, each built from the operands of a problem.

    PEFT            peft.tuners.lora.layer.Linear
    axolotl         axolotl.kernels.lora.LoRA_O, the function behind its `lora_o_kernel` and its linear layers
    unsloth         unsloth.kernels.fast_lora.LoRA_W
    torchtune       torchtune.modules.peft.LoRALinear
    nemo-automodel  nemo_automodel.components._peft.lora.LinearLoRA, with dropout on x (its default is behind B)

Their code is not changed. A package that is not installed, or whose import fails, is named with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.bench import layers
from lora_kernels.bench.layers import Task
from lora_kernels.testing.judge import Problem

Build = Callable[[Problem], Task]


class Peer(NamedTuple):
    """A project whose layer can be measured."""

    name: str
    version: str
    build: Build
    notes: tuple[str, ...] = ()


NO_CPU = {
    "LoRAFusion": "its layer is Triton kernels, which need a GPU",
    "Liger": "it has no LoRA layer: it fuses what lies around one",
}
"""Projects of the comparison that have nothing to measure on a CPU, and why."""


def load() -> tuple[list[Peer], list[str]]:
    """Return the peers that are installed here, and a note on each other project."""
    found, notes = [], [f"{name} is not measured: {why}" for name, why in NO_CPU.items()]
    for name, (package, builder) in _PEERS.items():
        try:
            peer = Peer(name, importlib.metadata.version(package), *builder())
        except importlib.metadata.PackageNotFoundError:
            notes.append(f"{name} is not measured: pip install --no-deps {package}")
        except Exception as error:  # another project's import may fail in any way
            notes.append(f"{name} is not measured: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            found.append(peer)
            notes += [f"{name}: {note}" for note in peer.notes]
    return found, notes


def _peft() -> tuple[Build]:
    importlib.import_module("peft")
    return (layers.peft,)


def _axolotl() -> tuple[Build]:
    function: Any = importlib.import_module("axolotl.kernels.lora").LoRA_O

    def lora_linear(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        dropped = F.dropout(x, p)[None] if p else None
        y: Tensor = function.apply(x[None], dropped, w, bias, None, a, b, scale, None, None)
        return y[0]

    return (layers.of_peer(lora_linear),)


def _unsloth() -> tuple[Build, tuple[str, ...]]:
    os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")  # unsloth_zoo asks whether unsloth has been imported whole
    # It writes sources of its own into the working folder where no other one is named.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-"))
    with _packages_without_their_imports("unsloth", "unsloth.kernels"):
        function: Any = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W

    def lora_linear(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        if bias is not None:
            raise ValueError("its LoRA_W has no bias of the base")
        return function.apply(x[None], w, None, a, b, scale, p or None)[0]

    return layers.of_peer(lora_linear), ("its kernels package alone is imported; its own import patches transformers",)


def _torchtune() -> tuple[Build, tuple[str, ...]]:
    with _packages_without_their_imports("torchtune", "torchtune.modules"), _old_name_of_nf4() as moved:
        layer: Any = importlib.import_module("torchtune.modules.peft.lora").LoRALinear

    def build(q: Problem) -> Task:
        rank, (n, k) = q.a.shape[0], q.w.shape
        with torch.device("meta"):
            module = layer(k, n, rank, q.scale * rank, dropout=q.p, use_bias=q.bias is not None)
        module.weight = nn.Parameter(q.w, requires_grad=False)
        if q.bias is not None:
            module.bias = nn.Parameter(q.bias, requires_grad=False)
        a, b = (nn.Parameter(t.detach().clone()) for t in (q.a, q.b))
        module.lora_a.weight, module.lora_b.weight = a, b
        return Task(module.train(), (a, b), (q.w,) if q.bias is None else (q.w, q.bias))

    notes = ["its modules package alone is imported"]
    if moved:
        notes.append("it asks for torchao.dtypes.nf4tensor, which this torchao has under another name")
    return build, tuple(notes)


def _automodel() -> tuple[Build]:
    layer: Any = importlib.import_module("nemo_automodel.components._peft.lora").LinearLoRA

    def build(q: Problem) -> Task:
        rank = q.a.shape[0]
        plain = nn.Linear(q.w.shape[1], q.w.shape[0], q.bias is not None, device="meta", dtype=q.w.dtype)
        plain.weight = nn.Parameter(q.w, requires_grad=False)
        if q.bias is not None:
            plain.bias = nn.Parameter(q.bias, requires_grad=False)
        module = layer(plain, dim=rank, alpha=q.scale * rank, dropout=q.p, dropout_position="pre", lora_dtype=q.a.dtype)
        with torch.no_grad():
            module.lora_A.weight.copy_(q.a)
            module.lora_B.weight.copy_(q.b)
        trained = (module.lora_A.weight, module.lora_B.weight)
        return Task(module.train(), trained, tuple(t for t in (module.weight, module.bias) if t is not None))

    return (build,)


_PEERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "PEFT": ("peft", _peft),
    "axolotl": ("axolotl", _axolotl),
    "unsloth": ("unsloth", _unsloth),
    "torchtune": ("torchtune", _torchtune),
    "nemo-automodel": ("nemo-automodel", _automodel),
}
"""A project → the name of its distribution, and what imports it."""


def _folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@contextlib.contextmanager
def _packages_without_their_imports(*names: str) -> Iterator[None]:
    """Inside, these packages are empty modules over their folders, so that a module below them is imported without what
    their ``__init__`` imports."""
    root = _folder(names[0]).parent
    for name in names:
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(root.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    yield


@contextlib.contextmanager
def _old_name_of_nf4() -> Iterator[bool]:
    """Inside, ``torchao.dtypes.nf4tensor`` can be imported from where newer versions of torchao have it. Yields whether
    it has moved."""
    old, new = "torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
    importlib.import_module("torchao")
    with contextlib.suppress(ImportError):
        importlib.import_module(old)
    moved = old not in sys.modules
    if moved:
        sys.modules[old] = importlib.import_module(new)
        sys.modules.setdefault("torchao.dtypes", ModuleType("torchao.dtypes"))
    yield moved
