"""Tensor parallel checks: ColwiseLoRA and RowwiseLoRA compute what the whole layer computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from support.distributed.models import (
    NO_FSDP,
    ROWS,
    Block,
    K,
    N,
    R,
    batch,
    check,
    equal,
    loss,
    mine,
    step,
    trained,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from lora_kernels import FusedLoRALinear, lora_linear
from lora_kernels.core import dropout
from lora_kernels.models.adapters import load_adapter, save_adapter
from lora_kernels.models.inject import merge_and_unload
from lora_kernels.nn.parallel import ColwiseLoRA, RowwiseLoRA


def mesh_of(*sizes: int):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def run_block(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    got = step(model, x)
    return got | {"grad x": whole(x.grad)}


def tensor_parallel_block(width: int, bias_trained: bool, p: float = 0.0) -> Block:
    torch.manual_seed(0)
    block = Block(width)
    for name in ("up", "down"):
        layer = FusedLoRALinear.from_linear(getattr(block, name), r=R, lora_alpha=6, lora_dropout=p)
        nn.init.normal_(layer.lora_B, 0, 0.3)
        layer.bias.requires_grad_(bias_trained)
        setattr(block, name, layer)
    return block


PLAN = {"up": ColwiseLoRA(), "down": RowwiseLoRA()}


@check("even", "uneven", "bias trained")
def tensor_parallel(folder: Path, kind: str) -> None:
    """A column-wise and a row-wise layer need one all-reduce in the forward, and in the backward one each for dx, dA
    and dB, and for the bias of the row-wise layer if it is trained."""
    size, trains = dist.get_world_size(), kind == "bias trained"
    width = 42 if kind == "uneven" else N
    model = parallelize_module(tensor_parallel_block(width, trains), mesh_of(size), PLAN)
    up, down = model.up, model.down
    assert (
        up.weight.to_local().shape[0]
        == up.lora_B.to_local().shape[0]
        == len(torch.arange(width).chunk(size)[dist.get_rank()])
    )
    assert down.weight.to_local().shape[1] == down.lora_A.to_local().shape[1] == up.weight.to_local().shape[0]
    assert up.lora_A.to_local().shape == (R, K) and down.lora_B.to_local().shape == (K, R)
    equal(run_block(model, batch()), run_block(tensor_parallel_block(width, trains), batch()))

    if kind == "uneven":
        return  # torch 2.6 communicates once more if the parts differ in size
    with CommDebugMode() as forward:
        y = model(batch().requires_grad_())
    with CommDebugMode() as backward:
        loss(y).backward()
    assert forward.get_total_counts() == 1, forward.get_comm_counts()
    assert backward.get_total_counts() == 3 + trains, backward.get_comm_counts()


@check()
def tensor_parallel_with_sequence_parallel_layouts(folder: Path) -> None:
    """x and y are sharded on their first dimension, so that all-gather and reduce-scatter replace the all-reduce."""
    plan = {"up": ColwiseLoRA(input_layouts=Shard(0)), "down": RowwiseLoRA(output_layouts=Shard(0))}
    model = parallelize_module(tensor_parallel_block(N, False), mesh_of(dist.get_world_size()), plan)
    plain, x = tensor_parallel_block(N, False), batch()
    y = model.mlp(mine(x))
    y.square().sum().backward()
    want = plain.mlp(x)
    want.square().sum().backward()
    torch.testing.assert_close(y, mine(want))
    for (name, p), q in zip(trained(model).items(), trained(plain).values(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, msg=name)


@check()
def tensor_parallel_dropout(folder: Path) -> None:
    """The generators of the processes are equal. Column-wise, every process has the mask of the whole x. Row-wise, the
    seed contains the rank, so that the parts of x have masks of their own."""
    size, p, x = dist.get_world_size(), 0.4, batch().flatten(0, 1)
    model = parallelize_module(tensor_parallel_block(N, False, p), mesh_of(size), PLAN)
    plain = tensor_parallel_block(N, False, p)
    torch.manual_seed(5)
    got = run_block(model, x)
    torch.manual_seed(5)
    up_seed, down_seed = (dropout.draw_seed(x.device) for _ in range(2))

    def masked(x: Tensor, layer: FusedLoRALinear, dropped: Tensor) -> Tensor:
        low = dropped @ layer.lora_A.t() @ layer.lora_B.t()
        return nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling * low

    def truth(x: Tensor) -> Tensor:
        h = torch.tanh(masked(x, plain.up, dropout.dropout(x, p, up_seed)))
        parts = [dropout.dropout(part, p, down_seed ^ i) for i, part in enumerate(h.chunk(size, -1))]
        return x + masked(h, plain.down, torch.cat(parts, -1))

    plain.forward = truth
    equal(got, run_block(plain, x))
    masks = [dropout.keep_mask(down_seed ^ i, ROWS, N // size, p) for i in range(size)]
    assert not any(torch.equal(masks[0], other) for other in masks[1:])
    model.eval()
    torch.testing.assert_close(model(x), x + plain.eval().mlp(x))


@check(sizes=(4,), why_not=NO_FSDP)
def tensor_parallel_within_fsdp(folder: Path) -> None:
    """Of four processes, two groups of two are tensor parallel, and FSDP2 shards over the groups."""
    mesh = mesh_of(2, 2)
    model = parallelize_module(tensor_parallel_block(N, False), mesh["tp"], PLAN)
    fully_shard(model, mesh=mesh["dp"])
    x, part = batch(), mesh["dp"].get_local_rank()
    want = step(tensor_parallel_block(N, False), x)
    want["y"] = want["y"].chunk(2)[part]
    equal(step(model, x.chunk(2)[part]), want)


def refuses(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


@check()
def merging_by_way_of_a_whole_model(folder: Path) -> None:
    """The error for merging a sharded layer advises this way."""
    model = parallelize_module(tensor_parallel_block(N, False), mesh_of(dist.get_world_size()), PLAN)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    plain = tensor_parallel_block(N, False)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    plain.load_state_dict(state)
    want = model(batch())
    torch.testing.assert_close(plain(batch()), want)
    torch.testing.assert_close(merge_and_unload(plain)(batch()), want)


@check()
def what_is_refused(folder: Path) -> None:
    mesh = mesh_of(dist.get_world_size())
    refuses(TypeError, "module is a Linear", lambda: parallelize_module(Block(), mesh, PLAN))
    merged = tensor_parallel_block(N, False)
    merged.up.merge()
    refuses(ValueError, "unmerge()", lambda: parallelize_module(merged, mesh, PLAN))
    dora = nn.ModuleDict({"up": FusedLoRALinear(K, N, use_dora=True)})
    packed = nn.ModuleDict({"up": FusedLoRALinear.from_linear(nn.Linear(K, N), quant="int8")})
    refuses(ValueError, "cannot be sharded here", lambda: parallelize_module(packed, mesh, {"up": ColwiseLoRA()}))
    refuses(ValueError, "no tensor parallel DoRA", lambda: parallelize_module(dora, mesh, {"up": ColwiseLoRA()}))
    model = parallelize_module(tensor_parallel_block(N, False), mesh, PLAN)
    for layer in (model.up, model.down):
        refuses(NotImplementedError, "full_state_dict", layer.merge)
        refuses(NotImplementedError, "full_state_dict", layer.to_linear)
    adapter = folder / f"adapter-{dist.get_world_size()}-{dist.get_rank()}"
    refuses(NotImplementedError, "up: a tensor parallel FusedLoRALinear", lambda: merge_and_unload(model))
    refuses(ValueError, "up.lora_A (a DTensor)", lambda: save_adapter(model, adapter))
    save_adapter(tensor_parallel_block(N, False), adapter)
    refuses(ValueError, "get_model_state_dict", lambda: load_adapter(model, adapter))
    operands = [distribute_tensor(torch.randn(4, 4), mesh, [Replicate()]) for _ in range(4)]
    refuses(RuntimeError, "DTensor", lambda: lora_linear(torch.randn(4, 4), *operands[1:], scale=1.0))
