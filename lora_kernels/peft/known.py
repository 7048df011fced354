"""Whether PEFT's own forward is one that the fused path may stand in for.

A fused layer computes the result of PEFT's forward without calling it. So the forward must be one that this package
knows: PEFT's own function, which uses only the attributes and functions that PEFT 0.19 to 0.21 use there. A newer PEFT
may use something new in it (a gate, another kind of variant, a hook), and another package may replace it. Such a layer
is left to PEFT, with the name of what is new. A change that uses nothing new is not noticed here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any


def why_not(owner: type[Any], uses: str, *functions: str) -> str:
    """Return why the fused path may not stand in for functions of PEFT's class `owner`, or "" where it may.

    `uses` holds the names that these functions are known to use, between spaces: attributes, global names, keywords,
    and names in strings. Without `functions` its forward is meant.
    """
    return next(filter(None, (_unknown(owner, name, uses) for name in functions or ("forward",))), "")


def unknown_names(code: CodeType, uses: str) -> list[str]:
    """Return the names that a function uses beside `uses`, which holds names between spaces."""
    return _new(code, uses)


def _unknown(owner: type[Any], name: str, uses: str) -> str:
    function = getattr(owner, name)
    made_by = function.__globals__.get("__name__") if isinstance(function, FunctionType) else ""
    if made_by == "contextlib":  # of @contextmanager
        function = getattr(function, "__wrapped__", function)
    what = f"PEFT's {owner.__name__}.{name}"
    home = function.__globals__.get("__name__", "") if isinstance(function, FunctionType) else type(function).__module__
    if home.partition(".")[0] != "peft":
        return f"{what} has been replaced by a function of {home}"
    if new := _new(function.__code__, uses):
        return f"{what} uses {', '.join(new)}, which this version of lora_kernels does not know"
    return ""


@functools.cache  # a model has hundreds of layers of one class, and a code object never changes
def _new(code: CodeType, uses: str) -> list[str]:
    return sorted(set(_used(code)) - set(uses.split()))


def _used(code: CodeType) -> Iterator[str]:
    """Yield the attributes, global names, keywords and names in strings that a function uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _used(constant)
        for text in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(text, str) and text.isidentifier():
                yield text
