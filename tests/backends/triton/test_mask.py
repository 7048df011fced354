"""The kernel that writes a dropout mask: its numbers in the interpreter, and compiled for every architecture."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lora_kernels.core import dropout

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support.compile_report import compile_report, empty
from support.interp import interpret

from lora_kernels.backends import triton
from lora_kernels.backends.triton import device
from lora_kernels.backends.triton import launch as launching
from lora_kernels.plans import tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (9, 129), (17, 43), (8, 128), (0, 8), (3, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K", SHAPES)
def test_the_mask_is_the_rule_in_the_dtype_of_x(
    M: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    target = device.Target(tiles.Gpu("interpreter", 3), contextlib.nullcontext, lambda: 0, lambda: False)
    monkeypatch.setitem(device.TARGETS, torch.device("cpu"), target)
    x = torch.zeros(K, M, dtype=dtype).t()  # the values and the strides of x do not matter
    for p, seed in ((0.4, 2**32 + 1), (1e-6, 5), (0.999, 2**63 - 1)):
        with interpret():
            mask = triton.keep_mask(x, p, torch.tensor(seed))
        assert mask.dtype == dtype and mask.is_contiguous()
        assert torch.equal(mask, dropout.keep_mask(torch.tensor(seed), M, K, p).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", dict.fromkeys(arch for arch, _ in tiles.TABLES))
def test_the_mask_compiles_for_every_architecture(arch: str, dtype: torch.dtype) -> None:
    launch = launching.mask_launch(empty(4097, 4099, dtype=dtype), 0.1, empty(dtype=torch.int64))
    report = compile_report(launch, arch)
    report.check(arch)
    assert not report.tensor_core and not report.bulk_copies
