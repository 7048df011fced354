"""The variants that the bench times: the same layer, computed in several ways over the same x and w.

F.linear    the frozen layer, whose backward goes to x only: the floor that all others are compared with
PEFT        PEFT's own lora.Linear over nn.Linear
addmm_      the strongest composite of torch operations: an autograd.Function by hand, the low-rank term added in place
merge       F.linear(x, w + s·b a, bias), formed in every step, with autograd through it; it has no dropout
ours: NAME  this package, one variant for each back-end

In one cell the adapters of PEFT and of this package have the same dtype, that of the shape. Both make adapters in fp32
by default; adapters in 16 bits are asked for. With all peers there are also PEFT with its adapters in the other dtype,
PEFT's layer under torch.compile on a few shapes, and other projects' layers from their sources
(`lora_kernels.bench.peers`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_kernels.backends import dispatch
from lora_kernels.bench import layers, peers
from lora_kernels.bench.layers import Task
from lora_kernels.bench.shapes import Shape
from lora_kernels.core.operands import Call
from lora_kernels.testing.judge import Problem
from lora_kernels.testing.names import SHORT


@dataclass(frozen=True)
class Variant:
    """A way to compute the layer."""

    name: str
    """Its name in tables and in the JSON."""
    build: Callable[[Problem], Task]
    backend: str | None = None
    """The back-end, of a variant of this package; None of others."""
    automatic: bool = False
    """Whether the back-end is the automatic choice."""
    dropout: bool = True
    """Whether it can be built with p above 0."""
    wanted: Callable[[Shape], bool] = lambda shape: True
    """Whether it is measured on a shape."""
    doubted: bool = False
    """Whether it may fail or compute something else; such a variant is tried before it is timed."""
    counted: bool = True
    """Whether its bytes are counted, for which it is built twice more."""


FLOOR = Variant("F.linear", layers.frozen)
PEFT = Variant("PEFT", layers.peft)
LAYERS = (Variant("PEFT's, fused", layers.peft_fused), Variant("FusedLoRALinear", layers.fused(None)))
"""Layers of this package with the automatic choice of the back-end."""


def baselines() -> tuple[list[Variant], list[str]]:
    """Return the variants that this package is always compared with, and notes on those that cannot be measured."""
    found = [Variant("addmm_", layers.addmm), Variant("merge", layers.merge, dropout=False)]
    if importlib.util.find_spec("peft") is None:
        return found, ["PEFT is not measured: it is not installed (pip install peft)"]
    return [PEFT, *found], []


def more_baselines(sources: Sequence[tuple[str, Path]]) -> tuple[list[Variant], list[str]]:
    """Return the further variants, with those from `sources` (name, path), and notes on those that cannot be
    measured."""
    found, notes = [], []
    if importlib.util.find_spec("peft") is not None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            build = functools.partial(layers.peft, adapter_dtype=dtype)
            found.append(Variant(f"PEFT, {SHORT[dtype]} adapters", build, wanted=functools.partial(_is_other, dtype)))
        found.append(
            Variant(
                "PEFT compiled",
                layers.peft_compiled,
                wanted=lambda shape: shape.compiled,
                doubted=True,
                counted=False,
            )
        )
    for name, path in sources:
        try:
            peer = peers.load(name, path)
        except Exception as error:  # another project's import may fail in any way
            notes.append(f"{name} is not measured: {type(error).__name__}: {error}")
            continue
        notes += peer.notes
        found.append(Variant(name, layers.of_peer(peer.lora_linear), dropout=peer.dropout, doubted=True))
    return found, notes


def _is_other(dtype: torch.dtype, shape: Shape) -> bool:
    """Return whether the adapters of a 16-bit shape could have `dtype`, but have another."""
    return shape.dtype != torch.float32 and shape.adapters != dtype and dtype in (torch.float32, shape.dtype)


def ours(
    shape: Shape, device: torch.device, named: str | None, without: Sequence[str] = ()
) -> tuple[list[Variant], dict[str, list[str]]]:
    """Return a variant for each back-end that serves `shape`, and by name the reasons why the others do not.

    With `named` only that back-end is asked; those in `without` are left out.
    """
    sizes = shape.M, shape.N, shape.K, shape.R
    calls = [Call(op, device, shape.dtype, shape.adapters, *sizes, True) for op in ("forward", "backward")]
    found, passed_over = [], {}
    automatic = dispatch.pick(calls[0], None).name
    for name in dispatch.BACKENDS if named is None else (named,):
        if name in without:
            passed_over[name] = [f"left out by --without {name}"]
            continue
        reasons = list(dict.fromkeys(reason for call in calls for reason in dispatch.refusals(name, call)))
        if reasons:
            passed_over[name] = reasons
        else:
            found.append(Variant(f"ours: {name}", layers.fused(name), name, name == automatic))
    return found, passed_over
