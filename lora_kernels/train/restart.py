"""`restart`: ReLoRA's step from one low-rank update to the next."""

from __future__ import annotations

import math
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.pairs import EMBEDDING, EXPERTS, Pair, check_module
from lora_kernels.models.targets import some
from lora_kernels.train import masters, restartable, sharded
from lora_kernels.train import prune as pruning
from lora_kernels.train.base_weights import Update


@dataclass(frozen=True)
class RestartedLayer:
    """One update that went into its weight."""

    name: str
    """The name of the layer, and the part of it if it has several updates."""
    update: float
    """‖s·B A‖, the Frobenius norm of what was added to W."""
    lost: float
    """‖what has arrived in W - s·B A‖ / ‖s·B A‖: the share that rounding has changed; 0 for an update of zero."""


@dataclass(frozen=True)
class RestartReport:
    """What a restart has done. ``str()`` of it is a table."""

    layers: tuple[RestartedLayer, ...]
    zeros: int = 0
    """The elements of the optimiser's moments of A and B that are zero now."""
    moments: int = 0
    """The elements of these moments; 0 without an optimiser, or before its first step."""
    left: tuple[str, ...] = ()
    """The layers whose adapters are frozen. They are as they were."""

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("layer")])
        lines = [f"{'layer':<{width}}  {'‖s·B A‖':>9}  lost to rounding"]
        lines += [f"{layer.name:<{width}}  {layer.update:>9.3g}  {layer.lost:>8.2g}" for layer in self.layers]
        if self.moments:
            share = self.zeros / self.moments
            lines.append(f"{self.zeros} of {self.moments} elements of the optimiser's moments are zero ({share:.2%})")
        if self.left:
            lines.append(f"frozen, and left as they are: {some(self.left)}")
        return "\n".join(lines)


def restart(
    model: nn.Module,
    optimizer: Any = None,
    *,
    prune: float = 0.99,
    how: str = "magnitude",
    generator: torch.Generator | None = None,
    master: MutableMapping[str, Tensor] | None = None,
) -> RestartReport:
    """Add every trained adapter of `model` to its base weight, begin new ones, and prune the optimiser's moments.

        W ← W + s·B A        A ← Kaiming-uniform(√5), B ← 0        m ← m with the fraction `prune` of it zero

    So the model computes what it did, but for the rounding of W, and the next update adds r to the rank of what is
    learned. Of an embedding, A becomes zero and B normal(0, 1), as at first. DoRA's m stays, and d is 1 again.

    W is written in place: the Parameter and its memory stay those that the optimiser, a compiled model or a module tied
    to it knows. The sums are made in blocks, in fp32 or fp64, and rounded once to W's dtype. Where W has 16 bits, much
    of a small update is lost; `RestartedLayer.lost` tells how much.

    Call it between two steps, best where the learning rate is 0 (`jagged_cosine`). In several processes all of them
    make this call. A and B are then equal in all, since process 0 gives the seed. Gradients of A and B become zero,
    because they belong to the old ones.

    Args:
        model: a model with adapters of this package or of PEFT (fused or not), also inside DDP or FSDP2.
        optimizer: the optimiser of the adapters, or a list of several, also wrapped by accelerate. None prunes nothing.
        prune: the fraction of the moments of A and B to make zero, 0 to 1. Steps stay as they are. The paper has 0.99.
        how: "magnitude", the elements whose first moment is smallest, exactly the fraction of them; or "random", each
            element with probability `prune`. All moments lose the same elements. The authors' "reset" is "random" with
            0.999.
        generator: gives the seed of A, B and the random elements. None is torch's default generator.
        master: a dictionary in which W is kept in fp32 from restart to restart, for a W in 16 bits. Give the same one
            to every restart, and save it in checkpoints. The first call fills it: 4 bytes for an element of W.

    Returns:
        A `RestartReport`.

    Raises:
        ValueError: a model without adapters; layers whose update cannot go into their weight (quantised, merged,
            offloaded, sharded by FSDP1 or ZeRO-3, with several adapters, ...); a weight that another layer reads too;
            values that are not finite; an optimiser with unknown states, or without A or B; prune or how out of range;
            a `master` that is not that of these weights. Nothing is changed then.
        TypeError: a model, optimiser, generator or master of another type. Nothing is changed then.

    An adapter file is worthless from now on, since it holds no base: `save_adapter` refuses such a model, and PEFT
    refuses to load what its ``save_pretrained`` has saved. Save the state_dict of the whole model.

    Lialin, Shivagunde, Muckatira and Rumshisky, "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023
    (arXiv:2307.05695).
    """
    report, named = carry_out(model, optimizer, prune, how, generator, master)
    if named:
        warnings.warn(
            f"the base weights have changed, and PEFT's save_pretrained saves the adapter {some(named)} without them: "
            "save the state_dict of the whole model. PEFT refuses to load the adapter alone, by the value "
            f"{restartable.PEFT_MARK!r} of init_lora_weights in its config",
            stacklevel=2,
        )
    return report


