"""`load_loralib` reads the checkpoints of loralib, Microsoft's first implementation of LoRA."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lora_kernels.models.adapter_files import LORALIB_KEY, adapters_of, read_weights
from lora_kernels.models.adapter_values import apply_stored, fill_stored
from lora_kernels.models.kinds import lora_layers
from lora_kernels.models.names import plain_name, plain_names
from lora_kernels.models.reports import ApplyReport
from lora_kernels.models.selection import select
from lora_kernels.models.targets import Rules, some
from lora_kernels.nn.settings import LoRASettings


def load_loralib(
    model: nn.Module,
    state: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    lora_alpha: float | None = None,
) -> ApplyReport:
    """Load the result of ``loralib.lora_state_dict`` into `model`: ``<name>.lora_A`` [r, in], ``<name>.lora_B``
    [out, r].

    Args:
        model: a model with `FusedLoRALinear` layers exactly where the state has adapters, with its ranks; or a plain
            model, which gets such layers, as by `apply_lora`, with everything else frozen.
        state: the dictionary, or a safetensors file. A ``.pt`` file is a pickle and is not opened here: pass
            ``torch.load(path, weights_only=True)``.
        lora_alpha: loralib's files do not contain it. A plain model needs it (loralib's own default is 1); None leaves
            that of existing layers as it is.

    Biases in the state (``lora_state_dict(model, bias="all")``) are written into the parameters of that name.
    loralib's MergedLinear, Embedding and convolutions are refused, and so are layers with DoRA.

    Returns and raises as `load_adapter`.
    """
    if isinstance(state, Mapping):
        state, source = dict(state), "the state dict"
    elif Path(state).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{state} is a pickle and is not opened here: pass torch.load(path, weights_only=True)")
    else:
        state, source = read_weights(Path(state)), str(state)
    names = {name: module for name, _, module in plain_names(model)}
    biases = {key: state.pop(key) for key in list(state) if key.rpartition(".")[2] == "bias"}
    stored = adapters_of(state, LORALIB_KEY, False, source, names)
    values, bad = [], []
    for key, value in biases.items():
        own = getattr(names.get(plain_name(key.rpartition(".")[0], names)), "bias", None)
        if isinstance(own, nn.Parameter) and own.shape == value.shape and value.is_floating_point():
            values.append((own, value))
        else:
            bad.append(key)
    if bad:
        raise ValueError(f"{source}: the model has no such bias, or one of another shape: {some(bad)}")
    layers = lora_layers(model)
    if layers:
        alphas = {name: layer.lora_alpha if lora_alpha is None else lora_alpha for name, layer in layers.items()}
        return fill_stored(model, stored, alphas, None, values)
    if lora_alpha is None:
        raise ValueError("a loralib checkpoint does not hold lora_alpha: pass it (loralib's default is 1)")
    exact = "|".join(re.escape(name) for name in stored.layers if name in names) or re.escape(next(iter(stored.layers)))
    try:
        selection = select(model, LoRASettings(lora_alpha=lora_alpha), Rules(exact))
    except ValueError as error:
        raise ValueError(f"{source} is of another base, or of layers not supported here: {error}") from None
    targets = [
        replace(target, settings=replace(target.settings, r=stored.layers[target.name]["lora_A.weight"].shape[0]))
        for target in selection.targets
    ]
    return apply_stored(model, replace(selection, targets=targets), stored, values)
