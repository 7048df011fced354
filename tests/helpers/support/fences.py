"""Copies of tensors that end at the last byte before a page that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def fences() -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function that returns a contiguous copy of a tensor. Reading or writing beyond its end is a fault of
    the process, until the context ends."""
    pages = []

    def fenced(t: Tensor) -> Tensor:
        t = t.contiguous()
        size = t.numel() * t.element_size()
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        buffer = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=whole - size).view(t.shape)
        buffer.copy_(t)
        _protect(buffer.data_ptr() + size)
        pages.append((memory, buffer.data_ptr() + size))
        return buffer

    yield fenced
    for _, page in pages:
        _protect(page, read_write=True)


def _protect(page: int, read_write: bool = False) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 3 if read_write else 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
