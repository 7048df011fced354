"""VeRA and Tied-LoRA in a plain PyTorch model: adapted layers that share one A and one B."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lora_kernels.models.inject import applied, put_layers
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import bare
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.selection import Selection, Target, select
from lora_kernels.models.targets import Names, Rules, told_by_reason
from lora_kernels.nn import shared_factors
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.shared import SharedAdapter, SharedLoRAConv1D, SharedLoRALinear, SharedSettings
from lora_kernels.nn.shared_factors import SharedFactors

_KINDS: Mapping[type[AdapterLayer], type[AdapterLayer]] = MappingProxyType(
    {FusedLoRALinear: SharedLoRALinear, FusedLoRAConv1D: SharedLoRAConv1D}
)
"""The class of layers with shared factors for each class with its own."""


def apply_vera(
    model: nn.Module,
    *,
    r: int = 256,
    vera_dropout: float = 0.0,
    d_initial: float = 0.1,
    projection_prng_key: int = 0,
    save_projection: bool = True,
    target_modules: Names = "all-linear",
    exclude_modules: Names | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    adapter_dtype: torch.dtype | None = None,
    backend: str | None = None,
    quant: str | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    verify: Any = None,
) -> ApplyReport:
    """Put VeRA on every linear layer that matches, in place, and freeze everything else.

        y = x Wᵀ + bias + diag(v) B diag(u) A dropout(x)

    Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", 2023 (arXiv:2310.11454). A
    [r, K_max] and B [N_max, r] are random, frozen and one for the whole model; a layer takes the columns and rows that
    it needs. Each layer trains u [r] and v [out], r + out numbers. v starts at zero, so a fresh model computes what the
    plain one does.

    Names and defaults are those of PEFT's ``VeraConfig``, and A and B have its bits. The model holds them as its child
    ``lora_shared``, once.

    Args:
        model: any module; it is changed in place, as by `apply_lora`.
        r: the rank, by far larger than LoRA's, since its parameters are few.
        vera_dropout: p in [0, 1): dropout on x in the adapter, while training.
        d_initial: what u starts as.
        projection_prng_key: the number from which A and B are drawn, the same on every machine and rank.
        save_projection: whether `save_adapter` writes A and B. Without them a file has u and v alone, and its reader
            draws A and B from the key.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, adapter_dtype, backend, quant, blocksize,
            double_quant, verify: as for `apply_lora`. Layers other than ``nn.Linear`` and transformers' Conv1D are
            refused where they are named.

    Returns:
        An `ApplyReport`.

    Raises what `apply_lora` raises, with the model unchanged.
    """
    settings = SharedSettings(
        r, r, vera_dropout, False, False, adapter_dtype, backend, quant, blocksize, double_quant,
        first_u=d_initial, first_v=0.0,
    )  # fmt: skip
    rules = Rules(target_modules, exclude_modules, None, None, layers_to_transform, layers_pattern)
    own = {"key": projection_prng_key, "save_projection": save_projection}
    return _applied(model, settings, rules, own, verify)


def apply_tied_lora(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    train_a: bool = True,
    train_b: bool = True,
    train_u: bool = True,
    train_v: bool = True,
    target_modules: Names = "all-linear",
    exclude_modules: Names | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    adapter_dtype: torch.dtype | None = None,
    backend: str | None = None,
    quant: str | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    verify: Any = None,
) -> ApplyReport:
    """Put Tied-LoRA on every linear layer that matches, in place, and freeze everything else.

        y = x Wᵀ + bias + s · diag(v) B diag(u) A dropout(x)       s = lora_alpha / r

    Renduchintala, Konuk and Kuchaiev, "Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying", 2023
    (arXiv:2311.09578). A [r, K_max] and B [N_max, r] are one for the whole model; a layer takes the columns and rows
    that it needs, and has u [r] and v [out] of its own. Any of the four can be frozen, as the paper's variants do.

    A fresh model computes what the plain one does: the first of B, v, u and A that is trained starts at zero. Otherwise
    A and B start Kaiming-uniform(√5) from torch's generator, and u and v as ones.

    Args:
        model: any module; it is changed in place, as by `apply_lora`.
        r, lora_alpha, lora_dropout: as for `apply_lora`.
        train_a, train_b, train_u, train_v: whether A, B, u and v are trained.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, adapter_dtype, backend, quant, blocksize,
            double_quant, verify: as for `apply_lora`. Layers other than ``nn.Linear`` and transformers' Conv1D are
            refused where they are named.

    Returns:
        An `ApplyReport`.

    Raises what `apply_lora` raises, and ValueError where none of the four is trained. The model is then unchanged.
    """
    trained = {"B": train_b, "v": train_v, "u": train_u, "A": train_a}
    zero = next((name for name, is_trained in trained.items() if is_trained), None)
    if zero is None:
        raise ValueError("train_a, train_b, train_u and train_v are all False: nothing would be trained")
    settings = SharedSettings(
        r, lora_alpha, lora_dropout, False, False, adapter_dtype, backend, quant, blocksize, double_quant,
        train_u=train_u, train_v=train_v, first_u=float(zero != "u"), first_v=float(zero != "v"),
    )  # fmt: skip
    rules = Rules(target_modules, exclude_modules, None, None, layers_to_transform, layers_pattern)
    own = {"key": None, "train_a": train_a, "train_b": train_b, "zero": zero if zero in ("A", "B") else None}
    return _applied(model, settings, rules, own, verify)


def _applied(
    model: nn.Module, settings: SharedSettings, rules: Rules, own: Mapping[str, Any], verify: Any
) -> ApplyReport:
    """Put the layers that `rules` choose over new factors, whose keywords are `own`, and return the report."""
    settings.check()
    selection = shared_selection(select(model, settings, rules))
    with _over(model, selection, factors_for(selection, **own)) as (selection, fill):
        return applied(model, selection, settings.backend, verify, fill)


def shared_selection(selection: Selection) -> Selection:
    """Return the same choice of layers, with the classes that share their factors. Raises ValueError for layers of
    which there is no such class."""
    unfit = {
        target.name: f"of class {type(target.module).__name__}, and shared factors go on linear layers only"
        for target in selection.targets
        if target.kind not in _KINDS
    }
    if unfit:
        raise ValueError(f"target_modules match modules that cannot be replaced: {told_by_reason(unfit)}")
    return replace(selection, targets=[replace(target, kind=_KINDS[target.kind]) for target in selection.targets])


def factors_for(selection: Selection, **own: Any) -> SharedFactors:
    """Return factors that all chosen layers can share, on the device of the first, in the dtype of the adapters.

    `own` are further keywords of `SharedFactors`. Raises ValueError where the layers are on several devices or in
    several dtypes, so that no A could be that of all.
    """
    first, *_ = selection.targets
    shapes = [sizes_of(target) for target in selection.targets]
    K, N = (max(each) for each in zip(*shapes, strict=True))
    weights: list[Any] = [target.module.weight for target in selection.targets]
    places = {str(w.device) for w in weights}
    dtypes = {target.settings.dtype_beside(w.dtype) for target, w in zip(selection.targets, weights, strict=True)}
    if len(places) > 1 or len(dtypes) > 1:
        raise ValueError(
            f"one A and one B cannot be shared by layers on {sorted(places)} whose adapters are in "
            f"{sorted(map(str, dtypes))}: choose layers of one device and one dtype, or give adapter_dtype"
        )
    return SharedFactors(first.settings.r, K, N, device=weights[0].device, dtype=dtypes.pop(), **own)


def sizes_of(target: Target) -> tuple[int, int]:
    """Return in_features and out_features of a chosen layer."""
    kind: Any = target.kind
    sizes: tuple[int, int] = kind.sizes_of(target.module)
    return sizes


def put_shared(
    model: nn.Module,
    selection: Selection,
    factors: SharedFactors,
    fill: Callable[[str, AdapterLayer], None] | None = None,
) -> ApplyReport:
    """Replace every chosen layer by one over `factors`, make these a child of the model, and return the report. `fill`
    is that of `put_layers`. On an error nothing is changed."""
    with _over(model, selection, factors, fill) as (selection, place):
        return put_layers(model, selection, place)


@contextlib.contextmanager
def _over(
    model: nn.Module,
    selection: Selection,
    factors: SharedFactors,
    fill: Callable[[str, AdapterLayer], None] | None = None,
) -> Iterator[tuple[Selection, Callable[[str, AdapterLayer], None]]]:
    """Give the body the choice with `factors` in its settings, and a function that makes them a child of the model when
    the first layer is made, and then calls `fill`. If the body raises, the model does not have them."""
    home = bare(model)
    if hasattr(home, shared_factors.NAME):
        raise ValueError(
            f"the model has an attribute {shared_factors.NAME!r} already, where the shared factors would be: rename it"
        )
    targets = [
        replace(target, settings=replace(target.settings, factors=factors))  # type: ignore[call-arg]
        for target in selection.targets
    ]

    def place(name: str, layer: AdapterLayer) -> None:
        if name == targets[0].name:
            shared_factors.placed(home, factors, layer)
        if fill is not None:
            fill(name, layer)

    try:
        yield replace(selection, targets=targets), place
    except BaseException:
        shared_factors.removed(model)
        raise


def shared_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with shared factors in `model`, by plain name."""
    return {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, SharedAdapter)}
