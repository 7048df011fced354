"""Count the Python frames that a call of a fused layer enters, with ``sys.setprofile``.

A small layer spends most of its time in Python. Its time changes from run to run; the number of Python functions that
a call enters does not, so it can be compared between two versions of the code and held by a test.

    python -m benchmarks.frames
    python -m benchmarks.frames --json
    python -m benchmarks.frames --trace "LoRA forward"      every frame of one call, in order

Each call is made on one 64x64 layer of rank 8 with x [8, 64] in fp32 on the CPU, after two calls that warm it up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.testing.terminal import terminal

N = K = 64
M = 8
R = 8
P = 0.1
WARM_UPS = 2
PACKAGE = str(Path(lora_kernels.__file__).parent) + "/"


class Frames(NamedTuple):
    """The Python frames that one call enters."""

    own: int
    """Frames of functions defined in the package lora_kernels."""
    total: int
    """All Python frames, those of torch and PEFT included."""
    files: int
    """Files of the package that own frames belong to."""
    moves: int
    """How often an own frame follows an own frame of another file."""


def frames_of(call: Callable[[], object]) -> list[str]:
    """Return the Python frames that ``call()`` enters, in order, each as "file:line function". The frame of `call`
    itself is left out."""
    entered: list[str] = []

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            entered.append(f"{code.co_filename}:{code.co_firstlineno} {code.co_name}")

    for _ in range(WARM_UPS):
        call()
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered[1:]


def own_frames(entered: list[str]) -> list[str]:
    """Return those of the frames that belong to the package, with file names relative to it."""
    return [frame.removeprefix(PACKAGE) for frame in entered if frame.startswith(PACKAGE)]


def count(call: Callable[[], object]) -> Frames:
    """Return how many frames, files and moves between files ``call()`` takes once it is warm."""
    entered = frames_of(call)
    own = own_frames(entered)
    files = [frame.split(":")[0] for frame in own]
    moves = sum(before != after for before, after in itertools.pairwise(files))
    return Frames(len(own), len(entered), len(set(files)), moves)


def _forward(layer: nn.Module) -> Callable[[], object]:
    x = torch.randn(M, K)
    return lambda: layer(x)


def _forward_and_backward(layer: nn.Module) -> Callable[[], object]:
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    return lambda: layer(x).backward(dy)


def _without_gradients(layer: nn.Module) -> Callable[[], object]:
    x = torch.randn(M, K)
    layer.eval()

    @torch.no_grad()
    def call() -> Tensor:
        return layer(x)

    return call


def _lora(**settings: Any) -> nn.Module:
    return lora_kernels.FusedLoRALinear(K, N, r=R, lora_dropout=P, **settings)


def _quantised() -> nn.Module:
    return lora_kernels.FusedLoRALinear.from_linear(nn.Linear(K, N), r=R, lora_dropout=P, quant="nf4")


def _peft() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=R, lora_dropout=P, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config).train()
    assert lora_kernels.fuse(model).fused
    return model.base_model.model[0]


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "LoRA forward": lambda: _forward(_lora()),
    "LoRA forward + backward": lambda: _forward_and_backward(_lora()),
    "LoRA without gradients": lambda: _without_gradients(_lora()),
    "nf4 forward": lambda: _forward(_quantised()),
    "DoRA forward": lambda: _forward(_lora(use_dora=True)),
    "PEFT, fused, forward": lambda: _forward(_peft()),
}
"""The calls that are counted, each made from a layer of its own. All but the third train with dropout 0.1."""


def measure(name: str) -> Frames:
    """Return the frames of one of `CALLS`."""
    with chosen():
        return count(CALLS[name]())


class _Own(dict[Any, str]):
    """Choices of the base GEMM that are made already: our own in every class of calls."""

    def get(self, key: Any, default: Any = None) -> str:
        return "own"


@contextmanager
def chosen() -> Iterator[None]:
    """Keep the CPU back-end from timing its GEMMs and choosing one by the clock: the choice has frames of its own."""
    try:
        from lora_kernels.backends.cpu import gemm
    except ImportError:  # without the native kernels there is nothing to choose
        yield
        return
    before = gemm._choices
    gemm._choices = _Own()
    try:
        yield
    finally:
        gemm._choices = before


def main(argv: list[str] | None = None) -> int:
    """Print the table, its numbers as JSON, or the frames of one call."""
    parser = argparse.ArgumentParser(description="Count the Python frames that a call of a fused layer enters.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--trace", choices=CALLS, metavar="CALL", help=f"list a call's frames: {', '.join(CALLS)}")
    args = parser.parse_args(argv)
    if args.trace:
        with chosen():
            print("\n".join(frame.removeprefix(PACKAGE) for frame in frames_of(CALLS[args.trace]())))
        return 0
    found = {name: measure(name) for name in CALLS}
    if args.json:
        print(json.dumps({name: frames._asdict() for name, frames in found.items()}, indent=1))
    else:
        header = ("call", "own frames", "all frames", "files", "moves between files")
        rows = [(name, *map(str, frames)) for name, frames in found.items()]
        terminal().table(f"Python frames of one call, x [{M}, {K}], W [{N}, {K}]", header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
