"""The job of a process that judges one class of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_kernels.backends import dispatch
from lora_kernels.evidence import file
from lora_kernels.evidence import find as evidence
from lora_kernels.plans.sm90 import BY_RULE, may_cluster
from lora_kernels.tools.verify import experts, judging, many
from lora_kernels.tools.verify.cases import KernelClass
from lora_kernels.tools.verify.events import SLOW, Teller
from lora_kernels.tools.verify.subject import Operands, Run, Size, run_of


def main(device: torch.device, each: KernelClass, tell: Teller) -> None:
    """Run a class of kernels and tell the verdict. Where the GPU's memory does not suffice, tell only a note."""
    result, why = file.RIGHT, ""
    try:
        for size, p in each.cases:
            if failed := _judge(device, each, size, p, tell):
                result, why = file.BROKEN if failed.raised else file.WRONG, f"{size}: {failed.why}"
                break
    except judging.DeviceLost as error:
        result, why = file.BROKEN, str(error)
    except torch.OutOfMemoryError:
        tell(note=f"{each.key}: not judged, because the GPU has too little free memory")
        return
    tell(verdict={"key": each.key, "result": result, "why": why})


def _judge(device: torch.device, each: KernelClass, size: Size, p: float, tell: Teller) -> judging.Failed | None:
    where = f"{size} p={p:g}"
    tell.doing(f"{where}: prepare", SLOW)
    operands: Operands
    by: judging.ByStandard
    if each.op in many.PASSES:
        operands = many.ManyOperands(each.setting._replace(p=p), size, device, 0)
        by = many.standard(operands)
    elif each.op in experts.PASSES:
        operands = experts.ExpertsOperands(each.setting._replace(p=p), size, device, 0)
        by = experts.standard(operands)
    else:
        operands = Operands(each.setting._replace(p=p), size, device, 0)
        by = judging.standard(operands)
    for name, run in _runs(device, each, size):

        def doing(what: str, limit: str, name: str = name) -> None:
            tell.doing(f"{where}: {name}{what}", limit, blame=True)

        if failed := judging.fault(each.op, run, operands, by, doing):
            return failed._replace(why=name + failed.why)
    return None


def _runs(device: torch.device, each: KernelClass, size: Size) -> Iterator[tuple[str, Run]]:
    """Yield the ways to run a pass that the class is judged by, each with a prefix that names it."""
    if not each.plans:
        kind = many if each.op in many.PASSES else experts
        make = kind.run_of if each.op in kind.PASSES else run_of
        yield "", make(dispatch.load(each.backend), each.op)
        return
    from lora_kernels.tools.verify import cuda

    M, K, N, _ = size
    for plan in each.plans:
        by_rule = plan == BY_RULE
        if by_rule and may_cluster(each.op, M, N, K, evidence.of(device).identity.multiprocessors):
            continue  # clusters are a class of their own
        yield f"{cuda.describe(plan)}: ", cuda.trial(each.op, plan).run
