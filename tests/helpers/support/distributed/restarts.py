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
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

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


def around_a_restart(model: nn.Module, x: Tensor, how: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the weights and moments after a step and a restart, and the weights after one step more."""
    optimise = optimizer(model)
    loss(model(x)).backward()
    optimise.step()
    optimise.zero_grad()
    with torch.no_grad():
        model(x)  # FSDP2 holds whole parameters of the outermost part after a forward without a backward
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the base weights have changed")
        report = restart(model, optimise, prune=0.9, how=how, generator=generator)
    lost = torch.tensor([layer.lost for layer in report.layers] + [layer.update for layer in report.layers])
    got = values(model) | moments(model, optimise) | {"report": torch.cat([lost, torch.tensor([report.zeros])])}
    loss(model(x)).backward()
    optimise.step()
    return got | {f"{name} later": value for name, value in values(model).items()}


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


def alone(kind: str, how: str) -> dict[str, Tensor]:
    """Return what one process does, which takes part in no collective."""
    before = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        return around_a_restart(make(kind), batch(), how)
    finally:
        dist.is_initialized = before


@check(*KINDS, sizes=(2,))
def ddp_restarts(folder: Path, kind: str) -> None:
    """The generators of the processes differ, and that of process 0 counts."""
    for how in ("magnitude", "random"):
        got = around_a_restart(DistributedDataParallel(make(kind)), mine(batch()), how, seed=dist.get_rank())
        alike(got)
        close(got, alone(kind, how))


@check(sizes=(2,))
def states_of_zero_1_are_pruned_where_they_are(folder: Path) -> None:
    model = DistributedDataParallel(make("module"))
    optimise = ZeroRedundancyOptimizer(list(trained(model).values()), torch.optim.AdamW, lr=0.05)
    loss(model(mine(batch()))).backward()
    optimise.step()
    report = restart(model, optimise, prune=1.0)
    held = [optimise.optim.state[p] for pair in pairs(model) for p in (pair.a, pair.b) if p in optimise.optim.state]
    assert 0 < len(held) < 8 and report.moments == sum(2 * state["exp_avg"].numel() for state in held)
    assert not any(state[key].any() for state in held for key in ("exp_avg", "exp_avg_sq"))
    alike(values(model))


@check(*KINDS, sizes=(2,), why_not=NO_FSDP)
def fsdp_restarts(folder: Path, kind: str) -> None:
    """Each process adds to its rows of W."""
    for how in ("magnitude", "random"):
        got = around_a_restart(shard(make(kind)), mine(batch()), how, seed=dist.get_rank())
        alike(got)
        close(got, alone(kind, how))


@check(sizes=(2,))
def tensor_parallel_restarts(folder: Path) -> None:
    """W of the first layer is divided by rows and W of the second by columns, into parts of 22 and 21."""
    model = parallelize_module(tensor_parallel_block(43, False), mesh_of(2), PLAN)
    plain = tensor_parallel_block(43, False)
    want = plain.up.weight + plain.up.scaling * plain.up.lora_B @ plain.up.lora_A
    y = plain(batch())
    report = restart(model)
    torch.testing.assert_close(whole(model.up.weight), want.detach())
    torch.testing.assert_close(model(batch()), y)
    assert not whole(model.down.lora_B).any() and whole(model.down.lora_A).all()
    assert all(0 < layer.lost < 1e-6 for layer in report.layers)
    alike(values(model))


@check(sizes=(2,))
def all_refuse_what_one_refuses(folder: Path) -> None:
    model = make("module")
    if dist.get_rank() == 1:
        with torch.no_grad():
            pairs(model)[0].b[0, 0] = torch.nan
    before = copy.deepcopy(values(model))
    said = ""
    try:
        restart(model)
    except ValueError as error:
        said = str(error)
    assert ("is not finite" if dist.get_rank() else "another process has refused") in said, said
    after = values(model)
    assert all(torch.equal(after[name].nan_to_num(7), value.nan_to_num(7)) for name, value in before.items())


@check(sizes=(2,), why_not=NO_FSDP)
def masters_are_of_the_parts(folder: Path) -> None:
    model = shard(make("module").bfloat16())
    whole_model, master, whole_master = make("module").bfloat16(), {}, {}
    for one, kept in ((model, master), (whole_model, whole_master)):
        for seed in range(2):
            restart(one, master=kept, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                for pair in pairs(one):
                    pair.b.fill_(1e-3)
    for name, value in values(whole_model).items():
        assert torch.equal(values(model)[name], value), name
    for name, copy_of in whole_master.items():
        assert torch.equal(master[name], copy_of.chunk(2, 1)[dist.get_rank()]), name
