"""`ReplacedWeight`: a layer that merges by putting another Parameter in the place of its weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn import merging, offload
from lora_kernels.nn.adapter import AdapterLayer, is_adapter


class ReplacedWeight(AdapterLayer):
    """A layer whose `merge` puts a new Parameter in as `weight`, and whose `unmerge` puts the old one back.

    Other modules that share the Parameter keep it, and ``state_dict`` holds it as `weight`, merged or not. A subclass
    computes the merged weight.
    """

    weight: nn.Parameter
    _base: nn.Parameter | None = None
    """The weight while merged: the very Parameter that `weight` was. It stands neither with the parameters nor with the
    buffers, because `state_dict` holds it as `weight`."""
    _merged_as: Tensor | None = None
    """The Parameter that `merge` has put in as `weight`, or one in its place that has been found not to be W."""

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the merged weight at present."""
        return self._base is not None

    @torch.inference_mode(False)  # what is made in inference mode could not be moved or saved later
    @torch.no_grad()
    def merge(self, safe: bool = True) -> None:
        """Put the merged weight in as `weight`. The base weight stays in memory for `unmerge`. Merging a merged module
        does nothing. Raises ValueError where the weight is parametrised or pruned, and what `_merged_weight` raises."""
        if self.merged:
            return
        merging.refuse_computed(self)
        merged = nn.Parameter(self._merged_weight(safe), requires_grad=False)
        # nn.Module's __setattr__ would make parameters of these.
        self.__dict__.update(_base=self._parameters["weight"], _merged_as=merged)
        self._parameters["weight"] = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back: the Parameter of before `merge`, so that what was tied to it is tied again. Does
        nothing where nothing is merged."""
        if self._base is not None:
            merging.refuse_computed(self)
            self._parameters["weight"] = self._base
            self.__dict__.update(_base=None, _merged_as=None)

    def _check_replaced(self) -> None:
        """Check the forward of a merged module. Warn if the adapter would be trained were it not merged. Raise
        ValueError where the weight is W again, because accelerate has offloaded the module, or one around it, since:
        it keeps the values of ``state_dict``."""
        if torch.compiler.is_compiling() or self._base is None:
            return
        if offload.hook_of(self) is not None:
            raise ValueError(
                f"this {type(self).__name__} was merged when accelerate offloaded it, and accelerate has kept the "
                "weight without the adapter. Call accelerate.hooks.remove_hook_from_module(model, recurse=True) and "
                "unmerge()"
            )
        trained = any(p is not None and p.requires_grad and is_adapter(name) for name, p in self._parameters.items())
        if self.training and trained and torch.is_grad_enabled():
            warnings.warn(
                f"this {type(self).__name__} is merged: its adapter gets no gradient until unmerge()", stacklevel=3
            )
        self.__dict__["_merged_as"] = merging.refuse_lost(self, self.weight, self._base, self._merged_as)

    def _copy_of_merged(self) -> Tensor:
        """Return a copy of the merged weight. Raises ValueError where it is W again, or has no values here."""
        merging.refuse_absent(self)
        assert self._base is not None
        merging.refuse_lost(self, self.weight, self._base, self._merged_as)
        return self.weight.detach().clone()

    def _merged_weight(self, safe: bool) -> Tensor:
        """Return the merged weight. Raises ValueError where it cannot be computed, or with `safe` is not finite."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. Raises ValueError for a new weight of a merged module: the adapter would be dropped."""
        if name == "weight" and self._base is not None:
            raise ValueError("this module is merged: unmerge() it before it is given another weight")
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLayer:
        """Move and convert every tensor with `fn`, also the base weight of a merged module."""
        base = self._base
        known = base is not None and self._parameters["weight"] is self._merged_as
        if base is not None:
            self._parameters["_base"] = base  # so that torch treats it as every other parameter
        try:
            super()._apply(fn, recurse)
        finally:
            if base is not None:
                self.__dict__["_base"] = self._parameters.pop("_base")
        if known:
            self.__dict__["_merged_as"] = self._parameters["weight"]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base is not None:
            destination[prefix + "weight"] = self._base if keep_vars else self._base.detach()
