"""`mean_gradients`: the gradients of many weights, without all of them in memory at once.

The weights are taken in blocks whose gradients fit into a number of bytes. Each block takes one pass over the batches,
in which only its weights get gradients. A gradient is added to its sum in fp32 as soon as the backward has made it, and
is freed before the next layer's is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
"""A function of the model and a batch that returns the loss, one number."""


_BYTES = 4
"""The bytes of an element of a sum."""


def blocks_of(layers: Mapping[str, nn.Module], memory: int) -> list[list[str]]:
    """Return the names of the layers in blocks, in their order. The gradients of a block take at most `memory` bytes:
    a sum in fp32 for each weight, and room for one more, for the gradient that is being added. Raises ValueError for a
    layer that takes more on its own."""
    blocks: list[list[str]] = []
    held = largest = 0
    for name, layer in layers.items():
        weight: Any = layer.weight
        own = _BYTES * weight.numel()
        if 2 * own > memory:
            raise ValueError(
                f"the gradient of {name} {tuple(weight.shape)} takes {2 * own:,} bytes, and memory is {memory:,}: "
                "give more"
            )
        if not blocks or held + own + max(largest, own) > memory:
            blocks.append([])
            held = largest = 0
        blocks[-1].append(name)
        held, largest = held + own, max(largest, own)
    return blocks


def mean_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss,
    memory: int,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the name and the mean of dL/dW over the batches, in fp32 and in the weight's own layout, of each of
    `layers`; None for a layer that no batch reaches. A gradient that the caller lets go is freed.

    `layers` are layers of `model` with a floating-point `weight`. `advance` is called after each batch of each pass.
    Where torch.distributed runs, the mean is over the batches of all ranks, and is equal on each.

    Weights, gradients, requires_grad and hooks of the model are as before between two passes. Random numbers and
    buffers, such as those of batch norm in training mode, go on with every forward.

    Raises:
        ValueError: no batches; a loss that is not one number; an iterator, which can be read once, where several passes
            are needed; a layer that needs more than `memory` bytes.
    """
    blocks = blocks_of(layers, memory)
    if len(blocks) > 1 and iter(batches) is batches:
        sizes = [_BYTES * layer.weight.numel() for layer in layers.values()]  # type: ignore[operator, union-attr]
        needed = sum(sizes) + max(sizes)
        raise ValueError(
            f"the gradients take {len(blocks)} passes in {memory:,} bytes, and these batches can be read once: give a "
            f"list or a DataLoader, or memory={needed:,}"
        )
    for names in blocks:
        sums: dict[str, Tensor] = {}
        count = 0
        with _only(model, {name: layers[name] for name in names}, sums):
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"the loss must be a tensor with one number, got {got}")
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
                count += 1
                advance()
        count = _over_ranks({name: layers[name] for name in names}, sums, count)
        if count == 0:
            raise ValueError("there are no batches to take the gradient of")
        for name in names:
            yield name, sums.pop(name).div_(count) if name in sums else None


@contextmanager
def _only(model: nn.Module, layers: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Let only the weights of `layers` get gradients, which are added up in `sums`.

    Each of these layers has another Parameter over its weight's memory meanwhile. So a weight that other layers share
    gets the gradient of this layer alone, and the model's own Parameters keep their gradients and hooks.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = {name: layer._parameters["weight"] for name, layer in layers.items()}

    def added_to(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if name in sums:
                sums[name].add_(gradient)
            else:
                sums[name] = gradient.detach().to(torch.float32)

        return add

    try:
        for parameter, _ in trained:
            parameter.requires_grad = False
        for name, layer in layers.items():
            weight = weights[name]
            assert weight is not None
            watched = nn.Parameter(weight.detach())
            watched.register_post_accumulate_grad_hook(added_to(name))
            layer._parameters["weight"] = watched
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for name, layer in layers.items():
            layer._parameters["weight"] = weights[name]
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad


def _over_ranks(layers: Mapping[str, nn.Module], sums: dict[str, Tensor], count: int) -> int:
    """Add up the sums and the number of batches over all ranks, where torch.distributed runs, and return the number.
    A layer that no rank's batches reach stays out of `sums`."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    first: Any = next(iter(layers.values())).weight
    told = torch.tensor([count, *(name in sums for name in layers)], device=first.device)
    dist.all_reduce(told)
    for name, reached in zip(layers, told[1:].tolist(), strict=True):
        if reached:
            if name not in sums:
                sums[name] = torch.zeros_like(layers[name].weight, dtype=torch.float32, requires_grad=False)  # type: ignore[arg-type]
            dist.all_reduce(sums[name])
    return int(told[0])
