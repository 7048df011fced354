"""Whether a pass of a back-end is right: the judge finds no fault, a second run gives the same bits, and nothing is
left where the next launch would find it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.backends import workspace
from lora_kernels.testing import judge
from lora_kernels.testing.watch import answers, first_line
from lora_kernels.tools.verify.events import RUN, SLOW
from lora_kernels.tools.verify.subject import Operands, Run

Doing = Callable[[str, str], None]
"""Called with the name and the limit of each step before it begins."""


class DeviceLost(RuntimeError):
    """The GPU no longer answers, as after an illegal access."""


class Failed(NamedTuple):
    """What is wrong with a pass."""

    why: str
    raised: bool
    """Whether it raised an error, rather than giving wrong results."""


class ByStandard(Protocol):
    """What the results of a pass are judged by."""

    def wrong(self, op: str, got: dict[str, Tensor]) -> str:
        """Return what is wrong with the results of a pass; "" for nothing."""


class Standard(NamedTuple):
    """What the results of one layer are judged by, as `judge.judge` takes it."""

    q: judge.Problem
    want: dict[str, Tensor]
    plain: dict[str, Tensor]

    def wrong(self, op: str, got: dict[str, Tensor]) -> str:
        """Return what is wrong with the results of a pass; "" for nothing."""
        if op == "forward":  # h is judged by the db that it gives
            got["db"] = self.q.scale * (self.q.dy.double().t() @ got.pop("h").double())
        return "; ".join(verdict.fault for verdict in judge.judge(got, *self) if verdict.fault)


def standard(operands: Operands) -> Standard:
    """Return what both passes over some operands are judged by."""
    q, w = operands.q, operands.w
    q, plain = (q, judge.evaluate(q)) if isinstance(w, Tensor) else judge.over_codes(q, w)
    return Standard(q, judge.truth(q), plain)


def fault(op: str, run: Run, operands: Operands, by: ByStandard, doing: Doing) -> Failed | None:
    """Return what is wrong with a pass, or None. Raises DeviceLost where the GPU no longer answers after an error, and
    torch.OutOfMemoryError."""
    names = ("y", "h") if op.startswith("forward") else ("dx", "da", "db")
    runs = []
    for turn in ("first", "second"):
        out = operands.room()
        try:
            doing(f"{turn} {op}: compile and launch", SLOW)
            with _poison():
                run(operands, out)
            doing(f"{turn} {op}: wait for the kernels", RUN)
            synchronize(operands.q.x.device)
            doing(f"{turn} {op}: judge", SLOW)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler, a driver or a kernel may fail in any way
            why = f"{type(error).__name__}: {first_line(error)}"
            if not answers(operands.q.x.device):
                raise DeviceLost(f"the GPU no longer answers after {why}") from error
            workspace.clean()
            return Failed(why, True)
        if workspace.clean():
            return Failed("leaves counters in the workspace", False)
        runs.append({name: out[name] for name in names})
    first, second = runs
    if why := by.wrong(op, dict(first)) or _differing(first, second):
        return Failed(why, False)
    return None


@contextlib.contextmanager
def _poison() -> Iterator[None]:
    """Let torch fill every new allocation with NaN, which shows memory that is read before it is written, or is never
    written."""
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some of torch's own operations are not deterministic
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = True
            yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    return "; ".join(
        f"{name}: other bits in a second run" for name in first if not torch.equal(first[name], second[name])
    )
