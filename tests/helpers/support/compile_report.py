"""Compile a launch ahead of time, for a GPU that need not be there, and report its resources and instructions."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends import workspace
from lora_kernels.backends.triton import launch as launching
from lora_kernels.backends.triton.device import Launch, Target
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans.tiles import Gpu, Plan
from lora_kernels.quant.weight import QuantizedWeight

SHARED_MEMORY = {
    "sm_75": 65536,
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx1100": 65536,
}
"""The bytes of shared memory that one program may have."""
TENSOR_MEMORY = 512
"""The columns of an sm_100's tensor memory."""
REGISTERS = 255
ONE_CODE = ("sm_80", "sm_86", "sm_89")
"""For the same tile Triton makes the same PTX for these, but for the target's name. So it is made once and given to
ptxas for each. test_compile_quantised.py tests that this holds."""
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

    def check(self, arch: str) -> None:
        """Raise AssertionError where the kernel spills registers, asks for more than the architecture has, or is
        compiled to nothing but a trap."""
        assert self.spills == 0, f"{self.spills} bytes of registers spilled"
        assert self.shared <= SHARED_MEMORY[arch], f"{self.shared} bytes of shared memory"
        assert self.registers <= (REGISTERS if arch.startswith("sm_") else 512)
        assert self.tensor_memory <= TENSOR_MEMORY
        assert not self.trap, "the kernel is a trap"


class Reports:
    """The reports by the number of an entry. Reading one waits until its compilation has ended."""

    def __init__(self) -> None:
        self.futures: dict[int, tuple[Future[list[Report]], int]] = {}

    def __getitem__(self, number: int) -> Report:
        future, place = self.futures[number]
        return future.result()[place]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_of(
    arch: str,
    plan: Plan,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    p: float,
    w: QuantizedWeight | None = None,
    M: int = 4096,
    precision: str = "highest",
) -> Launch:
    """Return the back-end's launch for the largest rank of the plan's tile; w [4096, 4096] is dense by default."""
    target = Target(Gpu(arch, 132), contextlib.nullcontext, lambda: 0, lambda: False)
    N, K, R = 4096, 4096, plan.tile.BLOCK_R
    x, y, bias = (empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N,)))
    a, b, h = (empty(*shape, dtype=adapter_dtype) for shape in ((R, K), (N, R), (M, R)))
    seed = empty(dtype=torch.int64) if p else None
    base = Base(empty(N, K, dtype=dtype) if w is None else w, bias)
    adapter = Adapter(a, b, 0.75, p, seed)
    torch.set_float32_matmul_precision(precision)
    counters = (mock.patch.object(workspace, name, {}) for name in ("_blocks", "_by_stream"))
    with contextlib.ExitStack() as stack:  # counters without memory are of no use to other tests
        stack.callback(torch.set_float32_matmul_precision, "highest")
        for each in counters:
            stack.enter_context(each)
        if plan.tile.BLOCK_C:
            saved, gradients = launching.Saved(x, h), launching.GradientBuffers(x, a, b, h)
            return launching.backward_launch(target, plan, y, saved, base, adapter, gradients)
        return launching.forward_launch(target, plan, x, base, adapter, launching.Outputs(y, h, True))


@contextlib.contextmanager
def compiled_ahead(
    request: pytest.FixtureRequest, compile: Callable[[int], Report], code_of: Callable[[int], Hashable]
) -> Iterator[Reports]:
    """Yield the reports on the entries that the selected tests of a module ask for by number. A fixture calls this.

    Two processes compile them. Entries with the same `code_of` are compiled by one process, one after the other.
    """
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    mine = (item.callspec.params for item in tests if item.path == request.path and hasattr(item, "callspec"))
    alike: dict[Hashable, list[int]] = {}
    for number in sorted({params["number"] for params in mine if "number" in params}):
        alike.setdefault(code_of(number), []).append(number)
    reports = Reports()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for numbers in alike.values():
            future = pool.submit(_compile_each, compile, numbers)
            reports.futures |= {number: (future, place) for place, number in enumerate(numbers)}
        yield reports
        pool.shutdown(cancel_futures=True)


def _compile_each(compile: Callable[[int], Report], numbers: list[int]) -> list[Report]:
    return [compile(number) for number in numbers]


_compiled: dict[str, Any] = {}
"""The kernels that Triton compiled in this process for one of ONE_CODE, by everything that they depend on."""


def compile_report(launch: Launch, arch: str, anew: bool = False) -> Report:
    """Compile a launch, whose tensors may be on the meta device, and return the report.

    `anew` compiles it again even where ONE_CODE would reuse the code of another architecture. Raises what the compiler
    raises.
    """
    signature, constants, attributes = specialise(launch.kernel, launch.arguments)
    cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made_of = repr((launch.kernel, signature, constants, attributes, launch.options))
    compiled = None if anew or arch not in ONE_CODE else _compiled.get(made_of)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a cache hit would skip ptxas, and its log with it
        triton.knobs.compilation.disable_line_info = True  # an eighth of the time, and none of the code
        triton.knobs.nvidia.dump_ptxas_log = True
        if compiled is None:
            compiled = triton.compile(source, target=target, options=launch.options)
            assembly = compiled.asm["ptx" if cuda else "amdgcn"]
            if arch in ONE_CODE:
                _compiled[made_of] = compiled
        else:
            assembly = re.sub(r"(?m)^\.target sm_\d+", f".target {arch}", compiled.asm["ptx"])
            backend = make_backend(target)
            backend.make_cubin(assembly, {}, backend.parse_options(dict(launch.options)), int(arch[3:]))
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


def specialise(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Return the types, constants and divisibilities under which Triton would compile these arguments."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def add(path: tuple[int, ...], value: Any, specialised: bool) -> Any:
        """Return the type of an argument, or of one within a tuple."""
        divisible = False
        if isinstance(value, tuple):
            items = tuple(add((*path, number), each, specialised) for number, each in enumerate(value))
            return type(value)(*items) if hasattr(value, "_fields") else items
        if isinstance(value, triton.language.constexpr) or (specialised and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            name, divisible = f"*{_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            name = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            name = "fp32"
        else:
            name = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and specialised
        if divisible:
            attributes[path] = [["tt.divisibility", 16]]
        return name

    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            value = triton.language.constexpr(value)
        signature[parameter.name] = add((number,), value, not parameter.do_not_specialize)
    return signature, constants, attributes
