"""The names of modules without the wrappers around them: torch.compile, activation checkpointing, FSDP, DDP and others.

A wrapper holds the module that it wraps as a child, and so adds a part to the name of every module inside it. Files and
rules know these modules by their plain names, which do not change when a model is wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from itertools import combinations

from torch import nn
from torch.optim.swa_utils import AveragedModel

_OWN = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module")
"""Names of children that nothing but a wrapper has: of torch.compile, of torch's and fairscale's activation
checkpointing, of FSDP1, of fairscale's FSDP, and of Lightning Fabric."""
_SHARED = ("module", "_module")
"""Names of children that other modules may have too."""
WRAPPER = f"({'|'.join((*_OWN, *_SHARED))})"
"""A regular expression for the names of a wrapper's child."""
_OTHER_KINDS = {"DeepSpeedEngine": "module", "GradSampleModule": "_module"}
"""The child of the wrappers of other packages (DeepSpeed, Opacus), by the name of their class."""


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers around it."""
    while (child := _child(model)) is not None:
        model = getattr(model, child)
    return model


def plain_names(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield every module of a model once, without the wrappers: its name without them, its own name, and itself."""
    plain: dict[str, str] = {}
    wraps: dict[str, str | None] = {}
    for name, module in model.named_modules():
        above, _, last = name.rpartition(".")
        if not name:
            plain[name] = ""
        elif wraps[above] == last:
            plain[name] = plain[above]
        else:
            plain[name] = f"{plain[above]}.{last}" if plain[above] else last
        wraps[name] = _child(module)
        if wraps[name] is None:
            yield plain[name], name, module


def plain_name(stored: str, names: Collection[str]) -> str:
    """Return the name that a model whose plain names are `names` has for a name in a file.

    The file may have been written from a wrapped model. A part "module" may be a module's own name: it is left out only
    if `names` has the name without it and not the name with it.
    """
    parts = [part for part in stored.split(".") if part not in _OWN]
    name = ".".join(parts)
    shared = [i for i, part in enumerate(parts) if part in _SHARED][:4]
    if name not in names:
        for count in range(1, len(shared) + 1):
            for left_out in combinations(shared, count):
                shorter = ".".join(part for i, part in enumerate(parts) if i not in left_out)
                if shorter in names:
                    return shorter
    return name


def plain_rules(names: Collection[str]) -> Callable[[str], str]:
    """Return a function of a name or a regular expression in a file's config, which returns it without the parts that
    wrappers have added. A part "module" is left out if no module of the model, whose plain names are `names`, is called
    so."""
    parts = _OWN if any(not set(_SHARED).isdisjoint(name.split(".")) for name in names) else (*_OWN, *_SHARED)
    either = "|".join(parts)
    added = re.compile(rf"(?<!\w)({either})\\?\.|\\?\.({either})(?!\w)")
    return lambda rule: added.sub("", rule)


def _child(module: nn.Module) -> str | None:
    """Return the name of the child that `module` is a wrapper of, or None if it is no wrapper."""
    children = module._modules
    for name in _OWN:
        if name in children:
            return name
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
        return "module"
    for kind in type(module).__mro__ if "module" in children or "_module" in children else ():
        if kind.__name__ in _OTHER_KINDS:
            return _OTHER_KINDS[kind.__name__]
    return None
