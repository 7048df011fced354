"""The conditions under which a fused layer may take over the table of an embedding, and the settings it may have."""

from __future__ import annotations

from torch import Tensor, nn

from lora_kernels.backends import dispatch
from lora_kernels.nn import fit
from lora_kernels.nn.settings import LoRASettings


def why_not(module: nn.Module) -> str:
    """Return why a `FusedLoRAEmbedding` cannot stand in for `module`, or "" where it can."""
    kind = type(module)
    if not isinstance(module, nn.Embedding):
        return f"a {kind.__name__}, not an nn.Embedding"
    if kind is not nn.Embedding and not is_scaled(module):
        return f"a {kind.__name__}: a subclass of nn.Embedding may compute something else"
    if type(module.weight) is not nn.Parameter:
        return f"its weight is a {type(module.weight).__name__}, not a plain Parameter"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}, quantised already"
    if reason := why_not_options(module):
        return reason
    if module.sparse:
        return "sparse=True, and the gradient of A is dense here: set sparse to False"
    if fit.has_hooks(module):
        return "it has hooks, which would be lost: remove them, and put them on the new module"
    return ""


def why_not_options(module: nn.Embedding) -> str:
    """Return which option of an embedding has no place beside a frozen table and an adapter; "" where none is set."""
    if module.max_norm is not None:
        return (
            f"max_norm={module.max_norm:g}, which rewrites rows of the table in every forward: renormalise the table "
            "once, and set max_norm to None"
        )
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq, which the gradient of A does not have here: set it to False"
    return ""


def is_scaled(module: nn.Module) -> bool:
    """Return whether `module` is one of the scaled embeddings of transformers, whose forward is
    ``super().forward(ids) * embed_scale``."""
    kind = type(module)
    known = kind.__name__.endswith("ScaledWordEmbedding") and kind.__module__.startswith("transformers.")
    e = getattr(module, "embed_scale", None)
    return known and (isinstance(e, (int, float)) or (isinstance(e, Tensor) and e.numel() == 1))


def check(settings: LoRASettings) -> None:
    """Raise ValueError for settings that an embedding cannot have."""
    settings.check()
    if settings.quant is not None or settings.double_quant:
        raise ValueError(f"quant={settings.quant!r} is for linear layers: the table of an embedding is not quantised")
    if settings.init != "kaiming":
        raise ValueError(
            f"init={settings.init!r} is for linear layers: the A of an embedding starts zero, and its B normal(0, 1)"
        )
    if settings.backend is not None and settings.backend not in dispatch.BACKENDS:
        raise ValueError(f"there is no back-end {settings.backend!r}: one of {', '.join(dispatch.BACKENDS)}, or None")
