"""`freeze_a`: LoRA-FA, which freezes A, trains B and so keeps no x for the backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_kernels.models.names import bare
from lora_kernels.models.pairs import Pair, lies_in_memory_of, pairs, told_others
from lora_kernels.models.targets import some
from lora_kernels.train.projection import Projection


class FrozenA:
    """What `freeze_a` has frozen, until `remove`.

    It is a forward pre-hook of the model too. Before each forward it freezes A again where other code has made it
    trainable, as PEFT's ``set_adapter`` and ``disable_adapter`` do, and it follows parameters that were replaced, as by
    ``fully_shard``, ``load_state_dict(assign=True)`` or a copy of the model.
    """

    def __init__(self, model: nn.Module, projections: list[Projection]) -> None:
        self.model = bare(model)
        self._projections = projections
        self._handles: list[RemovableHandle] = []
        self._sharded = False
        """Whether the hooks on the units of FSDP2 are there."""
        self._hold()

    def __call__(self, module: nn.Module, args: Any) -> None:
        """See to it before a forward that A is frozen and that the gradients of B are projected."""
        if torch.compiler.is_compiling():
            return
        for projection in self._projections:
            projection.hold()
        if not self._sharded and (_is_unit(module) or any(each.is_sharded for each in self._projections)):
            self._hold()

    def known(self) -> set[tuple[int, str, str]]:
        """Return what tells the pairs apart."""
        return {_key(projection.pair) for projection in self._projections}

    def remove(self) -> None:
        """Undo `freeze_a`: A is trained again if it was before, and the gradients of B are left as they are."""
        for handle in self._handles:
            handle.remove()
        for projection in self._projections:
            projection.release()
        self._projections, self._handles = [], []

    def _hold(self) -> None:
        """Set the hooks on modules: on the model, and on every unit of FSDP2, which has its whole parameters in its
        forward only. The hook on the model runs before that of FSDP2, and so sees the parameters that are loaded."""
        units = [module for module in self.model.modules() if _is_unit(module)]
        nearest: dict[int, list[Projection]] = {}
        insides = [{id(module) for module in unit.modules()} for unit in units]
        for projection in self._projections:
            around = [i for i, inside in enumerate(insides) if id(projection.pair.layer) in inside]
            if around:
                nearest.setdefault(around[-1], []).append(projection)  # modules() yields the outer ones first
            elif projection.is_sharded:
                projection.refuse_parallel()
        for handle in self._handles:
            handle.remove()
        self._handles = [self.model.register_forward_pre_hook(self, prepend=True)]
        self._handles += [units[i].register_forward_pre_hook(_Unit(own)) for i, own in nearest.items()]
        self._sharded = bool(units)

    def __getstate__(self) -> dict[str, Any]:
        # The hooks of a copy, or of a model that is read from a file, are set anew.
        return self.__dict__ | {"_handles": [], "_sharded": False}

    def __repr__(self) -> str:
        count = sum(projection.frozen.numel() for projection in self._projections)
        return f"FrozenA({len(self._projections)} matrices, {count} parameters)"


class _Unit:
    """A forward pre-hook of a unit of FSDP2: it projects the gradients of the whole parameters."""

    def __init__(self, projections: list[Projection]) -> None:
        self.projections = projections

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for projection in self.projections:
            if projection.is_sharded:
                projection.refuse_parallel()
            projection.hook()


def _is_unit(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on `module`."""
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard")


