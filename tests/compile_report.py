"""Compiles a launch ahead of time, for a GPU that is not there, and reports what became of it."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
"""Bytes that one program may have."""
TENSOR_MEMORY = 512
"""Columns of an sm_100's."""
REGISTERS = 255
_TENSOR_CORE = re.compile(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync|v_mfma_")
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int
    """Bytes on CUDA, registers on AMD."""
    shared: int
    tensor_memory: int
    tensor_core: dict[str, int]
    """How often each kind of tensor-core instruction occurs."""
    bulk_copies: int
    trap: bool
    assembly: str
    """PTX or AMDGCN."""


def compile_report(launch: Any, arch: str) -> Report:
    """`launch`: a kernel with its arguments and options, whose tensors may be on the meta device. Raises what the
    compiler raises."""
    signature, constants, attributes = _specialise(launch.kernel, launch.arguments)
    cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a cache hit would skip ptxas, and its log with it
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes), target=target, options=launch.options
        )
    assembly = compiled.asm["ptx" if cuda else "amdgcn"]
    tensor_core: dict[str, int] = {}
    for found in _TENSOR_CORE.findall(assembly):
        tensor_core[found] = tensor_core.get(found, 0) + 1

    def total(pattern: str, text: str) -> int:
        found = re.findall(pattern, text)
        assert found, f"{pattern!r} not found in what the compiler printed"
        return sum(map(int, found))

    if cuda:
        registers = total(r"Used (\d+) registers", log.getvalue())
        spills = total(r"(\d+) bytes spill stores", log.getvalue()) + total(r"(\d+) bytes spill loads", log.getvalue())
    else:
        registers, spills = total(r"\.vgpr_count:\s*(\d+)", assembly), total(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return Report(
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_core=tensor_core,
        bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor", assembly)),
        trap=bool(re.search(r"\btrap;", assembly)),
        assembly=assembly,
    )


def _specialise(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """The types, constants and divisibilities under which Triton would compile these arguments."""
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value, name = arguments[parameter.name], parameter.name
        divisible = False
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(number,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes
