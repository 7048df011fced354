"""`AdapterLayer`: what every layer with an adapter has, whatever its base is: linear, embedding, convolution, attention
or experts.

`lora_kernels.models` finds, saves, loads, merges and counts adapters through this class alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.nn.init_values import FIRST_VALUES
from lora_kernels.nn.settings import LoRASettings


class FilePart(NamedTuple):
    """A tensor of an adapter in PEFT's file."""

    parameter: str
    """The name of the layer's own parameter that holds it. That of a child's parameter has dots."""
    shape: tuple[int, ...]
    """The shape in the file."""


def is_adapter(name: str) -> bool:
    """Return whether the parameter of a layer with this name belongs to its adapter."""
    return name.rpartition(".")[2].startswith("lora_")


class AdapterLayer(nn.Module):
    """A layer with a frozen base and a trained low-rank update.

    The parameters of the adapter have names that begin with ``lora_``; every other parameter belongs to the base and is
    frozen. A layer with an adapter inside this one is a part of it, and is not saved or merged on its own. A subclass
    computes the forward, and defines the methods below that raise NotImplementedError.
    """

    init = "kaiming"
    """The scheme by which the adapter was initialised, or "restarted" after `lora_kernels.train.restart`. Most change
    W: see `splits_base`."""

    plain: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The classes of the layers in whose place this one can stand in a model."""

    target_parameters: tuple[str, ...] = ()
    """The parameters of the base that are adapted, where PEFT's config names them in target_parameters, and not the
    layer in target_modules."""

    fused_calls = 0
    """The number of forwards with the adapter, without those inside ``torch.compile``."""
    base_calls = 0
    """The number of forwards of the base alone, which holds the merged adapter."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    backend: str | None
    scaling: float

    @classmethod
    def from_settings(cls, module: Any, settings: LoRASettings) -> AdapterLayer:
        """Return a layer over the parameters of `module`, which are shared and frozen. Raises ValueError or TypeError
        for settings or a module that this class cannot take."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a layer of this class cannot take the place of `module`, an instance of `plain`, in a model; ""
        where it can."""
        raise NotImplementedError

    def count_call(self, merged: bool = False) -> None:
        """Count a forward. `FusedLoRALinear` and its quantised form do so themselves, which saves a call."""
        if not torch.compiler.is_compiling():
            name = "base_calls" if merged else "fused_calls"
            self.__dict__[name] = getattr(self, name) + 1

    @property
    def splits_base(self) -> bool:
        """Whether the initialisation has split W into a new base and the adapter. Such an adapter is valid with this
        module's base only."""
        return self.init not in FIRST_VALUES

    @property
    def merged(self) -> bool:
        """Whether the base holds the adapter at present."""
        raise NotImplementedError

    def merge(self, safe: bool = True) -> Any:
        """Put the adapter into the base, computed in fp64 and rounded once. The base's values are kept for `unmerge`.

        Raises ValueError where merging would be wrong, or with `safe` for a result that is not finite. Nothing is
        changed then.
        """
        raise NotImplementedError

    def unmerge(self) -> None:
        """Take the adapter out of the base: its parameters are those of before `merge`. Does nothing where nothing is
        merged."""
        raise NotImplementedError

    def to_plain(self) -> nn.Module:
        """Return a plain layer with the adapter merged into its weights. This module stays as it is. Raises what
        `merge` raises."""
        raise NotImplementedError

    @property
    def size(self) -> str:
        """The size of the base as reports show it, such as "768 → 3072"."""
        raise NotImplementedError

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file, by the part of their key after the layer's name, such
        as "lora_A.weight". Raises ValueError where PEFT's format has no place for this adapter."""
        raise NotImplementedError

    def why_not_file(self) -> str:
        """Return why PEFT computes something else from the adapter's file than this layer does; "" where it computes
        the same."""
        return ""

    def to_file(self, key: str, value: Tensor) -> Tensor:
        """Return the value of an own parameter in the layout of PEFT's file. `key` is one of `file_parts`."""
        return value

    def from_file(self, key: str, value: Tensor) -> Tensor:
        """Return a value of PEFT's file in the layout of the own parameter, also for a value on the meta device. `key`
        is one of `file_parts`."""
        return value
