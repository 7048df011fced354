"""Threads that call the kernels at the same time get the bits that one thread gets. Without a GIL they truly do."""

from __future__ import annotations

import sys
import sysconfig
import threading

import pytest
import torch

import lora_kernels
from lora_kernels import _C

THREADS, CALLS = 8, 6


def results(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return y, the gradients, and y over nf4 codes, of operands that are the same in every call."""
    shapes = ((33, 96), (160, 96), (8, 96), (160, 8))
    draw = torch.Generator().manual_seed(1)
    x, w, a, b = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    for operand in (x, a, b):
        operand.requires_grad_()
    y = lora_kernels.lora_linear(x, w, a, b, scale=2.0)
    gradients = torch.autograd.grad(y.float().square().sum(), (x, a, b))
    codes = lora_kernels.quantize_weight(w, "nf4")
    return [y.detach(), *gradients, lora_kernels.lora_linear(x.detach(), codes, a.detach(), b.detach(), scale=2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_at_the_same_time_get_the_same_bits(dtype: torch.dtype, one_thread: None) -> None:
    start, found, faults = threading.Barrier(THREADS), [], []

    def work() -> None:
        start.wait()
        try:
            found.extend(results(dtype) for _ in range(CALLS))
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(found) == THREADS * CALLS
    alone = results(dtype)
    assert all(torch.equal(ours, own) for each in found for ours, own in zip(each, alone, strict=True))


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_importing_the_kernels_leaves_the_gil_off() -> None:
    assert _C.cpu_isas() and not sys._is_gil_enabled()
