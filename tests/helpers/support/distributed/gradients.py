"""LoRA-GA in several processes: the mean is over the batches of all of them, and they get one adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from support.distributed.models import K, Net, check
from torch import Tensor, nn

from lora_kernels.train import lora_ga


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()


@check(sizes=(2,))
def lora_ga_takes_the_batches_of_all_ranks(folder: Path) -> None:
    torch.manual_seed(0)
    model, batches = Net(), [torch.randn(12, K) for _ in range(5)]
    start = {"r": 3, "target_modules": ["blocks.0.up", "blocks.0.down", "blocks.1.up"]}
    rank, size = dist.get_rank(), dist.get_world_size()
    dist_model = copy.deepcopy(model)
    own = batches[:3] if rank == 0 else batches[3:]  # unequal shares
    lora_ga(dist_model, own, _loss, memory=8 * 24 * 40, **start)
    for name, value in dist_model.state_dict().items():
        every = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(every, value.contiguous())
        assert all(torch.equal(each, value) for each in every), f"{name} differs between the ranks"
    # Every rank gives all batches here, so the mean over the ranks is that of one process.
    lora_ga(model, batches, _loss, **start)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(dist_model.state_dict()[name], value, rtol=1e-3, atol=1e-3)


@check(sizes=(2,))
def lora_ga_counts_a_layer_that_only_one_rank_reaches(folder: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleList([nn.Linear(K, K), nn.Linear(K, K)]), torch.randn(12, K)

    def loss(model: nn.Module, i: int) -> Tensor:
        return model[i](x).square().mean()

    lora_ga(model, [dist.get_rank()], loss, r=2)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        dist.broadcast(parameter.data, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert model[0].lora_A.abs().sum() > 0 and model[1].lora_A.abs().sum() > 0
