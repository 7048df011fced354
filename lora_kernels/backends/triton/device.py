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

    It keeps the compiled kernel of its first launch, and launches that again without Triton's search by all arguments,
    which takes most of the time of a short call. A kernel depends on the alignment and dtypes of the tensors, on the
    value of every int, on the device and on Triton's settings, so there is one for each of these (`_Variant`).
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
        gpu, settings = driver.active, knobs.runtime
        device = gpu.get_current_device()
        variant = [device, settings.debug, knobs.compilation.instrumentation_mode]
        values = self._values.copy()
        for place, name in self._others:
            values[place] = _lowered(others[name], variant)
        key = tuple(variant)
        kept = self._kept.get(key)
        if kept is None or self.kernel.pre_run_hooks or settings.add_stages_inspection_hook is not None:
            # This returns the kernel that Triton chose and launched, or None in its interpreter.
            kept = self.kernel[(self.programs,)](**self.arguments, **others, **self.options)
            if kept is not None:
                self._kept[key] = kept
            return
        stream = gpu.get_current_stream(device)
        if _silent(settings.launch_enter_hook) and _silent(settings.launch_exit_hook):
            kept.run(self.programs, 1, 1, stream, kept.function, kept.packed_metadata, None, None, None, *values)
        else:
            kept[(self.programs, 1, 1)](*values, stream=stream)


class Launch(NamedTuple):
    """``kernel[grid](**arguments, **options)``."""

    frame: Frame
    others: dict[str, Any]
    """The arguments that the frame lacks."""

    @property
    def kernel(self) -> Any:
        return self.frame.kernel

    @property
    def programs(self) -> int:
        return self.frame.programs

    @property
    def arguments(self) -> dict[str, Any]:
        return self.frame.arguments | self.others

    @property
    def options(self) -> dict[str, int]:
        return self.frame.options

    def run(self) -> None:
        """Launch on the current device and stream, or do nothing where the grid is empty."""
        self.frame.run(**self.others)


def _silent(hook: Any) -> bool:
    """Return whether a hook of Triton's, which may be a chain of hooks, calls nothing."""
    return hook is None or not getattr(hook, "calls", True)


def _lowered(argument: Any, variant: list[Any]) -> Any:
    """Return an argument as a compiled kernel takes it: the address of a tensor, and all else as it is. Append to
    `variant` what a compiled kernel depends on."""
    if isinstance(argument, Tensor):
        address = argument.data_ptr()
        variant += argument.dtype, address % 16 == 0
        return address
    if isinstance(argument, tuple):
        return tuple([_lowered(each, variant) for each in argument])
    if isinstance(argument, int):
        variant.append(argument)
    elif isinstance(argument, TensorDescriptor):
        variant.append(argument.base.dtype)
    elif isinstance(argument, tl.constexpr):
        variant.append(argument.value)
    else:
        assert isinstance(argument, float)
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
        Gpu(arch, properties.multi_processor_count, properties.name),
        guard=functools.partial(torch.cuda.device, device),
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
