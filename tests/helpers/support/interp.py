"""Run ordinary @triton.jit kernels on CPU tensors, in this process: ``with interpret(): kernel[grid](...)``.

This uses Triton's own interpreter, with two changes. It needs no environment variable, which would keep kernels from
being compiled in the same process. And it repairs three faults: Triton's interpreter multiplies and adds the raw
payloads of bfloat16, truncates on conversion to bfloat16, and leaves `triton.language` patched after a kernel has
called a helper. The repairs are for Triton 3.6 and 3.7.

Programs run one after the other, each to its end, in the order of their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_stock_dot, _stock_cast, _stock_binary = _Builder.create_dot, _Builder.cast_impl, _Builder.binary_op
_stock_fp_to_fp, _stock_patch_tensor = _Builder.create_fp_to_fp, interpreter._patch_lang_tensor
_rewritten: dict[Any, Callable[..., Any]] = {}


def _rewrite(fn: Any) -> Callable[..., Any]:
    if fn not in _rewritten:
        _rewritten[fn] = interpreter.FunctionRewriter(fn).rewrite_ast()
    return _rewritten[fn]


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """Run a helper that a kernel calls, such as tl.zeros or tl.cdiv."""
    scope = interpreter._patch_lang(self.fn)
    try:
        return _rewrite(self.fn)(*args, **kwargs)
    finally:
        scope.restore()


def _run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    assert not warmup, "nothing is compiled in the interpreter"
    interpreter.GridExecutor(_rewrite(self.fn), self.arg_names, grid, [])(*args, **kwargs)


def _widen(handle: Any) -> Any:
    """Convert bfloat16, which is held as its 16 bits, to float32. Return other dtypes unchanged."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(data: np.ndarray) -> np.ndarray:
    """Convert float32 to bfloat16, rounding to nearest, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _create_dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    return _stock_dot(self, _widen(a), _widen(b), acc, input_precision, max_num_imprecise_acc)


def _cast_impl(self: Any, handle: Any, dtype: Any) -> Any:
    if handle.dtype.scalar == dtype.scalar:
        return handle
    handle = _widen(handle)
    if dtype.scalar == tl.bfloat16:
        if handle.dtype.scalar != tl.float32:
            handle = _stock_cast(self, handle, tl.float32)
        return _Handle(_round(handle.data), tl.bfloat16)
    return handle if handle.dtype.scalar == dtype.scalar else _stock_cast(self, handle, dtype)


def _binary_op(self: Any, a: Any, b: Any, op: Callable[..., Any]) -> Any:
    if a.dtype.scalar != tl.bfloat16 or b.dtype.scalar != tl.bfloat16:
        return _stock_binary(self, a, b, op)
    out = op(_widen(a).data, _widen(b).data)
    return _Handle(out, tl.int1) if out.dtype == bool else _Handle(_round(out), tl.bfloat16)


def _create_fp_to_fp(self: Any, handle: Any, dtype: Any, rounding: Any) -> Any:
    if tl.bfloat16 in (handle.dtype.scalar, dtype.scalar):
        return _cast_impl(self, handle, dtype)
    return _stock_fp_to_fp(self, handle, dtype, rounding)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Patch a tensor so that it can be an index: Triton 3.6 calls int() on an array of one element, which NumPy 2.4
    refuses."""
    _stock_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))


_PATCHES = (
    (JITFunction, "__call__", _call),
    (JITFunction, "run", _run),
    (_Builder, "create_dot", _create_dot),
    (_Builder, "cast_impl", _cast_impl),
    (_Builder, "binary_op", _binary_op),
    (_Builder, "create_fp_to_fp", _create_fp_to_fp),
    (interpreter, "_patch_lang_tensor", _patch_lang_tensor),
)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Run the kernels that are launched inside in the interpreter. Outside they are compiled as usual."""
    stock = [(owner, name, getattr(owner, name)) for owner, name, _ in _PATCHES]
    for owner, name, patch in _PATCHES:
        setattr(owner, name, patch)
    try:
        yield
    finally:
        for owner, name, original in stock:
            setattr(owner, name, original)
