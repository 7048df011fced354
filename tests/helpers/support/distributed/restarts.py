"""A restart under DDP, FSDP2 and tensor parallel plans does what it does in one process, alike in all of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from support.distributed.models import KINDS, NO_FSDP, batch, check, loss, make, mine, optimizer, shard, trained, whole
from support.distributed.tensor import PLAN, mesh_of, tensor_parallel_block
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import FusedLoRALinear
from lora_kernels.models.pairs import pairs
from lora_kernels.train import restart


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p).clone() for name, p in model.named_parameters()}


def moments(model: nn.Module, optimise: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name} {key}": whole(value).clone()
        for name, p in trained(model).items()
        for key, value in optimise.state[p].items()
    }


def two_steps_around_a_restart(model: nn.Module, x: Tensor, how: str) -> dict[str, Tensor]:
    """Return the weights and moments after the restart, and the weights after one step more."""
    optimise = optimizer(model)
    loss(model(x)).backward()
    optimise.step()
    optimise.zero_grad()
    with torch.no_grad():
        model(x)  # FSDP2 holds whole parameters of the outermost part after a forward without a backward
    # Every process has random numbers of its own, and only those of process 0 count.
    generator = torch.Generator().manual_seed(dist.get_rank() if isinstance(model, Wrapped) else 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the base weights have changed")
        report = restart(model, optimise, prune=0.9, how=how, generator=generator)
    lost = torch.tensor([layer.lost for layer in report.layers] + [layer.update for layer in report.layers])
    got = values(model) | moments(model, optimise) | {"report": torch.cat([lost, torch.tensor([report.zeros])])}
    loss(model(x)).backward()
    optimise.step()
    return got | {f"{name} later": value for name, value in values(model).items()}


Wrapped = (DistributedDataParallel, nn.Module) if False else DistributedDataParallel


def alike(got: dict[str, Tensor]) -> None:
    """Check that every process has the same bits."""
    for name, value in got.items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), name


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
