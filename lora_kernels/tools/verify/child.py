"""A process of `verify`: ``python -m lora_kernels.tools.verify.child JOB EVENTS``, a job in JSON and a file for its
events."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.tools.verify import judge_class, survey, times, tuning
from lora_kernels.tools.verify.cases import KernelClass
from lora_kernels.tools.verify.events import SLOW, Teller
from lora_kernels.tools.verify.subject import Setting, Size
from lora_kernels.tools.verify.times import Pass


def main(argv: Sequence[str]) -> int:
    """Do one job and return the exit status: 0 where it was done."""
    job: dict[str, Any] = json.loads(argv[0])
    tell = Teller(Path(argv[1]))
    tell.doing("start", SLOW)
    kind = job["kind"]
    if kind == "survey":
        settings = list(map(Setting.from_json, job["settings"]))
        survey.main(job["device"], settings, Setting.from_json(job["timed"]), _passes(job), job["most"], tell)
    else:
        device = torch.device(job["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if kind == "class":
            judge_class.main(device, KernelClass.from_json(job["class"]), tell)
        elif kind == "chosen":
            survey.chosen(device, Setting.from_json(job["timed"]), _passes(job), tell)
        elif kind == "times":
            timed = Setting.from_json(job["timed"])
            times.main(device, timed, _passes(job), job["rounds"], job["without"], _end(job), tell)
        else:
            timed, skipped = Setting.from_json(job["timed"]), [(key, plan) for key, plan in job["skipped"]]
            tuning.main(device, timed, _passes(job), job["rounds"], skipped, _end(job), tell)
    tell(end=True)
    return 0


def _passes(job: dict[str, Any]) -> list[Pass]:
    return [Pass(Size(*size), p, op) for size, p, op in job["passes"]]


def _end(job: dict[str, Any]) -> float:
    """Return when no further pass is begun, by the monotonic clock."""
    return float("inf") if job["seconds"] is None else time.monotonic() + job["seconds"]


def _end_with_the_parent(parent: int) -> None:
    """End this process once the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_parent, args=(json.loads(sys.argv[1])["parent"],), daemon=True).start()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # a device that was lost can fail in the end of a process as well
