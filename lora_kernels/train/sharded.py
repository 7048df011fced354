"""Tensors of which each process has a part: DTensors, as FSDP2 and tensor parallel plans make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_plain(t: Tensor) -> bool:
    """Return whether t is dense, and is no subclass but a DTensor."""
    return (type(t) in (Tensor, nn.Parameter) or hasattr(t, "placements")) and t.layout == torch.strided


def whole(t: Tensor) -> Tensor:
    """Return t without its graph, gathered from all processes if it is a DTensor."""
    return _dtensor(t).full_tensor() if hasattr(t, "placements") else t.detach()  # type: ignore[no-any-return]


def local(t: Tensor) -> Tensor:
    """Return this process's part of t, in the same memory."""
    return _dtensor(t).to_local() if hasattr(t, "placements") else t.detach()  # type: ignore[no-any-return]


def like(full: Tensor, t: Tensor) -> Tensor:
    """Return `full`, which every process has, divided as t is: this process's part of it where t is a DTensor."""
    return _divided(full, _dtensor(t).device_mesh, _dtensor(t).placements) if hasattr(t, "placements") else full


def write(t: Tensor, full: Tensor) -> None:
    """Write `full`, which every process has, into t."""
    t = t.detach()
    t.zero_()  # also of a DTensor, whose version counter the next line does not touch
    local(t).copy_(like(full.to(local(t).device), t))


def agreed_seed(generator: torch.Generator | None, device: torch.device, failed: bool) -> int:
    """Return a number from the generator of process 0, None being torch's default generator of the CPU, which all
    processes get. Raises ValueError if another process has `failed`; if this one has, its caller raises."""
    drawn = torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu")
    if not (distributed.is_available() and distributed.is_initialized()):
        return int(drawn.item())
    both = torch.stack([drawn.cpu(), torch.tensor(0)]).to(device)
    distributed.broadcast(both, 0)
    both[1] = int(failed)
    distributed.all_reduce(both[1:], distributed.ReduceOp.MAX)
    if both[1].item() and not failed:
        raise ValueError("another process has refused the restart; its error says why. Nothing was changed")
    return int(both[0].item())


def why_not_beside(weight: Any) -> str:
    """Return why `parts_beside` does not serve the way in which `weight` is divided; "" where it does."""
    if not hasattr(weight, "placements"):
        return ""
    from torch.distributed.tensor import Replicate, Shard  # heavy to import, and loaded where there is a DTensor

    for placement in weight.placements:
        if type(placement) is not Shard and not isinstance(placement, Replicate):
            return f"its weight is divided as {weight.placements}, of which Shard and Replicate are served"
        if isinstance(placement, Shard) and weight.ndim > 3 and placement.dim > 0:
            return f"its weight is divided as {weight.placements}, within its kernel"
    return ""


def parts_beside(weight: Any, left: Tensor, right: Tensor, stacked: bool) -> tuple[Tensor, Tensor]:
    """Return the parts of left [G, P, R] and right [G, R, Q], which every process has, whose product belongs to this
    process's part of `weight`. A `weight` that is divided is [G, P, Q] if `stacked`, else [P, Q] or [P, ...]."""
    if not hasattr(weight, "placements"):
        return left, right
    from torch.distributed.tensor import Replicate, Shard

    dims = [placement.dim + (not stacked) if placement.is_shard() else None for placement in weight.placements]
    of_left = [Shard(dim) if dim in (0, 1) else Replicate() for dim in dims]
    of_right = [Shard(dim) if dim in (0, 2) else Replicate() for dim in dims]
    mesh = weight.device_mesh
    return _divided(left, mesh, of_left), _divided(right, mesh, of_right)


def summed(value: float, t: Any) -> float:
    """Return the sum of `value` over the processes that hold different parts of t."""
    if not hasattr(t, "placements"):
        return value
    number = torch.tensor(value, dtype=torch.float64, device=t.to_local().device)
    for dim, placement in enumerate(t.placements):
        if placement.is_shard():
            distributed.all_reduce(number, group=t.device_mesh.get_group(dim))
    return number.item()


def reshard(model: nn.Module) -> None:
    """Make every part of a model under FSDP2 hold its parts again: after a forward without a backward some have whole
    parameters, in memory of their own."""
    for module in model.modules():
        method: Callable[[], None] | None = getattr(module, "reshard", None)
        if method is not None and hasattr(module, "set_requires_gradient_sync"):
            method()


def _dtensor(t: Tensor) -> Any:
    """Return t without its graph, for what only a DTensor has."""
    return t.detach()


def _divided(full: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    held = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return held.redistribute(mesh, placements).to_local()
