"""`load_loralib` reads the checkpoints of loralib, Microsoft's first implementation of LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.models.adapter_files import LORALIB_KEY, Parts, StoredAdapters, adapters_of, read_weights
from lora_kernels.models.foreign import Foreign, as_convolution, is_convolution, put_foreign
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_name, plain_names
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.targets import some


def load_loralib(
    model: nn.Module,
    state: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    lora_alpha: float | None = None,
    conv_rank: int | None = None,
) -> ApplyReport:
    """Load the result of ``loralib.lora_state_dict`` into `model`: ``<name>.lora_A`` and ``<name>.lora_B``, which are
    [r, in] and [out, r] for a linear layer, and [r, V] and [D, r] for an embedding.

    loralib's Conv2d has A [r·k, C·k] and B [N·k, r·k], and the update ΔW = s·(B A).view(W): a product whose rank has
    no meaning for the convolution. It is factored anew by an SVD of ΔW as a matrix [N, C·k·k], with lora_alpha such
    that s stays the same. The rank is as high as the update needs, at most r·k·k, or `conv_rank`; the report's
    `converted` tells the relative error. In a model with adapters it is the rank of its layer.

    Args:
        model: a model with adapters exactly where the state has them, with its ranks; or a plain model, which gets such
            layers, as by `apply_lora`, with everything else frozen.
        state: the dictionary, or a safetensors file. A ``.pt`` file is a pickle and is not opened here: pass
            ``torch.load(path, weights_only=True)``.
        lora_alpha: loralib's files do not contain it. A plain model needs it (loralib's own default is 1); None leaves
            that of existing layers as it is.
        conv_rank: the rank of the convolutions in a plain model; None takes the smallest that loses nothing.

    Biases in the state (``lora_state_dict(model, bias="all")``) are written into the parameters of that name.
    loralib's MergedLinear and convolutions with groups are refused, and so are layers with DoRA.

    Returns and raises as `load_adapter`.
    """
    if isinstance(state, Mapping):
        state, source = dict(state), "the state dict"
    elif Path(state).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{state} is a pickle and is not opened here: pass torch.load(path, weights_only=True)")
    else:
        state, source = read_weights(Path(state)), str(state)
    if conv_rank is not None and conv_rank < 1:
        raise ValueError(f"conv_rank must be at least 1, or None, got {conv_rank}")
    names = {name: module for name, _, module in plain_names(model)}
    biases = {key: state.pop(key) for key in list(state) if key.rpartition(".")[2] == "bias"}
    stored = adapters_of(state, LORALIB_KEY, False, source, names)
    values = _biases(biases, names, source)
    if lora_alpha is None and not lora_layers(model):
        raise ValueError("a loralib checkpoint does not hold lora_alpha: pass it (loralib's default is 1)")
    return put_foreign(model, _foreign(stored, names, lora_alpha, conv_rank), values)


def _biases(
    biases: Mapping[str, Tensor], names: Mapping[str, nn.Module], source: str
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters of the model that these biases are for, and their values. Raises ValueError for one that
    the model does not have."""
    values, bad = [], []
    for key, value in biases.items():
        name = plain_name(key.rpartition(".")[0], names)
        if name not in names:  # loralib's convolutions hold the plain one, and its bias, as their child "conv"
            name = name.removesuffix(".conv")
        own = getattr(names.get(name), "bias", None)
        if isinstance(own, nn.Parameter) and own.shape == value.shape and value.is_floating_point():
            values.append((own, value))
        else:
            bad.append(key)
    if bad:
        raise ValueError(f"{source}: the model has no such bias, or one of another shape: {some(bad)}")
    return values


def _foreign(
    stored: StoredAdapters, names: Mapping[str, nn.Module], lora_alpha: float | None, conv_rank: int | None
) -> Foreign:
    """Return the adapters with the parts of PEFT's format for the layers of the model."""
    layers: dict[str, Parts] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, parts in stored.layers.items():
        module: Any = names.get(name)
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        own_alpha = getattr(module, "lora_alpha", None)
        alpha = own_alpha if lora_alpha is None else lora_alpha
        r = a.shape[0]
        if is_convolution(module):
            k = _kernel(stored.source, name, module, a, b)
            delta = (b.double() @ a.double()).view(tuple(module.weight.shape))
            dtype = torch.promote_types(a.dtype, b.dtype)
            parts, errors[name] = as_convolution(delta, getattr(module, "r", conv_rank), dtype)
            converted = parts["lora_A.weight"].shape[0]
            if lora_alpha is not None:
                alpha = lora_alpha * converted / (r // k)
            r = converted
        elif hasattr(module, "num_embeddings"):
            parts = {"lora_embedding_A": a, "lora_embedding_B": b}
        layers[name], ranks[name], alphas[name] = parts, r, 1.0 if alpha is None else alpha
    rslora = None if lora_alpha is None else False
    return Foreign(StoredAdapters(stored.source, layers), ranks, alphas, rslora, errors=errors)


def _kernel(source: str, name: str, conv: Any, a: Tensor, b: Tensor) -> int:
    """Return the k of a convolution of loralib. Raises ValueError where A and B are not those of `conv`."""
    k, (N, C) = conv.kernel_size[0], (conv.out_channels, conv.in_channels)
    if conv.groups != 1 or len(set(conv.kernel_size)) != 1 or len(conv.kernel_size) != 2:
        raise ValueError(
            f"{source}: {name} is a convolution with groups={conv.groups} and a kernel of {conv.kernel_size}, and only "
            "loralib's Conv2d with a square kernel and without groups is converted. Nothing was loaded"
        )
    if a.shape[0] % k or a.shape[1] != C * k or b.shape[0] != N * k:
        raise ValueError(
            f"{source}: {name}.lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} should be (r·{k}, {C * k}) and "
            f"({N * k}, r·{k}) for this convolution: another base. Nothing was loaded"
        )
    return int(k)
