"""The check that switches the back-end `composite` on: at the first use of a class of its kernels on a device, their
results are compared with plain torch.

The kernels of `composite` wait for nothing, so a few calls of them are safe in any process. The check takes tens of
milliseconds beside the compilation of the kernels, which the call needs anyway. Its verdict is kept in the user's file
of evidence.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from lora_kernels.backends import first_use_problems as problems
from lora_kernels.core import accuracy
from lora_kernels.core.operands import Call, power_of_two
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import BROKEN, RIGHT, WRONG, Evidence, Verdict

_ROWS = (16, 64, 160)
"""The rows of x in the check: the first that are not fewer than those of the call, or the last."""
_ENOUGH = 1024
"""The independent roundings that `accuracy.errors_beside` needs."""


class NotNow(RuntimeError):
    """The check cannot be made, because the stream is being captured into a CUDA graph."""


def verdict(module: ModuleType, call: Call) -> Verdict:
    """Return the verdict on the class of kernels that a call runs, from the evidence, or else from the check, which
    this call then makes. Raises `NotNow` during a capture."""
    key = file.class_key(module.name, module.kernel_class(call), call)
    known = find.of(call.device).verdicts.get(key)
    if known is not None:
        return known
    if capturing():
        raise NotNow(
            f"the kernels of {module.name!r} are checked at their first use on a GPU, and this cannot be done while a "
            "CUDA graph is captured: call the layer once before the capture, or name a back-end "
            f"(backend={module.name!r})"
        )
    result = _check(module, call)
    if result.result != RIGHT:
        warnings.warn(
            f"{module.name!r} is not used for {key.partition(' ')[2]} on this GPU: its first use was {result.result} "
            f"({result.why}). Such calls go to 'eager'. Please report this; `python -m lora_kernels verify` runs these "
            "kernels again",
            RuntimeWarning,
            stacklevel=2,
        )
    new = Evidence(find.of(call.device).identity, {key: result})
    if _lasts(call.device, result):
        with contextlib.suppress(OSError):  # this process knows the verdict all the same
            find.add(call.device, new.verdicts)
    else:
        find.remember(call.device, new)
    return result


def capturing() -> bool:
    """Return whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _lasts(device: torch.device, result: Verdict) -> bool:
    """Return whether a verdict is for other processes too. One process of several that run together writes it. An error
    that leaves the device in use may have its cause in this process, such as a compiler that is missing."""
    if find.off() or os.environ.get("RANK", "0") != "0":
        return False
    return result.result != BROKEN or not _answers(device)


def _answers(device: torch.device) -> bool:
    """Return whether the device still computes."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def _check(module: ModuleType, call: Call) -> Verdict:
    """Run a pass of a back-end on small operands, and compare its results with those of plain torch."""
    M = next((rows for rows in _ROWS if rows >= call.M), _ROWS[-1])
    R = max(16, power_of_two(call.R))
    count = problems.calls(call, math.ceil(_ENOUGH / ((1 - problems.P) * M * R)))
    got: list[dict[str, Tensor]] = []
    want: list[dict[str, Tensor]] = []
    plain: list[dict[str, Tensor]] = []
    # Nothing that the caller has switched on may see the check or change it.
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.autocast(call.device.type, enabled=False),
        _no_saved_tensors_hooks(),
    ):
        try:
            for turn in range(count):
                problem = problems.problem(call, M, R, turn)
                want.append(problem.by_torch(torch.float64))
                plain.append(problem.by_torch())
                with torch.no_grad():
                    got.append(problem.by(module, call.op))
            faults = []
            for name in got[0]:
                value, exact, near = (torch.cat([each[name] for each in turns]) for turns in (got, want, plain))
                if fault := _fault(value, exact, near):
                    faults.append(f"{name}: {fault}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler or a driver may fail in any way
            first = (str(error).strip().splitlines() or ["no message"])[0]
            return Verdict(BROKEN, f"{type(error).__name__}: {first}", file.today())
    return Verdict(WRONG if faults else RIGHT, "; ".join(faults), file.today())


def _no_saved_tensors_hooks() -> AbstractContextManager[object]:
    """Return a context in which no hook of the caller's sees a saved tensor. Those of a checkpoint would count the
    tensors of the check among those of the layer. Only the innermost hooks are called, so these do nothing. Where torch
    forbids hooks, as it may in a compiled region, there are none."""
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return saved_tensors_hooks(lambda t: t, lambda t: t)
    return contextlib.nullcontext()


def _fault(value: Tensor, exact: Tensor, plain: Tensor) -> str | None:
    if not torch.isfinite(value).all():
        return "not finite"
    return accuracy.errors_beside(value, exact, plain).fault
