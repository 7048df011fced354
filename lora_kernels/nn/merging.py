"""The merged weight W + s·B A, computed by blocks of rows in fp64 and rounded once, and what quantising it loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.quant.weight import QuantizedWeight

_ROWS = 512
"""The number of rows computed at a time, which bounds the fp64 temporaries to 512 × K."""


class MergeReport(NamedTuple):
    """The cost of quantising W' = W + s·B·A, or with DoRA d ⊙ that, into Q, in Frobenius norms."""

    error: float
    """‖Q - W'‖ / ‖W'‖."""
    update: float
    """‖W' - W‖ / ‖W'‖. Where it is not well above `error`, most of the update is lost."""


def row_blocks(N: int) -> list[slice]:
    """Return the rows of a matrix [N, ·] as consecutive slices of at most `_ROWS`."""
    return [slice(n, min(N, n + _ROWS)) for n in range(0, N, _ROWS)]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 on Metal, which has no fp64. In fp64 a product of 16-bit or fp32 numbers and its sum with W
    are exact but for the last bits."""
    return torch.float32 if device.type == "mps" else torch.float64


def updated_weight(
    rows: Callable[[slice], Tensor], a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, d: Tensor | None = None
) -> Tensor:
    """Return d ⊙ (W + scale·B A) [N, K] in `dtype`, for A [r, K], B [N, r] and d [N]; a d of None stands for ones.
    ``rows(block)`` returns the rows of W in the slice `block`."""
    wide = wide_dtype(a.device)
    a, b = a.detach().to(wide), b.detach().to(wide)
    made = torch.empty(b.shape[0], a.shape[1], dtype=dtype, device=a.device)
    for block in row_blocks(b.shape[0]):
        sums = torch.addmm(rows(block).to(wide), b[block], a, alpha=scale)
        made[block] = (sums if d is None else sums.mul_(d[block, None].to(wide))).to(dtype)
    return made


def plain_linear(layer: Any, merged: Tensor) -> nn.Linear:
    """Return an ``nn.Linear`` with the weight `merged` and a copy of the bias of `layer` in its ``weight_dtype``."""
    has_bias, dtype = layer.bias is not None, layer.weight_dtype
    linear = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(merged)
    if has_bias:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True))
    return linear.train(layer.training)


def refuse_nonfinite(merged: Tensor, scale: float) -> None:
    """Raise ValueError for a merged weight that is not finite."""
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"merging gives weights that are not finite (scaling {scale}): nothing was changed. "
            "Look at lora_A and lora_B"
        )


def refuse_absent(module: nn.Module) -> None:
    """Raise ValueError where a parameter of `module` is on the meta device, and has no values there."""
    absent = [name for name, p in module._parameters.items() if p is not None and p.is_meta]
    if absent:
        raise ValueError(
            f"{', '.join(absent)} of this {type(module).__name__} are on the meta device, which holds no values: "
            "nothing was changed. If accelerate has offloaded the model, bring it back first with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), or load it without offloading; otherwise "
            "load a checkpoint"
        )


def refuse_computed(module: nn.Module) -> None:
    """Raise ValueError where `weight` is no Parameter of the module's own, but computed from others: merging could not
    replace it."""
    if "weight" not in module._parameters:
        first = "Take to_linear(), or make" if hasattr(module, "to_linear") else "Make"
        raise ValueError(
            f"the weight of this {type(module).__name__} is parametrised, pruned or sharded, so merge() and unmerge() "
            f"cannot replace it: nothing was changed. {first} the weight plain first, with "
            'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight") or prune.remove(layer, "weight")'
        )


def refuse_sharded(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where this process holds only a part of W, A or B: as a DTensor, or as FSDP1 leaves them.
    `shapes` has the whole shape of each parameter by name."""
    for name, shape in shapes.items():
        t = getattr(module, name)
        if t.shape != shape or hasattr(t, "placements"):
            raise ValueError(
                f"{name} of this {type(module).__name__} is sharded, {type(t).__name__} {tuple(t.shape)} for {shape}: "
                "nothing was changed. Gather the state with get_model_state_dict(..., "
                "options=StateDictOptions(full_state_dict=True)), and merge a whole module that has loaded it"
            )


def report(merged: Tensor, q: QuantizedWeight, update_of: Callable[[slice], Tensor]) -> MergeReport:
    """Return the cost of storing the merged weight `merged`, in fp32, as q. ``update_of(block)`` returns the rows of
    merged - W in the slice `block`."""
    wide = wide_dtype(merged.device)
    error = norm = update = 0.0
    for rows in row_blocks(merged.shape[0]):
        want = merged[rows].to(wide)
        norm += want.square().sum().item()
        error += (q.rows(rows.start, rows.stop, torch.float32).to(wide) - want).square().sum().item()
        update += update_of(rows).square().sum().item()
    norm = max(norm, torch.finfo(torch.float64).tiny)
    return MergeReport((error / norm) ** 0.5, (update / norm) ** 0.5)


def refuse_lost(layer: Any, weight: Tensor, base: Tensor, before: Tensor | None) -> Tensor | None:
    """Raise ValueError for a merged `layer` whose `weight` is W, `base`, again: other code has put the values of
    ``state_dict`` there, as accelerate does where it offloads a module around the layer.

    `before` is the merged weight as it was known in the last forward; None is not compared. Returns the one that is
    known from now on.
    """
    if before is None or weight is before or not _are_plain(weight, base, before):
        return before
    if _same(weight, base) and not _same(before, base):
        raise ValueError(
            f"this {type(layer).__name__} is merged, but its weight is W without the adapter: other code has put "
            "the weight of state_dict() there, as accelerate does where it offloads the modules around this one. "
            "Call unmerge(), after accelerate.hooks.remove_hook_from_module(model, recurse=True) if the model is "
            "offloaded, and merge again"
        )
    return weight if weight._base is None else before  # FSDP gives views, which must not be kept


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether the values of these tensors can be compared."""
    plain = all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors)
    return plain and not torch._C._are_functorch_transforms_active()


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two weights are equal. Most that are not differ in their first row."""
    return one.shape == other.shape and all(
        torch.equal(one[rows], other[rows].to(one.device, one.dtype)) for rows in (slice(1), slice(1, None))
    )
