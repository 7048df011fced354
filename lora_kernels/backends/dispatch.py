"""The choice of the back-end that serves a call, by a table of device types, and the reasons against the others."""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType

from lora_kernels.core.operands import Call

AUTOMATIC: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "eager"),
    "cuda": ("cuda", "triton", "composite", "eager"),
}
"""The back-ends of the automatic choice, by device type. On a CPU the first that can serve a call does. On a GPU the
evidence decides (`proven`). A device that is not in the table is served by `eager`."""

BY_EVIDENCE = {"cuda"}
"""The device types on which the automatic choice is made from evidence."""

BACKENDS = ("cpu", "cuda", "triton", "composite", "eager")


@functools.lru_cache(maxsize=4096)
def pick(call: Call, backend: str | None) -> ModuleType:
    """Return the back-end that serves `call`: the one named, or where `backend` is None the `automatic` one.

    Warns where the automatic choice is `eager` for something that it does slowly. Raises ValueError where a named
    back-end is unknown or refuses the call; another one never takes its place.
    """
    if backend is not None:
        reasons = refusals(backend, call)
        if reasons:
            raise ValueError(
                f"backend={backend!r} cannot serve this call ({_describe(call)}):\n"
                + "\n".join(f"  - {reason}" for reason in reasons)
                + "\nPass backend=None for the automatic choice, or see lora_kernels.explain(...)."
            )
        return load(backend)
    name = automatic(call)
    if name == "eager" and call.device.type == "cpu" and (missing := _unloadable("cpu")):
        if call.op.startswith("forward"):  # once is enough
            warnings.warn(f"LoRA runs on plain torch operations here, because {missing}", stacklevel=2)
    elif name == "eager" and (call.dropout or call.w_format != "dense"):
        what = "the dropout mask is drawn" if call.w_format == "dense" else f"the {call.w_format} weight is dequantised"
        warnings.warn(
            f"no kernel is chosen for {call.dtype} on {call.device} here: {what} by torch operations, which is slow. "
            "`python -m lora_kernels doctor` tells what is missing, and lora_kernels.explain(...) gives the reasons",
            stacklevel=2,
        )
    return load(name)


@functools.lru_cache(maxsize=4096)
def automatic(call: Call) -> str:
    """Return the name of the automatic choice: on a GPU the one that `proven.choose` makes, elsewhere the first
    back-end in the order of the call's device type that can serve the call."""
    able = [name for name in _order(call) if not refusals(name, call)]
    if call.device.type in BY_EVIDENCE:
        return _proven().choose(call, able, load).name
    return able[0]


def _proven() -> ModuleType:
    """Return the module that reads evidence. It is imported where a GPU asks, since it would take a quarter of the time
    in which the package is imported."""
    return importlib.import_module(f"{__package__}.proven")


def cache_clear() -> None:
    """Make the next call of every kind choose its back-end again, as after a change of the evidence."""
    pick.cache_clear()
    automatic.cache_clear()


def load(name: str) -> ModuleType:
    """Return the module of a back-end. Raises ValueError for an unknown name, ImportError where something that the
    back-end needs is not installed."""
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}: one of {', '.join(map(repr, BACKENDS))}, or None for the automatic choice"
        )
    return importlib.import_module(f"{__package__}.{name}")


def refusals(name: str, call: Call) -> list[str]:
    """Return every reason why a back-end cannot serve `call`. That it could not be loaded is such a reason too."""
    if why := _unloadable(name):
        return [f"could not be loaded: {why}"]
    return list(load(name).why_not(call))


def _unloadable(name: str) -> str:
    """Return why a back-end cannot be loaded, or "" where it can."""
    try:
        load(name)
    except ImportError as error:
        return str(error)
    except Exception as error:  # a package that is there and broken
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Explanation:
    """The answer of `lora_kernels.explain`. ``str()`` of it is a short table."""

    call: Call
    """The description of the forward that was asked about."""
    forward: str
    """The back-end that runs the forward."""
    backward: str
    """The back-end that runs the backward."""
    evidence: dict[str, str]
    """What is known here about the chosen back-ends, by pass, where the choice is automatic. On a CPU: which
    instruction set of the processor was not compiled, if one was not."""
    passed_over: dict[str, list[str]]
    """Every back-end that is not the choice for both passes, with every reason."""
    rows: str = ""
    """For many adapters: their ranks, and how many rows of x belong to each."""

    def __str__(self) -> str:
        lines = [_describe(self.call), *([f"  {self.rows}"] if self.rows else [])]
        for op, name in (("forward", self.forward), ("backward", self.backward)):
            lines.append(f"  {op:<8}  {name}" + (f": {self.evidence[op]}" if op in self.evidence else ""))
        for name, reasons in self.passed_over.items():
            lines += [f"  {name if i == 0 else '':<9} not chosen: {reason}" for i, reason in enumerate(reasons)]
        return "\n".join(lines)


def explain(call: Call, backend: str | None) -> Explanation:
    """Return which back-ends serve the forward and the backward of `call`, and why the others do not. Raises what
    `pick` raises."""
    kind = call.op.removeprefix("forward")  # "_multi" for many adapters
    calls = [call._replace(op=op + kind) for op in ("forward", "backward")]
    chosen = [automatic(each) if backend is None else str(pick(each, backend).name) for each in calls]
    known = [_known(each) if backend is None else {} for each in calls]
    passes = zip(("forward", "backward"), known, chosen, strict=True)
    evidence = {op: told[name] for op, told, name in passes if name in told}
    passed_over = {}
    for name in BACKENDS:
        others = [(each, told) for each, told, taken in zip(calls, known, chosen, strict=True) if taken != name]
        if not others:
            continue
        if backend is not None:
            reasons = [f"backend={backend!r} was asked for by name"]
        elif name not in _order(call):
            reasons = [f"not for {call.device.type} tensors"]
        else:
            reasons = [reason for each, told in others for reason in _reasons(name, each, told)]
        passed_over[name] = list(dict.fromkeys(reasons)) or [f"{chosen[0]!r} comes first on {call.device.type}"]
    return Explanation(call, chosen[0], chosen[1], evidence, passed_over)


def _reasons(name: str, call: Call, known: dict[str, str]) -> list[str]:
    """Return why a back-end was not chosen for a call: its refusals, or else what is known about it."""
    return refusals(name, call) or ([f"{call.op}: {known[name]}"] if name in known else [])


def _known(call: Call) -> dict[str, str]:
    """Return what is known about the back-ends for a call: on a GPU the evidence, on a CPU what its build lacks."""
    if call.device.type in BY_EVIDENCE:
        able = [name for name in _order(call) if not refusals(name, call)]
        return dict(_proven().choose(call, able, load).known)
    said = "" if call.device.type != "cpu" or _unloadable("cpu") else str(load("cpu").told())
    return {"cpu": said} if said else {}


def _order(call: Call) -> tuple[str, ...]:
    return AUTOMATIC.get(call.device.type, ("eager",))


def _describe(call: Call) -> str:
    adapters = "" if call.adapter_dtype == call.dtype else f", {call.adapter_dtype} adapters"
    more = (f", {call.w_format} weight" if call.w_format != "dense" else "") + (", dropout" if call.dropout else "")
    return f"{call.op} on {call.device}, {call.dtype}{adapters}, M≤{call.M} N={call.N} K={call.K} R={call.R}{more}"
