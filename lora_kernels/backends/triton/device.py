"""The device that a launch runs on, the workspace on it, and the launch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends import workspace as memory
from lora_kernels.backends.current import current
from lora_kernels.plans.tiles import Gpu


class Target(NamedTuple):
    """A device that kernels can be launched on."""

    gpu: Gpu
    guard: Callable[[], AbstractContextManager[Any]]
    """Makes the device the current one."""
    stream: Callable[[], int]
    """Returns the current stream, as a number."""
    capturing: Callable[[], bool]
    """Returns whether that stream is being captured into a graph."""


class Frame:
    """The part of a launch that all calls of one layout share.

    It keeps the compiled kernels of its launches and launches them again itself: to find them by all arguments, as
    Triton does, takes longer than a short kernel runs. Which kernel Triton compiles depends on the device, on settings
    of Triton's, on the dtype and alignment of every tensor and on the value of every int. Floats do not matter. Global
    variables that a kernel reads are constants, so it is not checked again whether they have changed.
    """

    def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, int]) -> None:
        self.kernel = kernel
        self.programs = programs
        """The size of the one-dimensional grid."""
        self.arguments = arguments
        """All arguments but those that differ from call to call: the tensors and the scales."""
        self.options = options
        names = kernel.arg_names
        self._values = [arguments.get(name) for name in names]
        self._others = [(place, name) for place, name in enumerate(names) if name not in arguments]
        self._kept: dict[tuple[Any, ...], Any] = {}

    def launch(self, **others: Any) -> Launch:
        """Return the launch with the other arguments."""
        return Launch(self, others)

    def run(self, **others: Any) -> None:
        """Launch with the other arguments on the current device and stream, or do nothing where the grid is empty."""
        if not self.programs:
            return
        settings = knobs.runtime
        variant = [settings.debug, knobs.compilation.instrumentation_mode]
        values = self._values.copy()
        for place, name in self._others:
            values[place] = _lowered(others[name], variant)
        if self._kept and not self.kernel.pre_run_hooks and settings.add_stages_inspection_hook is None:
            gpu = driver.active
            device = gpu.get_current_device()
            kept = self._kept.get((device, *variant))
            if kept is not None:
                _launch(kept, self.programs, gpu.get_current_stream(device), values)
                return
        kept = self.kernel[(self.programs,)](**self.arguments, **others, **self.options)
        if kept is not None:  # Triton's interpreter returns nothing, and has no device.
            self._kept[(driver.active.get_current_device(), *variant)] = kept


class Launch(NamedTuple):
    """``kernel[grid](**arguments, **options)``."""

    frame: Frame
    others: dict[str, Any]
    """The arguments that the frame lacks."""

    @property
    def kernel(self) -> Any:
        """The function that Triton compiles."""
        return self.frame.kernel

    @property
    def programs(self) -> int:
        """The size of the one-dimensional grid."""
        return self.frame.programs

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments, by name."""
        return self.frame.arguments | self.others

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        return self.frame.options

    def run(self) -> None:
        """Launch on the current device and stream, or do nothing where the grid is empty."""
        self.frame.run(**self.others)


def _launch(kernel: Any, programs: int, stream: int, values: list[Any]) -> None:
    """Launch a compiled kernel, with its arguments in their order."""
    if _calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook):
        kernel[(programs, 1, 1)](*values, stream=stream)
    else:  # This is what the other branch does, without looking for hooks.
        kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)


def _calls(hook: Any) -> bool:
    """Return whether a hook of Triton's, which may be a chain of hooks, calls anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _lowered(argument: Any, variant: list[Any]) -> Any:
    """Return an argument as a compiled kernel takes it: the address of a tensor, and all else as it is. Append to
    `variant` what a compiled kernel depends on."""
    if isinstance(argument, tuple):
        values = []
        for each in argument:
            values.append(_lowered(each, variant))
        return tuple(values)
    if isinstance(argument, float):
        return argument
    if isinstance(argument, Tensor):  # This test takes long for an argument that is no tensor, so it comes late.
        address = argument.data_ptr()
        variant += argument.dtype, address % 16 == 0
        return address
    if isinstance(argument, int):
        variant.append(argument)
    elif isinstance(argument, TensorDescriptor):
        variant.append(argument.base.dtype)
    else:
        assert isinstance(argument, tl.constexpr)
        variant.append(argument.value)
    return argument


def find_target(device: torch.device) -> Target | None:
    """Return the target of tensors on `device`, or None where Triton cannot serve it. The driver is asked once per
    device."""
    if device not in TARGETS and device.type == "cuda" and torch.cuda.is_available():
        TARGETS[device] = _query(device)
    return TARGETS.get(device)


TARGETS: dict[torch.device, Target] = {}
"""The targets found so far, by device."""


def _query(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Target(
        Gpu(arch, properties.multi_processor_count, device),
        guard=functools.partial(current, device),
        stream=lambda: torch.cuda.current_stream(device).cuda_stream,
        capturing=torch.cuda.is_current_stream_capturing,
    )


def workspace(device: torch.device, target: Target, counters: int, floats: int) -> memory.Workspace:
    """Return the memory of a launch on the current stream: `counters` int32 zeros, and room for `floats` fp32 partial
    sums."""
    return memory.workspace(device, target.stream(), target.capturing(), counters, floats)


def cdiv(n: int, d: int) -> int:
    """Return n / d, rounded up."""
    return -(-n // d)
