"""The jobs of processes that ask, and run no kernel of ours: which GPUs there are, and what is chosen on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from lora_kernels.backends import dispatch
from lora_kernels.evidence import find as evidence
from lora_kernels.evidence import identity
from lora_kernels.tools.verify.cases import PASSES, back_ends, kernel_classes
from lora_kernels.tools.verify.events import Teller
from lora_kernels.tools.verify.subject import Setting, Size
from lora_kernels.tools.verify.times import Pass


def main(
    name: str | None,
    settings: Sequence[Setting],
    timed: Setting,
    passes: Sequence[Pass],
    most: int,
    tell: Teller,
) -> None:
    """Tell about the device called `name`, or about every kind of GPU of this machine: its identity, the evidence that
    holds there, and the classes of kernels that it could run."""
    for device in _devices(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is among what was found
            found = evidence.found(device)
        layers = list(dict.fromkeys((each.size, each.p) for each in passes))
        classes = kernel_classes(device, settings, layers, most)
        unmeasured = [
            str(each)
            for each in passes
            if evidence.nearest(timed._replace(p=each.p).call(each.op, device, each.size)) is None
        ]
        tell(
            survey={
                "device": str(device),
                "identity": found.evidence.identity._asdict(),
                "verdicts": list(found.evidence.verdicts),
                "unmeasured": unmeasured,
                "used": list(map(str, found.used)),
                "passed": [(str(place.path), place.why) for place in found.passed],
                "classes": [each.to_json() for each in classes],
                "refusals": _refusals(device, timed),
            }
        )


def chosen(device: torch.device, timed: Setting, passes: Iterable[Pass], tell: Teller) -> None:
    """Tell which back-end the automatic choice takes for every pass."""
    for each in passes:
        call = timed._replace(p=each.p).call(each.op, device, each.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = dispatch.automatic(call)
        tell(chosen=[str(each), name])


def _devices(name: str | None) -> list[torch.device]:
    """Return the device called `name`, or every kind of GPU of this machine once."""
    found = _all_devices()
    if name is not None:
        device = torch.device(name)
        return [each for each in found if each == device or (device.index is None and each.type == device.type)][:1]
    kinds: dict[tuple[str, int], torch.device] = {}
    for device in found:
        here = identity.identify(device)
        kinds.setdefault((here.device, here.multiprocessors), device)
    return list(kinds.values())


def _all_devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _refusals(device: torch.device, setting: Setting) -> dict[str, list[str]]:
    """Return why back-ends cannot serve a layer on the device in either pass."""
    calls = [setting.call(op, device, Size(512, 1024, 1024, 16)) for op in PASSES]
    told = {name: [dispatch.refusals(name, call) for call in calls] for name in back_ends(device)}
    return {
        name: list(dict.fromkeys(forward + backward))
        for name, (forward, backward) in told.items()
        if forward and backward
    }
