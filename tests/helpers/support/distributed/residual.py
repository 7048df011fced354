"""ResLoRA in several processes: DDP and FSDP2 compute what one process computes, and what cannot be right is
refused."""

from __future__ import annotations

from pathlib import Path

import torch
from support.distributed.models import NO_FSDP, Net, batch, check, equal, mine, shard, step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import apply_reslora
from lora_kernels.nn.parallel import ColwiseLoRA

STRUCTURES = ("bs", "is", "ms")


def made(structure: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    apply_reslora(model, structure, r=3, exclude_modules=["head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model.train()


def single(structure: str) -> dict[str, Tensor]:
    """Return what `step` gives in one process for the whole batch, with this process's rows of y."""
    want = step(made(structure), batch())
    return want | {"y": mine(want["y"])}


@check(*STRUCTURES, sizes=(2,))
def ddp_of_shortcuts(folder: Path, structure: str) -> None:
    equal(step(DistributedDataParallel(made(structure)), mine(batch())), single(structure))


@check(*STRUCTURES, sizes=(2,), why_not=NO_FSDP)
def fsdp2_of_shortcuts(folder: Path, structure: str) -> None:
    equal(step(fully_shard(made(structure)), mine(batch())), single(structure))


@check(sizes=(2,), why_not=NO_FSDP)
def fsdp2_of_each_block_is_refused_with_block_shortcuts(folder: Path) -> None:
    model = shard(made("bs"))
    try:
        model(mine(batch()))
    except ValueError as error:
        assert "of an earlier layer is sharded here" in str(error)
    else:
        raise AssertionError("nothing was raised")


@check("is", "ms", sizes=(2,), why_not=NO_FSDP)
def fsdp2_of_each_block_with_shortcuts_of_activations(folder: Path, structure: str) -> None:
    equal(step(shard(made(structure)), mine(batch())), single(structure))


@check(sizes=(2,))
def tensor_parallel_plans_are_refused_for_shortcuts(folder: Path) -> None:
    model = made("bs")
    try:
        parallelize_module(model.blocks[1], init_device_mesh("cpu", (2,)), {"up": ColwiseLoRA()})
    except TypeError as error:
        assert "would take the shortcuts from a layer" in str(error)
    else:
        raise AssertionError("nothing was raised")
