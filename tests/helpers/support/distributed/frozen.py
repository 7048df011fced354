"""LoRA-FA and LoRA+ under DDP and FSDP2 compute what one process computes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from support.distributed.models import KINDS, NO_FSDP, batch, check, equal, loss, make, mine, shard, trained, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_kernels.models.pairs import pairs
from lora_kernels.train import freeze_a, loraplus_groups


def accumulated(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of two backwards, gathered from all shards."""
    for part in x.chunk(2):
        (loss(model(part)) / 2).backward()
    return {name: whole(p.grad) for name, p in trained(model).items()}


def other_a(model: nn.Module) -> None:
    """Double every A."""
    with torch.no_grad():
        for pair in pairs(model):
            pair.a.mul_(2)


def alone(kind: str, change: bool = False) -> dict[str, Tensor]:
    """Return what one process computes for the whole batch, in the order of the processes' parts."""
    model = make(kind)
    freeze_a(model)
    if change:
        other_a(model)
    size = dist.get_world_size()
    halves = [torch.cat([part.chunk(2)[i] for part in batch().chunk(size)]) for i in range(2)]
    return accumulated(model, torch.cat(halves))


@check(*KINDS, sizes=(2,))
def ddp_with_frozen_a(folder: Path, kind: str) -> None:
    model = make(kind)
    freeze_a(model)
    equal(accumulated(DistributedDataParallel(model), mine(batch())), alone(kind))


@check(*KINDS, sizes=(2,), why_not=NO_FSDP)
def fsdp_after_freezing_a(folder: Path, kind: str) -> None:
    """The hooks go over to the whole parameters that FSDP2 makes, and notice values that are written to its shards."""
    model = make(kind)
    freeze_a(model)
    shard(model)
    equal(accumulated(model, mine(batch())), alone(kind))
    model.zero_grad()
    other_a(model)
    equal(accumulated(model, mine(batch())), alone(kind, change=True))


@check(*KINDS, sizes=(2,), why_not=NO_FSDP)
def fsdp_before_freezing_a(folder: Path, kind: str) -> None:
    model = fully_shard(make(kind))  # one unit, which is the model
    freeze_a(model)
    equal(accumulated(model, mine(batch())), alone(kind))
    model.zero_grad()
    other_a(model)
    equal(accumulated(model, mine(batch())), alone(kind, change=True))


@check(sizes=(2,), why_not=NO_FSDP)
def loraplus_in_wrappers(folder: Path) -> None:
    """The groups hold the parameters that the wrapped model has."""
    want = {group["name"]: len(group["params"]) for group in loraplus_groups(make("module"), 0.1, 4.0)}
    for model in (DistributedDataParallel(make("module")), shard(make("module"))):
        groups = loraplus_groups(model, 0.1, 4.0)
        assert {group["name"]: len(group["params"]) for group in groups} == want
        own = {id(p) for p in model.parameters()}
        assert all(id(p) in own for group in groups for p in group["params"])
        before = {name: whole(p).clone() for name, p in trained(model).items()}
        optimizer = torch.optim.SGD(groups, foreach=False)
        loss(model(mine(batch()))).backward()
        optimizer.step()
        for name, p in trained(model).items():
            rate = 0.4 if "lora_B" in name else 0.1
            torch.testing.assert_close(whole(p), before[name] - rate * whole(p.grad))
