"""Layers that are fused when PEFT makes them: `enable` for all models of a process, `register` for one config.

Both serve code that builds the PEFT model itself. `enable` replaces a private method of PEFT, and needs no access to
the config. `register` uses PEFT's own table of custom layers, changes nothing outside of the config, and so leaves the
other models of the process alone.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, TypeVar

from lora_kernels.peft import kinds
from lora_kernels.peft.fusing import _swap  # raises the error that says how to get PEFT

# isort: split
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from lora_kernels.peft.layer import FusedLayer

Config = TypeVar("Config", bound=LoraConfig)

_LOCK = threading.Lock()
"""Held while PEFT's method is looked at and replaced."""


class _FusingFactory:
    """A factory of LoRA layers, `before`, whose layers are fused while `enable` is in force."""

    enabled: bool | None = None
    """Whether the last call was `enable` (True) or `disable` (False); None if there was none."""

    def __init__(self, before: Any) -> None:
        self.before = before
        """The static method that `enable` found: PEFT's own, or another package's around it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.before.__func__(*args, **kwargs)
        return _fused(module) if self.enabled else module


def _fused(module: Any) -> Any:
    """Return `module`, a layer that PEFT has just made, with its fused forward if it has one.

    Base and adapter are not checked here. They may still change, and every forward checks them.
    """
    if not isinstance(module, FusedLayer) and not isinstance(kind := kinds.fused_kind(type(module), module), str):
        _swap(module, kind, None)
    return module


def enable() -> None:
    """Fuse every LoRA linear that PEFT makes from now on, until `disable`.

    It is for code that builds the PEFT model itself, such as TRL's trainers, and the ``add_adapter`` and
    ``load_adapter`` of transformers and diffusers. Layers that were made before stay as they are. Calling it twice does
    no more than once, and threads may call it at the same time.
    """
    with _LOCK:
        _FusingFactory.enabled = True
        found = LoraModel.__dict__["_create_new_module"]
        if not isinstance(found.__func__, _FusingFactory):
            LoraModel._create_new_module = staticmethod(_FusingFactory(found))  # type: ignore[method-assign]


def disable() -> None:
    """Undo `enable`, and the environment variable ``LORA_KERNELS=1``: layers that PEFT makes from now on are not fused.
    Fused layers stay fused until `unfuse`, and the layers of a config that was registered are fused still."""
    with _LOCK:
        _FusingFactory.enabled = False
        found = LoraModel.__dict__["_create_new_module"].__func__
        if isinstance(found, _FusingFactory):  # otherwise another package has put its own around ours
            LoraModel._create_new_module = found.before  # type: ignore[method-assign]


def made_by_environment(module: Any) -> Any:
    """Return `module`, a layer that PEFT has just made under ``LORA_KERNELS=1``, fused unless `disable` was called."""
    with _LOCK:
        if _FusingFactory.enabled is None:
            _FusingFactory.enabled = True
    return _fused(module) if _FusingFactory.enabled else module


def register(config: Config) -> Config:
    """Return `config` itself, after which every LoRA layer that PEFT makes for it is fused.

    It is for a trainer that takes the config: ``SFTTrainer(..., peft_config=register(LoraConfig(...)))``. It fills in
    PEFT's table of custom layers (`LoraConfig._register_custom_module`), whose other entries keep their effect.
    Saving the config does not save the table. A config that is read from a folder has to be registered itself:
    ``PeftModel.from_pretrained(model, folder, config=register(LoraConfig.from_pretrained(folder)))``.

    Raises:
        TypeError: `config` is not PEFT's `LoraConfig`, or a subclass of it whose layers are not LoRA layers. Such
            models take `fuse`.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise TypeError(
            f"register takes a LoraConfig of PEFT, and this is a {type(config).__name__}. After get_peft_model, "
            "lora_kernels.fuse(model) fuses the layers of the other methods that have a fused forward"
        )
    config._register_custom_module({nn.Module: _layer_for})  # type: ignore[dict-item]  # PEFT calls it, and no more
    return config


def _layer_for(target: Any, adapter_name: str, *, config: LoraConfig, **kwargs: Any) -> Any:
    """Return PEFT's layer around `target`, fused. PEFT calls this for each layer of a config that was registered."""
    others = {key: made for key, made in (config._custom_modules or {}).items() if made is not _layer_for}
    plain = copy.copy(config)  # the config without our entry, for PEFT to choose the class of the layer
    plain._custom_modules = others or None
    return _fused(LoraModel._create_new_module(plain, adapter_name, target, **kwargs))
