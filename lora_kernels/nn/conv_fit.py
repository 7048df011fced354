"""Whether a convolution can have an adapter, and with which settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_kernels.nn import fit
from lora_kernels.nn.settings import LoRASettings


def why_not(module: nn.Module, plain: type[nn.Module]) -> str:
    """Return why no layer with an adapter can take the place of `module`, or "" where one can. `plain` is torch's class
    of convolutions in these dimensions."""
    kind = type(module)
    if kind is not plain:
        why = f"a {kind.__name__}, not torch's own nn.{plain.__name__}"
        if isinstance(module, plain):
            why += ": a subclass may compute something else"
        elif getattr(module, "transposed", False):
            why += ": LoRA over a transposed convolution is not there, neither here nor in PEFT"
        return why
    if type(module.weight) is not nn.Parameter:
        return (
            f"its weight is a {type(module.weight).__name__}, not a plain Parameter: where it is parametrised or "
            "pruned, make it plain first, with torch.nn.utils.parametrize.remove_parametrizations or prune.remove"
        )
    if fit.has_hooks(module):
        return "it has hooks, which would be lost: remove them, and put them on the new module"
    return ""


def check(conv: Any, settings: LoRASettings, grouped: bool) -> None:
    """Raise ValueError or TypeError for settings that do not go with `conv`."""
    settings.check()
    settings.dtype_beside(conv.weight.dtype)
    if settings.quant is not None or settings.init != "kaiming":
        raise ValueError(
            f"a convolution takes no quant and no init but 'kaiming'; got quant={settings.quant!r}, "
            f"init={settings.init!r}"
        )
    if settings.r % conv.groups:
        raise ValueError(f"r must be a multiple of groups; got r={settings.r}, groups={conv.groups}")
    if settings.use_dora and conv.groups > 1 and not grouped:
        raise ValueError(
            f"DoRA over groups={conv.groups} needs an A in groups: make the layer with grouped=True. An A that sees "
            "all channels has no W + s·B A of W's shape, whose norm DoRA takes"
        )
