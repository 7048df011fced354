"""The instruction sets that the processor has and the kernels lack, because the compiler could not compile them."""

from __future__ import annotations

from lora_kernels import _C
from lora_kernels.core import built


def lacking() -> dict[str, str]:
    """Return why each instruction set is missing that the processor has, best first."""
    return {name: built.left_out(name) for name, (compiled, here) in _C.cpu_paths().items() if here and not compiled}


def told() -> str:
    """Return the sentence about a better instruction set that is missing, or "" where none is."""
    best = _C.cpu_isas()[0]
    better = list(_C.cpu_paths())[: list(_C.cpu_paths()).index(best)]
    missing = {name: why for name, why in lacking().items() if name in better}
    if not missing:
        return ""
    name, why = next(iter(missing.items()))
    return (
        f"runs {best}; this processor also has {name}, whose kernels this installation lacks ({why}). With a newer "
        f"compiler: {built.reinstall()}"
    )
