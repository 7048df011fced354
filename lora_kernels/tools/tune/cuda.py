"""The sm_90a back-end as ``tune`` measures it: its plans, and how to run each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.cuda import launch
from lora_kernels.backends.cuda.launch import GradientBuffers
from lora_kernels.plans import store
from lora_kernels.plans.sm90 import BY_RULE, PLANS, Sm90Plan
from lora_kernels.tools.tune.subject import Device, Job, Operands, Setting, Size, Trial


class CudaSubject:
    """The `Subject` of the sm_90a back-end."""

    def __init__(self, device: torch.device, setting: Setting) -> None:
        self.setting, self.on = setting, Device(device, torch.cuda.get_device_name(device))

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one."""
        return torch.cuda.device(self.on.device)

    def jobs(self, sizes: Sequence[Size]) -> list[Job]:
        """Return both passes of every size."""
        return [self._job(size, op) for size in sizes for op in ("forward", "backward")]

    def left_behind(self) -> str | None:
        """Report counters that a launch left in the workspace, and zero them."""
        workspace = launch.workspace(self.on.device, 1, 1)
        if not workspace.counters.any():
            return None
        workspace.counters.zero_()
        return "leaves counters in the workspace"

    def _job(self, size: Size, op: str) -> Job:
        run = {"forward": self._forward, "backward": self._backward}[op]
        trials = {_describe(plan): Trial(plan, functools.partial(run, plan)) for plan in (BY_RULE, *PLANS)}
        return Job(size, op, store.sm90_key(op, self.setting.case(size)), trials)

    @staticmethod
    def _forward(plan: Sm90Plan, operands: Operands, out: dict[str, Tensor]) -> None:
        launch.launch_forward(plan, operands.q.x, operands.base, operands.adapter, out["y"], out["h"])

    @staticmethod
    def _backward(plan: Sm90Plan, operands: Operands, out: dict[str, Tensor]) -> None:
        q, gradients = operands.q, GradientBuffers(out["dx"], out["da"], out["db"])
        launch.launch_backward(plan, q.dy, q.x, operands.base, operands.adapter, operands.h, gradients)


def _describe(plan: Sm90Plan) -> str:
    """Return a plan in words. "by rule" may launch the same kernel as another plan; only it reaches the decode
    kernel."""
    return "by rule" if plan == BY_RULE else f"{plan.columns} columns, cluster of {plan.cluster}"
