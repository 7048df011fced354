"""Run random calls and some tests of the CPU kernels with a `_C` that is built with sanitizers: the child of
tests/package/test_sanitizers.py, which preloads libasan. A fault that they find ends the process.

    python sanitized_child.py PATH_OF_C calls N | tests WORDS FILE... | overflow
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch


def load(module: str) -> None:
    """Put the module at this path in the place of the package's `_C`."""
    spec = importlib.util.spec_from_file_location("lora_kernels._C", module)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules["lora_kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    from lora_kernels.backends.cpu import gemm

    assert gemm._C is loaded


def calls(count: int) -> int:
    """Make random calls with every instruction set. Return the number of faults."""
    from benchmarks import fuzz
    from lora_kernels import _C
    from lora_kernels.testing.terminal import Terminal

    records = [fuzz.run(3, range(count), exact, isa, Terminal()) for isa in _C.cpu_isas() for exact in (False, True)]
    print(f"{sum(record.calls for record in records)} calls with {', '.join(_C.cpu_isas())}", flush=True)
    return sum(len(record.faults) for record in records)


def overflow() -> None:
    """Read beyond the codes of a weight, whose memory has been made smaller than its shape says."""
    from lora_kernels import _C
    from lora_kernels.quant.weight import QuantizedWeight

    codes = torch.zeros(64, 64, dtype=torch.int8)
    codes.untyped_storage().resize_(32)
    _C.dequantize(1, QuantizedWeight("int8", (64, 64), torch.float32, codes, torch.ones(64)), 0, 0, torch.empty(64, 64))


if __name__ == "__main__":
    path, what, *rest = sys.argv[1:]
    load(path)
    if what == "calls":
        raise SystemExit(min(calls(int(rest[0])), 1))
    if what == "overflow":
        overflow()
    if what == "tests":
        raise SystemExit(pytest.main(["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", *rest]))