def freeze_a(model: nn.Module, *, project: bool = True, adapter: str | None = None) -> FrozenA:
    """Freeze A of every trained adapter at its present values, and return the object whose ``remove`` undoes that.

    B (and with DoRA m) are trained. A needs no gradient, so the forward saves no x [M, K], only h = x Aᵀ [M, R]
    (Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023,
    arXiv:2308.03303).

    With `project` the gradient of B becomes

        g_B ← g_B (A Aᵀ)⁻¹ / s²

    in every backward, before it is added to ``B.grad``. The step in ΔW = s·B A is then the one nearest to the gradient
    of a whole ΔW that this A can make: ĝ = argmin ‖s·ĝ A − G‖ for g_B = s·G Aᵀ. It is computed in fp64 and rounded
    once. (A Aᵀ)⁻¹ comes from a Cholesky factor, which is made once, and anew where A has been written to or replaced. s
    is read in each backward. The map is linear, so accumulated gradients, GradScaler and the sums of data parallel
    training stay right. It works with any optimiser. Clipping sees the projected gradients.

    In an embedding A is zero at first and B random, so there B is frozen, and A trained: g_A ← (BᵀB)⁻¹ g_A / s².

    Args:
        model: a model with adapters of this package or PEFT's, fused or not. `freeze_a` may be called before or after
            ``fully_shard``, and before DistributedDataParallel.
        project: whether to project the gradients. Without it, B is trained with its own gradients.
        adapter: one of PEFT's adapters; None is every adapter that is trained.

    Raises:
        ValueError: where no B is trained, or an A beside a frozen B; for an A without full rank, such as zeros, or with
            r above K, and for s = 0; for a B that several layers share; for a tied head of PEFT, whose parameters lie
            in the memory of the embedding's; for a middle shortcut of ResLoRA, with the projection; under FSDP1 and in
            tensor parallel layers; and what `pairs` raises. Nothing is changed then.
        RuntimeError: where an A is frozen by `freeze_a` already.
    """
    chosen = [pair for pair in pairs(model, adapter) if pair.random_at_start.requires_grad or _is_trained(pair)]
    _check(model, chosen, project)
    frozen = FrozenA(model, [Projection(pair, project) for pair in chosen])
    frozen(frozen.model, ())
    return frozen


def _key(pair: Pair) -> tuple[int, str, str]:
    return id(pair.layer), pair.adapter, pair.part


def _is_trained(pair: Pair) -> bool:
    return pair.zero_at_start.requires_grad


def _check(model: nn.Module, chosen: list[Pair], project: bool) -> None:
    """Raise what `freeze_a` raises for pairs that it cannot freeze."""
    if not chosen:
        raise ValueError(
            "no A or B of this model is trained: add adapters with apply_lora or get_peft_model before"
            + told_others(model)
        )
    if without := [pair.name for pair in chosen if not _is_trained(pair)]:
        raise ValueError(
            f"B is frozen in {some(without)}, so that nothing would be left to train: make it trainable, or leave "
            "these layers to their A"
        )
    hooks = bare(model)._forward_pre_hooks.values()
    known = {key for hook in hooks if isinstance(hook, FrozenA) for key in hook.known()}
    if frozen := [pair.name for pair in chosen if _key(pair) in known or Projection.is_of(pair.zero_at_start)]:
        raise RuntimeError(f"A is frozen already in {some(frozen)}: call remove() of what freeze_a returned")
    own = {id(factor) for pair in chosen for factor in (pair.a, pair.b)}
    for name, parameter in model.named_parameters():
        tied = parameter.requires_grad and id(parameter) not in own
        if tied and lies_in_memory_of(parameter, (pair.random_at_start for pair in chosen)):
            raise ValueError(
                f"{name} lies in the memory of an adapter that is to be frozen, as ensure_weight_tying of PEFT makes "
                "it: use apply_lora(ensure_weight_tying=True), whose layers share their parameters"
            )
    if not project:
        return
    count = Counter(id(pair.zero_at_start) for pair in chosen)
    if shared := [pair.name for pair in chosen if count[id(pair.zero_at_start)] > 1]:
        raise ValueError(
            f"{some(shared)} share one trained matrix beside different frozen ones, and no projection serves all "
            "of them: call freeze_a(model, project=False)"
        )
    if summed := [pair.name for pair in chosen if getattr(pair.layer, "structure", "") == "ms" and pair.layer.earlier]:
        raise ValueError(
            f"B of {some(summed)} reads the sum of A x over several blocks (ResLoRA's middle shortcut), so that its "
            "own A does not tell the projection: call freeze_a(model, project=False)"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 keeps no parameter whose gradient could be projected: use FSDP2, or project=False")
