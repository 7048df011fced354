"""The choice of the back-end that serves a call, by a table of device types, and the reasons against the others."""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from lora_kernels.core.operands import Call

AUTOMATIC: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
"""The order in which back-ends are tried, by device type. A device that is not in the table is served by `eager`."""

BACKENDS = ("cpu", "cuda", "triton", "eager")


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
    if name == "eager" and (call.dropout or call.w_format != "dense"):
        what = "the dropout mask is drawn" if call.w_format == "dense" else f"the {call.w_format} weight is dequantised"
        warnings.warn(
            f"no kernel is chosen for {call.dtype} on {call.device} here: {what} by torch operations, which is slow. "
            + _way_out(call),
            stacklevel=2,
        )
    return load(name)


@functools.lru_cache(maxsize=4096)
def automatic(call: Call) -> str:
    """Return the name of the automatic choice: the first back-end in the order of the call's device type that can serve
    the call. On a GPU it must also have been run on a GPU of this architecture."""
    for name in _order(call):
        if not _passed_over(name, call):
            return name
    raise ValueError(f"no back-end can serve this call ({_describe(call)})")


def load(name: str) -> ModuleType:
    """Return the module of a back-end. Raises ValueError for an unknown name, ImportError where something that the
    back-end needs is not installed."""
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}: one of {', '.join(map(repr, BACKENDS))}, or None for the automatic choice"
        )
    return importlib.import_module(f"lora_kernels.backends.{name}")


def refusals(name: str, call: Call) -> list[str]:
    """Return every reason why a back-end cannot serve `call`. That it could not be loaded is such a reason too."""
    try:
        module = load(name)
    except ImportError as error:
        return [f"could not be loaded: {error}"]
    return list(module.why_not(call))


@dataclass(frozen=True)
class Explanation:
    """The answer of `lora_kernels.explain`. ``str()`` of it is a short table."""

    call: Call
    """The description of the forward that was asked about."""
    forward: str
    """The back-end that runs the forward."""
    backward: str
    """The back-end that runs the backward."""
    passed_over: dict[str, list[str]]
    """Every other back-end, with every reason why it is not the choice for the forward or the backward."""

    def __str__(self) -> str:
        lines = [_describe(self.call), f"  forward   {self.forward}", f"  backward  {self.backward}"]
        for name, reasons in self.passed_over.items():
            lines += [f"  {name if i == 0 else '':<9} not chosen: {reason}" for i, reason in enumerate(reasons)]
        return "\n".join(lines)


def explain(call: Call, backend: str | None) -> Explanation:
    """Return which back-ends serve the forward and the backward of `call`, and why the others do not. Raises what
    `pick` raises."""
    calls = [call._replace(op=op) for op in ("forward", "backward")]
    chosen = [automatic(each) if backend is None else str(pick(each, backend).name) for each in calls]
    passed_over = {name: _why_not_chosen(name, calls, chosen[0], backend) for name in BACKENDS if name not in chosen}
    return Explanation(call, chosen[0], chosen[1], passed_over)


def _why_not_chosen(name: str, calls: list[Call], chosen: str, backend: str | None) -> list[str]:
    """Return why a back-end was chosen for none of `calls`, a forward and its backward. `chosen` serves the forward."""
    if backend is not None:
        return [f"backend={backend!r} was asked for by name"]
    device = calls[0].device.type
    if name not in _order(calls[0]):
        return [f"not for {device} tensors"]
    reasons = [reason for call in calls for reason in _passed_over(name, call)]
    return list(dict.fromkeys(reasons)) or [f"{chosen!r} comes first on {device}"]


def _order(call: Call) -> tuple[str, ...]:
    return AUTOMATIC.get(call.device.type, ("eager",))


def _passed_over(name: str, call: Call) -> list[str]:
    """Return why the automatic choice passes over a back-end: its refusals, or, on a GPU, the lack of a recorded run on
    this architecture."""
    reasons = refusals(name, call)
    if not reasons and call.device.type == "cuda" and name != "eager":
        arch = _arch(call.device)
        if arch not in load(name).EVIDENCE:
            reasons = [
                f"not yet run on a GPU of architecture {arch}: no evidence in benchmarks/results; "
                f"ask for it with backend={name!r}"
            ]
    return reasons


def _way_out(call: Call) -> str:
    """Return the last sentence of the warning that `eager` is slow: what the user can do."""
    able = [f"backend={name!r}" for name in _order(call) if name != "eager" and not refusals(name, call)]
    if able:
        return f"Ask for {' or '.join(able)}, which has not yet run on such a GPU"
    return "`python -m lora_kernels doctor` tells what is missing, and lora_kernels.explain(...) why the kernels refuse"


def _arch(device: torch.device) -> str:
    """Return the GPU's architecture: "sm_90", or AMD's name for it, "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _describe(call: Call) -> str:
    adapters = "" if call.adapter_dtype == call.dtype else f", {call.adapter_dtype} adapters"
    more = (f", {call.w_format} weight" if call.w_format != "dense" else "") + (", dropout" if call.dropout else "")
    return f"{call.op} on {call.device}, {call.dtype}{adapters}, M={call.M} N={call.N} K={call.K} R={call.R}{more}"
