"""The arguments of a recorded launch, by the names that the kernel gives them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

from support.stand_in.driver import Driver, Recorded
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u32": "I", "u64": "Q", "fp32": "f"}


def check(driver: Driver, recorded: Recorded, compiled: Any, arguments: dict[str, Any]) -> None:
    """Check that a launch of `compiled`, a kernel that Triton compiled, got these arguments."""
    assert recorded.handle == compiled.function
    bytes_of = iter(recorded.parameters)
    for name, kind in compiled.src.signature.items():
        _check(driver, bytes_of, kind, arguments[name], name)
    scratch = list(bytes_of)
    assert len(scratch) == 2 and not any(map(any, scratch)), "these kernels use no scratch of Triton's"


def _check(driver: Driver, parameters: Iterator[bytes], kind: Any, argument: Any, name: str) -> None:
    if isinstance(kind, tuple):
        assert len(kind) == len(argument), name
        for each, part in zip(kind, argument, strict=True):
            _check(driver, parameters, each, part, name)
    elif kind == "constexpr":
        pass  # It is compiled into the kernel.
    elif kind.startswith("tensordesc"):
        assert isinstance(argument, TensorDescriptor)
        base, item = argument.base, argument.base.element_size()
        found = driver.map_of(next(parameters))
        assert found.address == base.data_ptr(), name
        assert found.shape == tuple(base.shape), name
        assert found.strides == tuple(stride * item for stride in base.stride()[:-1]), name
        box = [min(argument.block_shape[0], 256), min(argument.block_shape[1], 128 // item)]
        assert found.box == tuple(box), name
        passed = [_value(next(parameters), kind) for kind in ["i32"] * base.dim() + ["i64"] * base.dim()]
        assert passed == [*base.shape, *base.stride()], name
    elif kind.startswith("*"):
        assert isinstance(argument, Tensor), name
        assert _value(next(parameters), "u64") == argument.data_ptr(), name
    else:
        found = _value(next(parameters), kind)
        assert math.isclose(found, argument, rel_tol=1e-6) if kind == "fp32" else found == argument, (name, found)


def _value(parameter: bytes, kind: str) -> Any:
    code = _FORMATS[kind]
    assert len(parameter) == struct.calcsize(code), f"a parameter of {len(parameter)} bytes cannot be {kind}"
    return struct.unpack(code, parameter)[0]
