"""Modules as nn.DataParallel replicates them, without its GPUs."""

from __future__ import annotations

from typing import Any

from torch import nn


def replica(module: nn.Module) -> Any:
    """As ``nn.parallel.replicate`` makes them: parameters are plain attributes there."""
    other: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        other._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            other._parameters[name] = None
        else:
            setattr(other, name, parameter.view_as(parameter))
    return other
