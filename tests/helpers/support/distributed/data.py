"""Data parallel checks: DDP and FSDP2 compute what one process computes, and sharded checkpoints can be resumed."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.distributed.models import (
    KINDS,
    NO_FSDP,
    R,
    adapters,
    average,
    batch,
    blocks,
    check,
    equal,
    fused_path_ran,
    loss,
    make,
    mine,
    optimizer,
    shard,
    single,
    step,
    trained,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_kernels import FusedLoRALinear


@check(*KINDS)
def ddp(folder: Path, kind: str) -> None:
    model = DistributedDataParallel(make(kind))
    equal(step(model, mine(batch())), single(kind))
    fused_path_ran(model, kind)


@check()
def ddp_draws_a_mask_per_process(folder: Path) -> None:
    x = torch.ones(4, 32)
    torch.manual_seed(0)
    layer = FusedLoRALinear(32, 8, r=R, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    model = DistributedDataParallel(layer)
    for seed, alike in ((dist.get_rank(), False), (7, True)):  # equal seeds give equal masks
        torch.manual_seed(seed)
        y = model(x).detach()
        everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, y)
        for i in range(1, len(everyone)):
            # The bits may differ, because each process times for itself which GEMM is the faster.
            assert torch.allclose(everyone[0], everyone[i], rtol=1e-4, atol=1e-4) == alike


@check(*KINDS, why_not=NO_FSDP)
def fsdp(folder: Path, kind: str) -> None:
    """Base, adapters and head are sharded. Frozen and trained parameters are in one group."""
    model = shard(make(kind))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    equal(step(model, mine(batch())), single(kind))
    fused_path_ran(model, kind)


@check(*KINDS, why_not=NO_FSDP)
def fsdp_with_replicated_adapters(folder: Path, kind: str) -> None:
    model = make(kind)
    ignored = adapters(model)
    shard(model, ignored)
    assert {isinstance(p, DTensor) for p in ignored} == {False}
    equal(step(model, mine(batch()), lambda: average(ignored)), single(kind))
    fused_path_ran(model, kind)


@check("module sharded", "module replicated", "peft sharded", "peft replicated", why_not=NO_FSDP)
def fsdp_in_bf16(folder: Path, kind: str) -> None:
    """In mixed precision the kernel sees sharded adapters in bf16, and replicated ones in fp32 beside a bf16 base."""
    kind, adapter = kind.split()
    model = make(kind)
    ignored = adapters(model) if adapter == "replicated" else []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, ignored, mp_policy=policy)
    y = model(mine(batch()))
    loss(y).backward()
    average(ignored)
    got = {"y": y.detach()} | {name: whole(p.grad) for name, p in trained(model).items()}
    fused_path_ran(model, kind)

    # One process computes the parts in turn, with parameters that are rounded as the policy rounds them.
    plain = make(kind)
    for p in plain.parameters():
        if adapter == "sharded" or not any(p is q for q in adapters(plain)):
            p.data = p.data.bfloat16()
    want: dict[str, Tensor] = {}
    for part in batch().chunk(dist.get_world_size()):
        plain.zero_grad()
        y = plain(part.bfloat16())
        loss(y).backward()
        if torch.equal(part, mine(batch())):
            want["y"] = y.detach()
        for name, p in trained(plain).items():
            want[name] = want.get(name, 0) + p.grad.float() / dist.get_world_size()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value)


@check("module", why_not=NO_FSDP)
def fsdp_of_a_bf16_base_with_fp32_adapters(folder: Path, kind: str) -> None:
    def build() -> nn.Module:
        model = make(kind).bfloat16()
        for p in adapters(model):
            p.data = p.data.float()
        for p in model.head.parameters():
            p.requires_grad_(False)
        return model

    model, x = shard(build()), batch().bfloat16()
    got, want = step(model, mine(x)), step(build(), x)
    assert torch.equal(got.pop("y"), mine(want.pop("y")))
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        if name.startswith("grad"):
            torch.testing.assert_close(got[name], value, rtol=0, atol=2**-6 * value.abs().max().item())


@check(*KINDS, why_not=NO_FSDP)
def fsdp_with_checkpointing_and_dropout(folder: Path, kind: str) -> None:
    """Each process has masks of its own, and the recomputation draws the same masks again."""
    model, plain = make(kind, 0.3), make(kind, 0.3)
    for block in blocks(model):
        block.checkpointed = True
    shard(model)
    torch.manual_seed(dist.get_rank())
    got = step(model, mine(batch()))
    torch.manual_seed(dist.get_rank())
    want = step(plain, mine(batch()), lambda: average(list(trained(plain).values())))
    equal(got, want)
    fused_path_ran(model, kind, 2)


def resumed(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that differs from the saved one, so that a parameter which is not loaded shows."""
    model = shard(make(kind))
    with torch.no_grad():
        for p in trained(model).values():
            p.fill_(0.5)
    return model, optimizer(model)


TRAINED = StateDictOptions(ignore_frozen_params=True)


def train(model: nn.Module, optimise: torch.optim.Optimizer, steps: int) -> Tensor:
    """Train for some steps on one batch, and return what the model then gives for it."""
    for _ in range(steps):
        loss(model(mine(batch()))).backward()
        optimise.step()
        optimise.zero_grad()
    with torch.no_grad():
        y = model(mine(batch()))
    everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, y)
    return torch.cat(everyone)


@check(*KINDS, sizes=(2,), why_not=NO_FSDP)
def save_sharded(folder: Path, kind: str) -> None:
    """Save the trained parameters alone, and all parameters with the optimizer, for the groups that run later."""
    model = shard(make(kind))
    optimise = optimizer(model)
    y = {"saved": train(model, optimise, 2)}
    state = get_model_state_dict(model, options=TRAINED)
    assert state.keys() == trained(model).keys()
    dcp.save({"model": state}, checkpoint_id=folder / f"{kind}-trained")
    weights, moments = get_state_dict(model, optimise)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"{kind}-all")
    y["went on"] = train(model, optimise, 2)
    if dist.get_rank() == 0:
        torch.save(y, folder / f"{kind}.pt")


@check(*KINDS, sizes=(1, 4), why_not=NO_FSDP)
def resume_on_another_number_of_processes(folder: Path, kind: str) -> None:
    want = torch.load(folder / f"{kind}.pt", weights_only=True)
    model, optimise = resumed(kind)
    state = get_model_state_dict(model, options=TRAINED)
    dcp.load({"model": state}, checkpoint_id=folder / f"{kind}-trained")
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    torch.testing.assert_close(train(model, optimise, 0), want["saved"])

    model, optimise = resumed(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    weights, moments = get_state_dict(model, optimise)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"{kind}-all")
    set_state_dict(model, optimise, model_state_dict=weights, optim_state_dict=moments)
    torch.testing.assert_close(train(model, optimise, 0), want["saved"])
    torch.testing.assert_close(train(model, optimise, 2), want["went on"])
    fused_path_ran(model, kind, 4)
