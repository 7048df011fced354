"""Checks of layers that share A and B: the gradients of the shared matrices are the sums over layers and processes."""

from __future__ import annotations

from pathlib import Path

import torch
from support.distributed.models import (
    NO_FSDP,
    Net,
    batch,
    blocks,
    check,
    equal,
    loss,
    mine,
    shard,
    step,
    trained,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lora_kernels

KINDS = ("vera", "tied", "tied checkpointed")


def make_shared(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    rules = {"target_modules": ["up", "down"], "r": 4}
    if kind == "vera":
        lora_kernels.apply_vera(net, **rules)
    else:
        lora_kernels.apply_tied_lora(net, **rules)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.requires_grad:
                p.normal_(0, 0.5 if "lora_" in name else 0.1)
    net.head.requires_grad_()
    for block in blocks(net):
        block.checkpointed = "checkpointed" in kind
    return net.train()


def single_shared(kind: str) -> dict[str, Tensor]:
    want = step(make_shared(kind), batch())
    return want | {"y": mine(want["y"])}


@check(*KINDS, sizes=(2,))
def shared_ddp(folder: Path, kind: str) -> None:
    for static in (False, True):
        model = DistributedDataParallel(make_shared(kind), static_graph=static)
        equal(step(model, mine(batch())), single_shared(kind))


@check(*KINDS, sizes=(2,), why_not=NO_FSDP)
def shared_fsdp(folder: Path, kind: str) -> None:
    """The factors lie in the group of the root, which is whole while every block runs."""
    model = shard(make_shared(kind))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    equal(step(model, mine(batch())), single_shared(kind))


@check(sizes=(2,), why_not=NO_FSDP)
def shared_state_of_a_sharded_model_goes_into_a_whole_one(folder: Path) -> None:
    model = shard(make_shared("tied"))
    loss(model(mine(batch()))).backward()
    with torch.no_grad():
        for p in trained(model).values():
            p -= 0.1 * p.grad
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = make_shared("tied")
    if state:  # the first process has it
        plain.load_state_dict(state)
        assert torch.equal(plain.lora_shared.lora_A, state["lora_shared.lora_A"])
    refused = ""
    try:
        lora_kernels.save_adapter(model, folder / "sharded")
    except ValueError as error:
        refused = str(error)
    assert "sharded, flattened or without values" in refused and "get_model_state_dict" in refused
    assert whole(model.lora_shared.lora_A).shape == plain.lora_shared.lora_A.shape
