"""What ``tune`` measures of the sm_90a back-end: its tilings, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends.cuda import launch
from lora_kernels.backends.cuda.launch import Gradients
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans.tilings import BY_RULE, TILINGS, Tiling, key
from lora_kernels.tools.tune.candidates import Size
from lora_kernels.tools.tune.measure import Operands, Setting, Way, Work


class CudaSubject:
    """`tune_measure.Subject` of the sm_90a back-end."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the device the current one."""
        return torch.cuda.device(self.setting.device)

    def works(self, sizes: Sequence[Size]) -> list[Work]:
        """Both passes of every size."""
        return [self._work(size, op) for size in sizes for op in ("forward", "backward")]

    def left_behind(self) -> str | None:
        """Counters in the workspace."""
        workspace = launch.workspace(self.setting.device, 1, 1)
        if not workspace.counters.any():
            return None
        workspace.counters.zero_()
        return "leaves counters in the workspace"

    def _work(self, size: Size, op: str) -> Work:
        what, (M, K, N, R) = self.setting, size
        run = {"forward": self._forward, "backward": self._backward}[op]
        ways = {_describe(tiling): Way(tiling, functools.partial(run, tiling)) for tiling in (BY_RULE, *TILINGS)}
        return Work(size, op, key(op, (what.dtype, what.adapter_dtype), M, N, K, R, what.p > 0), ways)

    @staticmethod
    def _forward(tiling: Tiling, operands: Operands, out: dict[str, Tensor]) -> None:
        q = operands.q
        base, adapter = Base(q.w, q.bias), Adapter(q.a, q.b, q.scale, q.p, q.seed)
        launch.launch_forward(tiling, q.x, base, adapter, out["y"], out["h"])

    @staticmethod
    def _backward(tiling: Tiling, operands: Operands, out: dict[str, Tensor]) -> None:
        q = operands.q
        base, adapter = Base(q.w), Adapter(q.a, q.b, q.scale, q.p, q.seed)
        gradients = Gradients(out["dx"], out["da"], out["db"])
        launch.launch_backward(tiling, q.dy, q.x, base, adapter, operands.h, gradients)


def _describe(tiling: Tiling) -> str:
    """The rule's own choice is among the others: a decode kernel is only there."""
    return "by rule" if tiling == BY_RULE else f"{tiling.columns} columns, cluster of {tiling.cluster}"
