"""Launches of Triton kernels that the package does not make."""

from __future__ import annotations

from lora_kernels.backends.triton.device import Frame, Launch


def changed(launch: Launch, programs: int | None = None, **options: int) -> Launch:
    """Return a launch with another number of programs, or other options of the compiler."""
    programs = launch.programs if programs is None else programs
    frame = Frame(launch.kernel, programs, launch.frame.arguments, launch.options | options)
    return frame.launch(**launch.others)
