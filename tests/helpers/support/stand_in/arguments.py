"""The arguments of a recorded launch, by the names that the kernel gives them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from support.stand_in.driver import Driver, Recorded, TensorMap
from triton.tools.tensor_descriptor import TensorDescriptor

_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u32": "I", "u64": "Q", "fp32": "f"}
"""Triton's names of the types of parameters, and those of the module struct."""
_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


class _Compiled(NamedTuple):
    """What a kernel was compiled for. The keys are paths of argument numbers, into tuples."""

    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


def check(driver: Driver, recorded: Recorded, compiled: Any, arguments: dict[str, Any]) -> None:
    """Check that a launch of `compiled`, a kernel that Triton compiled, got these arguments, and that the kernel was
    compiled for them: for their dtypes, for their alignment, and for the values that are constants."""
    assert recorded.handle == compiled.function
    parameters, source = iter(recorded.parameters), compiled.src
    made_for = _Compiled(source.constants, source.attrs)
    for place, (name, kind) in enumerate(source.signature.items()):
        try:
            _check(driver, parameters, kind, arguments[name], made_for, (place,))
        except AssertionError as error:
            raise AssertionError(f"argument {name}, which is {kind}: {error}") from error
    scratch = list(parameters)
    assert len(scratch) == 2 and not any(map(any, scratch)), "these kernels use no scratch of Triton's"


def _check(
    driver: Driver, parameters: Iterator[bytes], kind: Any, argument: Any, made_for: _Compiled, path: tuple[int, ...]
) -> None:
    if isinstance(kind, tuple):
        for place, (each, part) in enumerate(zip(kind, argument, strict=True)):
            _check(driver, parameters, each, part, made_for, (*path, place))
        return
    if kind == "constexpr":
        wanted = argument.value if isinstance(argument, tl.constexpr) else argument
        assert made_for.constants[path] == wanted, f"compiled for {made_for.constants[path]}, called with {wanted}"
        return
    if kind.startswith("tensordesc"):
        _check_descriptor(driver, parameters, argument)
        return
    if kind.startswith("*"):
        assert kind[1:] == _NAMES[argument.dtype], f"compiled for {kind}, called with {argument.dtype}"
        found, wanted = _value(next(parameters), "u64"), argument.data_ptr()
    else:
        found, wanted = _value(next(parameters), kind), argument
    assert math.isclose(found, wanted, rel_tol=1e-6) if kind == "fp32" else found == wanted, f"{found}, not {wanted}"
    divisible = ["tt.divisibility", 16] in made_for.attributes.get(path, [])
    assert divisible <= (wanted % 16 == 0), f"compiled for multiples of 16, called with {wanted}"


def _check_descriptor(driver: Driver, parameters: Iterator[bytes], argument: Any) -> None:
    assert isinstance(argument, TensorDescriptor)
    base, item = argument.base, argument.base.element_size()
    rows, columns = argument.block_shape
    wanted = TensorMap(
        base.data_ptr(), tuple(base.shape), (base.stride(0) * item,), (min(rows, 256), min(columns, 128 // item))
    )
    found = driver.map_of(next(parameters))
    assert found == wanted, f"{found}, not {wanted}"
    sizes = [_value(next(parameters), kind) for kind in ("i32", "i32", "i64", "i64")]
    assert sizes == [*base.shape, *base.stride()], sizes


def _value(parameter: bytes, kind: str) -> Any:
    code = _FORMATS[kind]
    assert len(parameter) == struct.calcsize(code), f"a parameter of {len(parameter)} bytes cannot be {kind}"
    return struct.unpack(code, parameter)[0]
