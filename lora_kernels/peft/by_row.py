"""Rows of a fused PEFT layer that have adapters of their own: PEFT's ``adapter_names``, `mixed`, and activated LoRA.

`Rows` are made from what PEFT hands to a layer. They are kept by its content alone, so nothing makes them stale: PEFT
hands the same names, or offsets, to all layers of a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lora_kernels.core.many import Adapter
from lora_kernels.core.rows import BASE, BASE_NAMES, Rows
from lora_kernels.nn.mixed import Mixed
from lora_kernels.peft.layer import FusedLayer
from lora_kernels.peft.reading import Operands

KEYWORDS = frozenset(("adapter_names", *getattr(peft_layer, "VARIANT_KWARG_KEYS", ())))
"""Keywords of PEFT's forward that are not for the base layer. Plain LoRA accepts and ignores those of its variants."""

_KEPT = 32
"""The number of `Rows` that are kept: a decoder alternates between a few, the one of its prompt and of its tokens."""

Offsets = tuple[int | None, ...]
"""PEFT's ``alora_offsets``: for each sample, the number of tokens from its invocation tokens to its end; None, and 0,
where they do not occur."""


@functools.lru_cache(_KEPT)
@torch.inference_mode(False)  # autograd cannot save a tensor of inference mode later
def rows_of_names(names: tuple[str, ...]) -> Rows:
    """Return the rows of samples that have these adapters. They are numbered in the order in which they occur."""
    return Rows.by_sample(names, names_in(names))


@functools.lru_cache(_KEPT)
@torch.inference_mode(False)  # autograd cannot save a tensor of inference mode later
def rows_of_offsets(names: tuple[str, ...], offsets: Offsets, activated: frozenset[str], tokens: int) -> Rows:
    """Return the rows of samples of `tokens` tokens, where an adapter of `activated` has the last tokens only, as many
    as the sample's offset says. The adapters are numbered as by `rows_of_names`."""
    numbers = {name: i for i, name in enumerate(names_in(names))}
    lengths, which = [], []
    for name, offset in zip(names, offsets, strict=True):
        own = min(offset or 0, tokens) if name in activated else tokens
        lengths += [tokens - own, own]
        which += [BASE, numbers.get(name, BASE)]
    return Rows.by_length(lengths, which, len(numbers))


def rows_for(
    x: Tensor, operands: Operands, names: Sequence[str] | None, offsets: Sequence[int | None] | None
) -> tuple[list[tuple[str, int]], Rows]:
    """Return the names and numbers of the adapters of a forward, and its rows. Without `names` the only adapter of
    `operands` has all samples of x."""
    samples = tuple(names if names is not None else list(operands.adapters) * x.shape[0])
    numbers = [(name, i) for i, name in enumerate(names_in(samples))]
    compiling = torch.compiler.is_compiling()  # a compiler warns of caches, and looks into none
    if not operands.activated:
        return numbers, (rows_of_names.__wrapped__ if compiling else rows_of_names)(samples)
    activated = frozenset(name for name, adapter in operands.adapters.items() if adapter.activated)
    own: Offsets = (None,) * len(samples) if offsets is None else tuple(offsets)
    of_offsets = rows_of_offsets.__wrapped__ if compiling else rows_of_offsets
    return numbers, of_offsets(samples, own, activated, x.shape[1] if x.dim() > 2 else 1)


def why_not_offsets(x: Tensor, offsets: Sequence[int | None] | None) -> str | None:
    """Return why an activated LoRA is left to PEFT's own forward, "" where it has no token in x; None where it is
    served. PEFT's forward then gives its A and B gradients of zeros."""
    if x.dim() not in (2, 3):
        return f"an activated LoRA beside an x of {x.dim()} dimensions"
    if offsets is None or not any(offsets):
        return ""
    if len(offsets) != x.shape[0]:
        return f"alora_offsets for {len(offsets)} samples beside {x.shape[0]}"
    return None


def names_in(names: Iterable[str]) -> list[str]:
    """Return the adapters among `names`, in the order in which they occur."""
    return [name for name in dict.fromkeys(names) if name not in BASE_NAMES]


