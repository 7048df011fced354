"""Replicas of modules as nn.DataParallel makes them, without its GPUs."""

from __future__ import annotations

from typing import Any

from torch import nn


def replica(module: nn.Module) -> Any:
    """Return a replica as ``nn.parallel.replicate`` makes it: its parameters are plain attributes."""
    other: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        other._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            other._parameters[name] = None
        else:
            setattr(other, name, parameter.view_as(parameter))
    return other
