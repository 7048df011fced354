"""The plans of the sm_90a back-end as `verify` runs them, and how to run each."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.cuda import launch
from lora_kernels.backends.cuda.launch import GradientBuffers
from lora_kernels.plans import choose, store
from lora_kernels.plans.sm90 import BY_RULE, PLANS, Sm90Plan
from lora_kernels.tools.verify.subject import Job, Operands, Setting, Size, Trial


class CudaSubject:
    """The `Subject` of the sm_90a back-end."""

    def __init__(self, device: torch.device, setting: Setting) -> None:
        self.device, self.setting = device, setting

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one."""
        return torch.cuda.device(self.device)

    def job(self, size: Size, op: str) -> Job:
        """Return a pass of a size, with every plan that may run here."""
        case = self.setting.case(size)
        plans = [plan for plan in (BY_RULE, *PLANS) if choose.sm90_may_run(plan, op, case, self.device)]
        return Job(size, op, store.sm90_key(op, case), {describe(plan): trial(op, plan) for plan in plans})


def trial(op: str, plan: Sm90Plan) -> Trial:
    """Return how a pass runs by a plan."""
    return Trial(plan, functools.partial({"forward": _forward, "backward": _backward}[op], plan))


def _forward(plan: Sm90Plan, operands: Operands, out: dict[str, Tensor]) -> None:
    launch.launch_forward(plan, operands.q.x, operands.base, operands.adapter, out["y"], out["h"])


def _backward(plan: Sm90Plan, operands: Operands, out: dict[str, Tensor]) -> None:
    q, gradients = operands.q, GradientBuffers(out["dx"], out["da"], out["db"])
    launch.launch_backward(plan, q.dy, q.x, operands.base, operands.adapter, operands.h, gradients)


def describe(plan: Sm90Plan) -> str:
    """Return a plan in words. "by rule" may launch the same kernel as another plan; only it reaches the decode
    kernel."""
    return "by rule" if plan == BY_RULE else f"{plan.columns} columns, cluster of {plan.cluster}"
