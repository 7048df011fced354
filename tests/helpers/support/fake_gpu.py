"""A GPU that is played by the CPU: the evidence decides about CPU tensors, and the back-ends are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.backends import dispatch, eager, proven
from lora_kernels.core.operands import Call
from lora_kernels.evidence import find, identity
from lora_kernels.evidence.identity import Identity

CPU = torch.device("cpu")
IDENTITY = Identity("Fake GPU", "sm_90", 132, "580.65", torch.__version__, "3.7.1", "12.8", "abc", None)


class _Module(SimpleNamespace):
    """Like a module, it can be an element of a set."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def backend(
    name: str, forward: Callable[..., Any] = eager.forward, backward: Callable[..., Any] = eager.backward
) -> Any:
    """Return a back-end that serves every call and counts its forwards."""
    module = _Module(name=name, why_not=lambda call: [], kernel_class=lambda call: "r16", backward=backward)
    module.calls = 0

    def counted(*args: Any) -> Any:
        module.calls += 1
        return forward(*args)

    module.forward = counted
    module.forward_multi, module.backward_multi = eager.forward_multi, eager.backward_multi
    return module


@contextlib.contextmanager
def fake_gpu(home: Path, *modules: Any, here: Identity = IDENTITY) -> Iterator[None]:
    """Make the CPU a GPU that `modules` and `eager` serve, with `home` as the user's cache."""
    named = {module.name: module for module in modules} | {"eager": eager}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.delenv(find.VARIABLE, raising=False)
        patch.delenv("RANK", raising=False)
        patch.setattr(identity, "identify", lambda device: here)
        patch.setattr(dispatch, "BY_EVIDENCE", {"cpu"})
        patch.setattr(dispatch, "load", lambda name: named[name])
        patch.setitem(dispatch.AUTOMATIC, "cpu", tuple(named))
        patch.setattr(proven, "_told", False)
        restart()
        yield
    restart()


def restart() -> None:
    """Forget what a process remembers, as if it were started anew."""
    find.forget()
    dispatch.cache_clear()


def call(op: str = "forward", M: int = 4096, **changes: Any) -> Call:
    """Return a call of a layer on the fake GPU."""
    return Call(op, CPU, torch.bfloat16, torch.bfloat16, M, 4096, 4096, 16, False)._replace(**changes)
