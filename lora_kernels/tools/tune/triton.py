"""What ``tune`` measures of the Triton back-end: its plans, and how to run each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lora_kernels.backends.triton import device as devices
from lora_kernels.backends.triton import launch as launching
from lora_kernels.backends.triton import quant as quantised
from lora_kernels.plans import store as tuned
from lora_kernels.plans.tiles import Case, Plan
from lora_kernels.tools.tune.candidates import Size, candidates
from lora_kernels.tools.tune.measure import Operands, Setting, Way, Work

OPS = ("forward", "backward")


class TritonSubject:
    """`tune_measure.Subject` of the Triton back-end."""

    def __init__(self, target: devices.Target, setting: Setting) -> None:
        self.target, self.setting = target, setting

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the device the current one."""
        return self.target.guard()

    def works(self, sizes: Sequence[Size]) -> list[Work]:
        """Both passes of every size."""
        return [self._work(size, op) for size in sizes for op in OPS]

    def left_behind(self) -> str | None:
        """Flags or tickets in the workspace."""
        sync, _ = devices.workspace(self.setting.device, self.target, 0, 0)
        if not sync.any():
            return None
        sync.zero_()
        return "leaves flags or tickets in the workspace"

    def _work(self, size: Size, op: str) -> Work:
        on, what, (M, K, N, R) = self.target, self.setting, size
        case = Case(
            on.arch, what.dtype.itemsize, M, N, K, R, what.p > 0, True, on.multiprocessors,
            what.name, (what.dtype, what.adapter_dtype), what.w_format,
        )  # fmt: skip
        run = {"forward": self._forward, "backward": self._backward}[op]
        plans = candidates(op, case)
        key = tuned.key(op, what.dtype, what.adapter_dtype, M, N, K, R, what.p > 0, what.w_format)
        return Work(size, op, key, {name: Way(plan, functools.partial(run, plan)) for name, plan in plans.items()})

    def _forward(self, plan: Plan, operands: Operands, out: dict[str, Tensor]) -> None:
        q = operands.q
        w = quantised.as_planned(operands.w, plan, q.x.dtype)
        launching.forward_launch(
            self.target, plan, q.x, w, q.a, q.b, q.bias, out["y"], out["h"], q.scale, q.p, q.seed, True
        ).run()

    def _backward(self, plan: Plan, operands: Operands, out: dict[str, Tensor]) -> None:
        q = operands.q
        w = quantised.as_planned(operands.w, plan, q.dy.dtype)
        launching.backward_launch(
            self.target, plan, q.dy, q.x, w, q.a, q.b, operands.h,
            out["dx"], out["da"], out["db"], out["g"], q.scale, q.p, q.seed,
        ).run()  # fmt: skip
