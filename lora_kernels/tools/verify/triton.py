"""The plans of the Triton back-end as ``verify --tune`` measures them, and how to run each."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.triton import device as devices
from lora_kernels.backends.triton import launch as launching
from lora_kernels.backends.triton import quant as quantised
from lora_kernels.plans import store
from lora_kernels.plans.tiles import Plan
from lora_kernels.tools.verify.plans_to_try import plans_to_try
from lora_kernels.tools.verify.subject import Job, Operands, Setting, Size, Trial


class TritonSubject:
    """The `Subject` of the Triton back-end."""

    def __init__(self, device: torch.device, setting: Setting) -> None:
        target = devices.find_target(device)
        assert target is not None, "why_not has asked"
        self.target, self.setting = target, setting

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one."""
        return self.target.guard()

    def job(self, size: Size, op: str) -> Job:
        """Return a pass of a size, with the plans to try for it."""
        case = self.setting.case(size)
        run = {"forward": self._forward, "backward": self._backward}[op]
        plans = plans_to_try(op, case, self.target.gpu)
        trials = {name: Trial(plan, functools.partial(run, plan)) for name, plan in plans.items()}
        return Job(size, op, store.key(op, case), trials)

    def _forward(self, plan: Plan, operands: Operands, room: dict[str, Tensor]) -> None:
        x, base = operands.q.x, operands.base
        base = base._replace(w=quantised.as_planned(base.w, plan, x.dtype))
        out = launching.Outputs(room["y"], room["h"], save_h=True)
        launching.forward_launch(self.target, plan, x, base, operands.adapter, out).run()

    def _backward(self, plan: Plan, operands: Operands, room: dict[str, Tensor]) -> None:
        dy, base = operands.q.dy, operands.base
        base = base._replace(w=quantised.as_planned(base.w, plan, dy.dtype))
        saved = launching.Saved(operands.q.x, operands.h)
        out = launching.GradientBuffers(room["dx"], room["da"], room["db"], room["g"])
        launching.backward_launch(self.target, plan, dy, saved, base, operands.adapter, out).run()
