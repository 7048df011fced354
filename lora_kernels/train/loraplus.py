"""`loraplus_groups`: parameter groups in which B learns faster than A."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lora_kernels.models.pairs import EMBEDDING, Pair, lies_in_memory_of, pairs, told_others

_A, _B, _EMBEDDING, _OTHER, _NOT_DECAYED = "A", "B", "embedding", "other", "not decayed"


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float, *, weight_decay: float = 0.0, embedding_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return the trained parameters of `model` in groups for any optimiser, with the learning rates of LoRA+.

    A learns at η, and B at λ·η, where η = `lr` and λ = `ratio`. With one rate for both, B learns too slowly in wide
    layers (Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv:2402.12354).

    The groups, by their "name":

    * "A": A of every layer but embeddings, at lr.
    * "B": B of every layer but embeddings, at lr · ratio.
    * "embedding": both factors of embeddings, and of heads that share them, at embedding_lr.
    * "other": what else is trained and is a matrix, such as the weight of a new head, at lr.
    * "not decayed": biases, weights of norms and DoRA's magnitudes, at lr and without weight decay.

    Every parameter that requires a gradient is in exactly one group, also where it is shared, and a group without
    parameters is left out. What is A and what is B follows from the layers, of this package or of PEFT, and not from
    names. In an embedding the roles of A and B are swapped (A is zero at first), so both learn at `lr`.

    Args:
        model: a model with adapters. Under FSDP2, call this after ``fully_shard``, as for any optimiser.
        lr: η > 0.
        ratio: λ ≥ 1. The authors' examples have about 16, and an η of about half of what LoRA takes.
        weight_decay: that of every group but the last, at least 0.
        embedding_lr: the learning rate of embeddings; None is `lr`.

    Raises:
        ValueError: for a learning rate, ratio or weight decay out of range; where no A or B requires a gradient; where
            one parameter is the A of a layer and the B of another; and what `pairs` raises.
    """
    _check(lr, ratio, weight_decay, embedding_lr)
    found = pairs(model)
    roles = _roles(found)
    magnitudes = {id(pair.magnitude) for pair in found}
    tables = [factor for pair in found if pair.kind == EMBEDDING for factor in (pair.a, pair.b)]
    members: dict[str, list[Tensor]] = {name: [] for name in (_A, _B, _EMBEDDING, _OTHER, _NOT_DECAYED)}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        role = roles.get(id(parameter))
        if role is None and lies_in_memory_of(parameter, tables):
            role = _EMBEDDING
        if role is None:
            role = _NOT_DECAYED if parameter.dim() < 2 or id(parameter) in magnitudes else _OTHER
        members[role].append(parameter)
    if not (members[_A] or members[_B] or members[_EMBEDDING]):
        raise ValueError(
            f"no A or B of this model requires a gradient ({len(found)} low-rank updates were found): add adapters "
            f"with apply_lora or get_peft_model before, and make them trainable{told_others(model)}"
        )
    rates = {_B: lr * ratio, _EMBEDDING: lr if embedding_lr is None else embedding_lr}
    return [
        {
            "params": parameters,
            "lr": rates.get(name, lr),
            "weight_decay": 0.0 if name == _NOT_DECAYED else weight_decay,
            "name": name,
        }
        for name, parameters in members.items()
        if parameters
    ]


def _check(lr: float, ratio: float, weight_decay: float, embedding_lr: float | None) -> None:
    """Raise ValueError for a value that is out of range, and TypeError for what is no number."""
    for name, value in (("lr", lr), ("ratio", ratio), ("weight_decay", weight_decay), ("embedding_lr", embedding_lr)):
        if not isinstance(value, Real) and not (name == "embedding_lr" and value is None):
            raise TypeError(f"{name} must be a number, got {value!r}")
    for name, rate in (("lr", lr), ("embedding_lr", embedding_lr)):
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"{name} must be a positive number, got {rate}")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio is that of B's learning rate to A's, and must be at least 1, got {ratio}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")


def _roles(found: list[Pair]) -> dict[int, str]:
    """Return the group of every A and B, by its ``id``."""
    roles: dict[int, str] = {}
    for pair in found:
        for parameter, role in ((pair.a, _A), (pair.b, _B)):
            role = _EMBEDDING if pair.kind == EMBEDDING else role
            if roles.setdefault(id(parameter), role) != role:
                raise ValueError(
                    f"a parameter {tuple(parameter.shape)} of {pair.name} is in the group {role!r}, and as a part of "
                    f"another layer in the group {roles[id(parameter)]!r}: it cannot learn at both rates. Give the "
                    "layers parameters of their own"
                )
    return roles