@torch.inference_mode(False)
@torch.no_grad()
def carry_out(
    model: nn.Module,
    optimizer: Any,
    prune: float,
    how: str,
    generator: torch.Generator | None,
    master: MutableMapping[str, Tensor] | None,
) -> tuple[RestartReport, list[str]]:
    """Do what `restart` does, and return its report and the adapters of PEFT that were restarted for the first time."""
    check_module(model)
    sharded.reshard(model)
    error: Exception | None = None
    plan: _Plan | None = None
    try:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, such as torch.Generator().manual_seed(0), got {generator!r}"
            )
        plan = _planned(model, optimizer, prune, how, master)
    except Exception as found:  # the other processes have to hear of it, whatever it is
        error = found
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seed = sharded.agreed_seed(generator if error is None else None, device, failed=error is not None)
    if error is not None:
        raise error
    assert plan is not None
    layers = []
    for update in plan.updates:
        norm, lost = update.add(plan.masters.get(update.name))
        layers.append(RestartedLayer(update.name, norm, lost / norm if norm else 0.0))
    zeros = total = 0
    draws = torch.Generator().manual_seed(seed)
    for update in plan.updates:  # only now, because layers may share an A or a B
        of_a, of_m = (torch.Generator().manual_seed(s) for s in torch.randint(2**62, (2,), generator=draws).tolist())
        _begin(update.pair, of_a)
        for p in (update.pair.a, update.pair.b):
            pruned = pruning.prune(plan.moments.pop(p, ()), prune, how, of_m)
            zeros, total = zeros + pruned.zeros, total + pruned.moments
    if master is not None:
        master.update(plan.masters)
    return RestartReport(tuple(layers), zeros, total, plan.left), restartable.mark(model, plan.updates)


@dataclass(frozen=True)
class _Plan:
    """What a restart will do, when nothing speaks against it."""

    updates: list[Update]
    moments: dict[nn.Parameter, list[pruning.Moment]]
    """The moments of each A and B."""
    masters: dict[str, Tensor]
    left: tuple[str, ...]


def _planned(
    model: nn.Module, optimizer: Any, prune: float, how: str, master: MutableMapping[str, Tensor] | None
) -> _Plan:
    """Return what there is to do. Raises ValueError where `restart` says so."""
    pruning.check(prune, how)
    if master is not None and not isinstance(master, MutableMapping):
        raise TypeError(f"master must be a dictionary, got a {type(master).__name__}")
    updates, left = restartable.updates_of(model)
    optimizers = [] if optimizer is None else optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    matrices = {p: f"{u.name}.{which}" for u in updates for which, p in (("A", u.pair.a), ("B", u.pair.b))}
    moments = pruning.moments_of(optimizers, matrices) if optimizers else {}
    return _Plan(updates, moments, {} if master is None else masters.checked(master, updates), left)


def _begin(pair: Pair, generator: torch.Generator) -> None:
    """Give A and B their first values, which every process draws alike, and zero gradients."""
    p = pair.random_at_start
    drawn = torch.empty(p.shape, dtype=torch.float32)
    if pair.kind == EMBEDDING:
        drawn.normal_(generator=generator)
    else:  # the experts of a stack lie beneath one another
        rows = drawn.view(-1, drawn.shape[-1]) if pair.kind == EXPERTS else drawn
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
    sharded.write(p, drawn)
    pair.zero_at_start.zero_()
    for each in (pair.a, pair.b):
        if each.grad is not None:
            each.grad.zero_()
