"""`lora_ga`: LoRA in a plain model, initialised by LoRA-GA from the gradients of a few batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.backends import dispatch
from lora_kernels.models.inject import put_layers, warn_of
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.selection import Target, select
from lora_kernels.models.targets import Names, Rules, some, told_by_reason
from lora_kernels.nn.construct import put_split
from lora_kernels.nn.init import checked
from lora_kernels.nn.init_gradient import check_rank, gradient_factors
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.low_rank import Part, finite, minus
from lora_kernels.nn.settings import LoRASettings
from lora_kernels.train.gradients import Loss, blocks_of, mean_gradients

_T = TypeVar("_T")


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model of transformers gives for a batch with labels."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a {type(batch).__name__} and no mapping of keywords: give loss=, such as "
                         "lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])")  # fmt: skip
    loss: Tensor = model(**batch).loss
    return loss


@torch.inference_mode(False)  # what is made in inference mode could not be trained later
def lora_ga(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: Names = "all-linear",
    exclude_modules: Names | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    adapter_dtype: torch.dtype | None = None,
    backend: str | None = None,
    gamma: float = 16.0,
    memory: int = 4 << 30,
) -> ApplyReport:
    """Put LoRA on the linear layers of `model` as `apply_lora` does, with the first values of LoRA-GA:

        G = U S Vᵀ = mean of dL/dW over the batches
        A = c V[:, :r]ᵀ,   B = c U[:, r:2r],   c = N^¼ / √γ,   W ← W - s·B A.

    The model computes what it did before, up to the rounding of W. Its first steps change it nearly as full fine-tuning
    would (Wang, Yu and Li, 2024, arXiv:2407.05000).

    The gradients of the layers are found in blocks, each in a pass over the batches of its own, so that never more than
    `memory` bytes of gradients are alive. Of each, only A and B are kept. A bar on the terminal shows the progress,
    where rich is installed and stderr is a terminal.

    Args:
        model: any module, in the mode and under the autocast that its forward is to have. It is changed in place.
        batches: what is iterated over, once for each block: a list, or a DataLoader. Some 8 to 64 batches do. Where
            torch.distributed runs, each rank gives its own, and all ranks get the same adapters.
        loss: ``loss(model, batch)``, one number. None is ``model(**batch).loss``, as models of transformers give it.
        gamma: γ. The first update s·B A, which is taken out of W, has the norm s·√(N r) / γ.
        memory: the most bytes of gradients that are alive at a time: four for each element of the weights of a block,
            and of one more. The activations of a forward and backward come in addition.
        The other arguments are those of `apply_lora`. The authors scale by `use_rslora`.

    Raises:
        ValueError, TypeError: as `apply_lora`; a layer that is not linear; a weight that is quantised, not finite, or
            in fp64; an r above min(N, K) / 2; a layer that no batch reaches, or whose gradient is not finite or has a
            rank below 2r; batches that can be read once, where there are several blocks; a loss that is not one number;
            a model inside DistributedDataParallel.
        After any of these, the model is unchanged.
    """
    loss = loss or _loss_of_output
    settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend)
    rules = Rules(
        target_modules, exclude_modules, rank_pattern, alpha_pattern, layers_to_transform, layers_pattern
    )  # fmt: skip
    _refuse_wrapped(model)
    selection = select(model, settings, rules)
    if backend is not None:
        dispatch.load(backend)
    _check(selection.targets, gamma)
    warn_of(selection.read, selection.doubted)
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    unfit: dict[str, str] = {}
    layers = {target.name: target.module for target in selection.targets}
    own = {target.name: target for target in selection.targets}
    with _progress(batches, len(blocks_of(layers, memory))) as advance:
        for name, gradient in mean_gradients(model, layers, batches, loss, memory, advance):
            try:
                starts[name] = _start(own[name], gradient, gamma)
            except ValueError as error:
                unfit[name] = str(error)
            del gradient  # before the next block's gradients are made
    if unfit:
        raise ValueError(
            f"these batches give LoRA-GA no first values for some layers: {told_by_reason(unfit)}. Leave them out with "
            "exclude_modules, give them a smaller r with rank_pattern, or give more or other batches"
        )

    def fill(name: str, layer: Any) -> None:
        a, b = starts.pop(name)
        w = layer.frozen_weight()
        base = minus(w, a, b, layer.scaling, w.dtype)
        put_split(layer, "lora_ga", _named(name, lambda: finite("W - s·B A", base)), a, b)

    return put_layers(model, selection, fill)


def _start(target: Target, gradient: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """Return A and B of a target for the gradient of its weight. All ranks get those of the first: equal gradients may
    decompose differently on unequal machines. Raises ValueError for a gradient that gives none."""
    if gradient is None:
        raise ValueError(
            "there is no gradient: the loss does not depend on the layer, or reentrant activation checkpointing passes "
            "none on, which model.enable_input_require_grads() mends"
        )
    kind: Any = target.kind
    module: Any = target.module
    settings = target.settings
    dtype = settings.dtype_beside(module.weight.dtype)
    start = gradient_factors(kind.turned(gradient), settings.r, gamma, dtype)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for factor in start:
            dist.broadcast(factor, 0)
    return start


def _check(targets: Sequence[Target], gamma: float) -> None:
    """Raise ValueError or TypeError for what LoRA-GA cannot initialise, before any gradient is computed."""
    others = [target.name for target in targets if not issubclass(target.kind, FusedLoRALinear)]
    if others:
        raise ValueError(f"LoRA-GA is for linear layers, and these are not: {some(others)}. Leave them out")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    for target in targets:
        module: Any = target.module
        kind: Any = target.kind
        settings = target.settings

        def check(w: Tensor = module.weight, kind: Any = kind, settings: LoRASettings = settings) -> None:
            settings.check()
            check_rank(kind.turned(w).shape, settings.r)
            checked(kind.turned(w), Part(settings.r, settings.scaling, None, settings.dtype_beside(w.dtype)))

        _named(target.name, check)


def _named(name: str, call: Callable[[], _T]) -> _T:
    """Return what the call returns. Its errors name the layer."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError where DistributedDataParallel waits for the gradients of all parameters that it found."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("the model is in DistributedDataParallel already: call lora_ga first, then wrap the model")


@contextmanager
def _progress(batches: Any, passes: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each batch of each pass. It draws a bar if there is a terminal to draw it on."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda: None
        return
    try:
        total = passes * len(batches)
    except TypeError:  # a DataLoader over an iterable has no length
        total = None
    columns = TextColumn("gradients for LoRA-GA"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
