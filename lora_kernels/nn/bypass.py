"""Which code may compute a layer without calling it: a method that another package, or the user, has put in place.

Kernels of unsloth and axolotl read lora_A and lora_B of several layers in one function. It stands in the place of a
module's forward, on the instance or on the class, or in an attribute that this forward calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from lora_kernels.nn import readers


def suspect(model: nn.Module, path: str) -> str:
    """Return which replaced method of a module around the layer at `path` may compute it, as a sentence; "" where none
    is found. A method that names the layer comes before one that does not, and the nearest module before others."""
    *above, child = path.split(".")
    around = [model.get_submodule(".".join(above[:depth])) for depth in range(len(above), -1, -1)] if path else []
    found = [(what, function) for module in around for what, function in replaced(module)]
    for what, function in found:
        if child in _names(function):
            return f"{what} is {_full_name(function)}, which uses {child}"
    if found and around and any(True for _ in replaced(around[0])):
        what, function = found[0]
        return f"{what} is {_full_name(function)}, which may compute it"
    reading = readers.reading_in(model, path) if path else None
    return "" if reading is None else str(reading)


def replaced(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the methods of `module` that are not those of its class as its package defines it: their names, and the
    functions that stand there. The wrappers of accelerate's hooks are passed over for what they wrap."""
    kind: Any = type(module)
    own = {name: value for name, value in module.__dict__.items() if not name.startswith("_")}
    if "_hf_hook" in module.__dict__ and "forward" in own:
        own["forward"] = module.__dict__.get("_old_forward")
    for name, value in own.items():
        function = function_of(value)
        if function is not None and function is not function_of(getattr(kind, name, None)):
            yield f"{kind.__name__}.{name} on the instance", function
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    function = function_of(vars(owner)["forward"])
    if function is not None and _package(function) != _package(owner) and owner is not nn.Module:
        yield f"{kind.__name__}.forward", function


def function_of(value: Any) -> FunctionType | None:
    """Return the function behind a method, a partial function or a wrapper, as torch.compile makes one; None for
    anything else."""
    while not isinstance(value, FunctionType) or hasattr(value, "__wrapped__"):
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, MethodType):
            value = value.__func__
        elif isinstance(value, FunctionType):
            value = value.__wrapped__  # type: ignore[attr-defined]
        else:
            return None
    return value


def _package(what: Any) -> str:
    return str(getattr(what, "__module__", "")).partition(".")[0]


def _full_name(function: FunctionType) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _names(function: FunctionType) -> set[str]:
    """Return the names and texts in the code of a function and of those inside it."""
    names: set[str] = set()
    todo: list[CodeType] = [function.__code__]
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                todo.append(constant)
            elif isinstance(constant, str):
                names.add(constant)
    return names