def forward_in(context: Mixed, layer: Any, x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the y of a fused layer, where each row of x is computed with the adapter that it has in `context`. Raises
    RuntimeError where one of these adapters cannot be computed by row."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError("adapter_names was given inside the context lora_kernels.mixed: use one of the two")
    kwargs = {key: value for key, value in kwargs.items() if key not in KEYWORDS}
    counts = context.rows.known_counts
    numbers = [(name, i) for name, i in context.table.items() if counts is None or counts[i]]
    unused = not numbers and layer.training and torch.is_grad_enabled()
    if unused:  # a backward needs a graph, in which those that are trained get no gradient
        numbers = list(context.table.items())
    operands = "" if layer.disable_adapters else layer.read(x, args, kwargs, [name for name, _ in numbers], True)
    if operands == "" or (unused and (isinstance(operands, str) or operands.activated)):
        # none of these adapters is in this layer, or there is none that could have rows
        if not torch.compiler.is_compiling():
            layer.count_left("")
        return layer.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
    if not isinstance(operands, str) and operands.activated and context.rows.per_sample:
        operands = "an activated LoRA needs an id for each token, and mixed was given one for each sample"
    if isinstance(operands, str):
        raise RuntimeError(f"a {layer.peft_class.__name__} cannot compute its rows by adapter: {operands}")
    if not torch.compiler.is_compiling():
        layer.__dict__["fused_calls"] += 1
    return layer.compute_rows(x, operands, numbers, context.of(x))  # type: ignore[no-any-return]


def many(operands: Operands, numbers: Sequence[tuple[str, int]], n: int) -> list[Adapter | None]:
    """Return the adapters of `operands` as `lora_linear_multi` takes them, each at its number of n.

    Adapters of several dtypes are computed in fp32, and so are adapters in 16 bits where the base is.
    """
    found: list[Adapter | None] = [None] * n
    adapters = operands.adapters
    dtype = next(iter(adapters.values())).a.dtype
    several = any(each.a.dtype != dtype for each in adapters.values())
    wide = several or (operands.inner == torch.float32 and dtype != torch.float32)
    for name, i in numbers:
        if name in adapters:
            a, b, bias, scale, p, _, _ = adapters[name]
            if wide:
                a, b = a.float(), b.float()
            found[i] = Adapter(a, b, scale, p, None, bias)
    return found


def adapter_table(model: nn.Module) -> dict[str, int]:
    """Return the numbers of the adapters of a fused model: the order of its ``peft_config``.

    Raises RuntimeError where a part of the model has adapters and is not fused. It would compute the active adapter for
    every row.
    """
    config: dict[str, object] = {}
    layers: list[Any] = []
    kinds: dict[type, str] = {}  # asking a class takes microseconds, and a model has thousands of modules
    for module in model.modules():
        kind = type(module)
        what = kinds.get(kind)
        if what is None:
            what = kinds[kind] = _what_is(kind)
        if what == "fused":
            layers.append(module)
        elif what == "unfused":
            raise RuntimeError(
                "parts of this model cannot compute each row with an adapter of its own:" + _unfused(model)
            )
        elif not config and isinstance(found := module.__dict__.get("peft_config"), dict):
            config = found
    names = config or dict.fromkeys(name for layer in layers for name in layer.lora_A)
    return {name: i for i, name in enumerate(names)}


def _what_is(kind: type) -> str:
    """Return "fused" for a layer that computes by row, "unfused" for another one that has adapters, and "" else."""
    if hasattr(kind, "adapter_table"):
        return "fused"
    return "unfused" if issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper)) else ""


def _unfused(model: nn.Module) -> str:
    """Return a line for each module that has adapters and is not fused."""
    lines = ""
    for path, module in model.named_modules():
        kind = type(module)
        if _what_is(kind) != "unfused":
            continue
        if issubclass(kind, AuxiliaryTrainingWrapper):
            what = "a copy of its own for each adapter" if hasattr(module, "modules_to_save") else "trainable tokens"
            lines += f"\n  {path}: a {kind.__name__}, which has {what}"
        elif issubclass(kind, FusedLayer):
            lines += f"\n  {path}: a {kind.__name__}, which computes the same adapters for all rows"
        else:
            name = f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}"
            lines += f"\n  {path}: a {name} that is not fused; lora_kernels.fuse(model) says why"
    return lines
