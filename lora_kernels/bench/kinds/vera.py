"""VeRA: a linear layer frozen, with PEFT's VeRA, and with the same after `lora_kernels.fuse`, in training and in
evaluation."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import lora_kernels
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, SAVED, Cell, Target, Way
from lora_kernels.bench.kinds.folded import in_fp64, way_of

_EXACT, _AS_PEFT = 2e-5, 1e-4
"""The largest error of ours and of PEFT, as a fraction of the largest value in fp64."""

_SIZES = ((512, 1024, 1024, 256), (512, 1024, 1024, 64), (2048, 1024, 4096, 256), (2048, 1024, 4096, 64))
"""M, K, N and r."""

_TRAINING = (Target(PEFT, 1.25), Target(PEFT, 0.25, SAVED))
"""PEFT keeps M × N beside h [M, r], and ours h alone. Ours pays with a product of N × r over the rows of x."""
_EVALUATION = (Target(PEFT, 0.8),)


def cells() -> list[Cell]:
    """Return a cell of training and one of evaluation for each size, and one of decoding."""
    found = []
    for M, K, N, r in _SIZES:
        found.append(_cell(M, K, N, r, "training", _TRAINING))
        found.append(_cell(M, K, N, r, "evaluation", _EVALUATION))
    return [*found, _cell(1, 1024, 4096, 256, "evaluation", _EVALUATION)]


def _cell(M: int, K: int, N: int, r: int, mode: str, targets: tuple[Target, ...]) -> Cell:
    training = mode == "training"
    name = f"{mode}, {K} → {N}, {M} row{'s' if M > 1 else ''}, r {r}"
    return Cell("VeRA", name, functools.partial(_ways, M, K, N, r, training), targets, backward=training)


def _ways(M: int, K: int, N: int, r: int, training: bool) -> Mapping[str, Way]:
    torch.manual_seed(0)
    base = nn.Linear(K, N).requires_grad_(False)
    x = torch.randn(M, K)
    theirs = _model(base, r).train(training)
    ours: Any = copy.deepcopy(theirs)
    lora_kernels.fuse(ours, strict=True)
    want = functools.cache(functools.partial(in_fp64, theirs, x))
    ways = {PEFT: way_of(theirs, x, want, _AS_PEFT), OURS: way_of(ours, x, want, _EXACT)}
    for name, model in ((PEFT, theirs), (OURS, ours)):  # PEFT's A and B are buffers
        ways[name] = dataclasses.replace(ways[name], frozen=(*ways[name].frozen, *model.buffers()))
    return {FROZEN: way_of(base, x), **ways}


def _model(base: nn.Module, r: int) -> Any:
    """Return a model of PEFT that holds a copy of the layer alone, whose adapter is not zero."""
    import peft

    model: Any = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.VeraConfig(r=r, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda_" in name:
                parameter.normal_()
    return model
