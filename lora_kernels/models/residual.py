"""ResLoRA in a plain PyTorch model: `apply_reslora` puts LoRA on its layers, with shortcuts from block to block."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn

from lora_kernels.models.inject import apply_lora
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.residual_chains import Line, lines_of, refuse_experts
from lora_kernels.models.selection import Target, select
from lora_kernels.models.targets import Names, Rules, some
from lora_kernels.nn.base import AdapterLinear
from lora_kernels.nn.residual import KINDS, ResLoRALinear, Structure
from lora_kernels.nn.residual_calls import Chain
from lora_kernels.nn.settings import LoRASettings


@dataclass(frozen=True)
class ResLoRAReport(ApplyReport):
    """The layers that `apply_reslora` replaced, their shortcuts, and the layers that it left. ``str()`` of it is a
    table."""

    structure: Structure = "bs"
    """"bs", "is" or "ms"."""
    shortcuts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The earlier layers that each layer has shortcuts from, the nearest first."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The rank of the LoRA layer that each one computes: Σ r in "bs"."""

    def __str__(self) -> str:
        having = [name for name, earlier in self.shortcuts.items() if earlier]
        most = max(len(earlier) for earlier in self.shortcuts.values())
        line = (
            f'structure "{self.structure}": {len(having)} of {len(self.shortcuts)} layers have shortcuts, from up to '
        )
        line += f"{most} earlier block{'s' * (most > 1)}"
        if self.structure == "bs":
            line += f"; each computes LoRA of a rank up to {max(self.ranks.values())}"
        without = [name for name, earlier in self.shortcuts.items() if not earlier]
        return f"{super().__str__()}\n{line}\nwithout a shortcut, first of their kind and size: {some(without)}"


def apply_reslora(
    model: nn.Module,
    structure: Structure = "bs",
    *,
    previous: int | None = 1,
    blocks: str | None = None,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: Names | None = None,
    exclude_modules: Names | None = None,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: Names | None = None,
    adapter_dtype: torch.dtype | None = None,
    backend: str | None = None,
    quant: str | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    verify: Any = None,
) -> ResLoRAReport:
    """Put ResLoRA on every linear layer that matches, in place: LoRA whose layers have shortcuts from those of the same
    kind in earlier blocks (see `lora_kernels.nn.residual.ResLoRALinear` for the formulas). Everything else is frozen.

    Shi et al., "ResLoRA: Identity Residual Mapping in Low-Rank Adaption", 2024 (arXiv:2402.18039).

    Args:
        model: as for `apply_lora`.
        structure: "bs" adds the low-rank updates of earlier blocks, on the own x, and is exactly a LoRA of rank Σ r.
            "is" adds the x of the block before, and "ms" the A x of earlier blocks. These two are for training: they
            merge only approximately, with `reslora_to_lora`.
        previous: from how many earlier blocks; None is from all of them. "is" knows one only.
        blocks: the name of the list of blocks, for models whose layers have several numbers in their names: of
            "stages.1.blocks.3.fc" the block's number is 1 by default, and 3 with blocks="blocks".
        r, lora_alpha, and all others: as for `apply_lora`, but the layers are linear ones (``nn.Linear`` and
            transformers' Conv1D). `quant` goes with every structure.

    Layers belong together whose names differ only in the number of the block. A layer of another size than the one
    before it has no shortcut from it, as in the official code. Blocks that got no adapter are passed over.

    Returns:
        A `ResLoRAReport`.

    Raises:
        ValueError: an unknown structure; a `previous` below 0, or other than 1 for "is"; no layer with another of its
            kind before it; layers that are not linear; in "ms" ranks that differ within a chain; in "is" and "ms"
            layers of experts; `blocks` that is in no name; and what `apply_lora` raises.
        TypeError, ImportError, re.error: as `apply_lora`.
        After any of these, the model is unchanged.
    """
    _check(structure, previous)
    chosen: dict[str, Any] = {
        "target_modules": "all-linear" if target_modules is None else target_modules,
        "exclude_modules": exclude_modules,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
    }
    settings: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "adapter_dtype": adapter_dtype,
        "backend": backend,
        "quant": quant,
        "blocksize": blocksize,
        "double_quant": double_quant,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # apply_lora gives them
        targets = select(model, LoRASettings(**settings), Rules(**chosen)).targets
    lines = _lines(targets, structure, previous, blocks)
    around = {line: line.around(model) for line in lines} if structure != "bs" else {}
    report = apply_lora(model, **chosen, **settings, verify=verify)
    layers: dict[str, Any] = dict(lora_layers(model))
    for line in lines:
        _connect(line, layers, structure, previous, around.get(line))
    connected: dict[str, ResLoRALinear] = {layer.name: layers[layer.name] for layer in report.layers}
    own_names = {id(layer): name for name, layer in connected.items()}
    return ResLoRAReport(
        **{name: getattr(report, name) for name in ApplyReport.__dataclass_fields__},
        structure=structure,
        shortcuts={n: tuple(own_names[id(each)] for each in reversed(la.earlier)) for n, la in connected.items()},
        ranks={name: layer.total_rank for name, layer in connected.items()},
    )


def _check(structure: str, previous: int | None) -> None:
    if structure not in get_args(Structure):
        raise ValueError(f'structure must be "bs", "is" or "ms", got {structure!r}')
    if previous is not None and (not isinstance(previous, int) or isinstance(previous, bool) or previous < 0):
        raise ValueError(f"previous must be a number of blocks, or None for all, got {previous!r}")
    if structure == "is" and previous != 1:
        raise ValueError(
            f"the input shortcut is from one block, the one before: previous must be 1, got {previous!r}. "
            'structure="bs" and "ms" take several'
        )


def _lines(targets: Sequence[Target], structure: Structure, previous: int | None, blocks: str | None) -> list[Line]:
    """Return the chains of the targets. Raises ValueError where shortcuts cannot be made."""
    other = [f"{t.name} (a {type(t.module).__name__})" for t in targets if not issubclass(t.kind, AdapterLinear)]
    if other:
        raise ValueError(f"ResLoRA is for linear layers, and these are none: {some(other)}")
    if structure != "bs":
        refuse_experts([target.name for target in targets])
    sizes = {target.name: "{} → {}".format(*target.kind.sizes_of(target.module)) for target in targets}  # type: ignore[attr-defined]
    lines = lines_of(sizes, blocks)
    ranks = {target.name: target.settings.r for target in targets}
    for line in lines if structure == "ms" and previous != 0 else ():
        if len({ranks[name] for name in line.names}) > 1:
            told = [f"{name} ({ranks[name]})" for name in line.names]
            raise ValueError(
                f"the middle shortcut adds the A x of several layers, so they need one rank: {some(told)}. Leave out "
                'rank_pattern, or take structure="bs"'
            )
    return lines


def _connect(
    line: Line,
    layers: Mapping[str, Any],
    structure: Structure,
    previous: int | None,
    around: tuple[str, nn.Module] | None,
) -> None:
    """Give the layers of a chain their shortcuts."""
    most = len(line.names) - 1 if previous is None else min(previous, len(line.names) - 1)
    chain = Chain(line.names, around[0] if around else "", most)
    for place, name in enumerate(line.names):
        layer = layers[name]
        layer.__class__ = KINDS[type(layer)]
        layer.connect(structure, chain, place, [layers[each] for each in line.names[max(0, place - most) : place]])
    if around is not None and most:
        chain.put_around(around[1])
