"""`PooledLinear`: the stand-in for a linear layer while a pool serves its model, and how it gets in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.core.many import AdapterStack
from lora_kernels.models.inject import places_of, put
from lora_kernels.models.names import plain_names
from lora_kernels.nn import fit, in_force, mixed, readers
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.base import AdapterLinear
from lora_kernels.nn.conv1d import FusedLoRAConv1D
from lora_kernels.nn.quantized import QuantizedLoRALinear, quantized_linear
from lora_kernels.ops.check import DTYPES, HALVES
from lora_kernels.ops.multi import lora_linear_multi
from lora_kernels.quant.weight import QuantizedWeight
from lora_kernels.serving.source import Place

IN_FORCE: ContextVar[tuple[mixed.Mixable, ...]] = ContextVar("lora_kernels.leases", default=())
"""The leases whose ``with`` this thread or task has entered, the innermost first: their layers, and their tables."""


class PooledLinear(nn.Module):
    """y = x Wᵀ + bias, plus s_i · (x A_iᵀ) B_iᵀ in the rows of each adapter i that a lease has given to the model.

    It stands in the place of an ``nn.Linear`` or of a layer of this package, `plain`, and shares its dictionaries of
    parameters and buffers. So whatever moves, loads, ties or reads the parameters of the one does it to the other too,
    and `plain` can come back at any time. Outside `lora_kernels.mixed` it computes the base alone, bit for bit.
    """

    def __init__(self, plain: nn.Linear | AdapterLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.training = plain.training
        # Not as a child, which would add a part to the names of the parameters.
        own = "_parameters", "_buffers", "_non_persistent_buffers_set"
        self.__dict__.update({"plain": plain, **{key: plain.__dict__[key] for key in own}})
        self.stack = AdapterStack(())
        """The adapters on the device, by number; None for one that has nothing in this layer."""

    @staticmethod
    def adapter_table(model: nn.Module) -> mixed.Table:
        """Return the numbers of the adapters that a lease of this thread holds, for `lora_kernels.mixed`. Raises
        RuntimeError outside of a lease."""
        layer = next(module for module in model.modules() if isinstance(module, PooledLinear))
        for layers, table in IN_FORCE.get():
            if id(layer) in layers:
                return table
        raise RuntimeError(
            "an AdapterPool serves this model, and no lease of it is in force here: call lora_kernels.mixed inside "
            "`with pool.lease(names)`, which keeps the adapters in memory"
        )

    @property
    def base(self) -> Tensor | QuantizedWeight:
        """W [out, in]."""
        plain: nn.Module = self.__dict__["plain"]
        if isinstance(plain, QuantizedLoRALinear):
            return plain.quantized_weight()
        return cast(Tensor, self._parameters["weight"])

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of W, or of the weight that was quantised."""
        return self.base.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Return y [..., out_features] for x = `input` [..., in_features]. Raises what `lora_linear_multi` raises."""
        context = in_force.current_for(self)
        w, bias = self.base, self._parameters["bias"]
        if context is not None:
            if w.requires_grad and not torch.is_grad_enabled():
                w = cast(Tensor, w).detach()  # a model that is only served need not be frozen
            y = lora_linear_multi(input, w, self.stack, context.of(input), bias=bias)
            return context.computed(self, y)
        if isinstance(w, QuantizedWeight):
            return quantized_linear(input, w, bias)
        return F.linear(input, w, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PooledLinear:
        self.__dict__["plain"]._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.__dict__["plain"]._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.__dict__["plain"]._load_from_state_dict(*arguments)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a model cannot be copied or pickled while an AdapterPool serves it, because the copy would have no pool: "
            "copy it before, or call pool.close() first"
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.stack!r}"


def install(model: nn.Module) -> tuple[dict[str, PooledLinear], dict[str, str], Callable[[], None]]:
    """Put a `PooledLinear` in the place of every layer of `model` that can have adapters.

    Returns the stand-ins by plain name, the reason why another layer that looks linear has none by its name, and a
    function that puts the layers back. Raises ValueError for a model that has a pool, layers of PEFT, adapters on other
    layers than linear ones, or no layer that can have adapters.
    """
    found: dict[str, PooledLinear] = {}
    passed_over: dict[str, str] = {}
    places = places_of(model)
    for name, own_name, module in plain_names(model):
        if isinstance(module, PooledLinear):
            raise ValueError("the model has an AdapterPool already: close() it first, or register adapters there")
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                "the model has layers of PEFT: give the pool its base model, which model.unload() returns, or serve "
                "PEFT's adapters with lora_kernels.fuse(model) and lora_kernels.mixed"
            )
        if isinstance(module, AdapterLayer) and not isinstance(module, AdapterLinear):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} with an adapter of its own, and a pool serves "
                "adapters of linear layers only: merge_and_unload(model) first"
            )
        if not name or not _looks_linear(module):
            continue
        reason = _why_not(model, own_name, module)
        if reason:
            passed_over[name] = reason
        else:
            found[name] = PooledLinear(cast("nn.Linear | AdapterLinear", module))
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(passed_over.items())[:5])
        raise ValueError(f"the model has no linear layer that can have adapters here{reasons and ': ' + reasons}")
    for layer in found.values():
        for place in places[id(layer.plain)]:
            put(model, place, layer)
    reopen = readers.close_fast_paths(model, PooledLinear)

    def put_back() -> None:
        reopen()
        for layer in found.values():
            plain = cast(nn.Module, layer.plain)
            for place in places[id(plain)]:
                put(model, place, plain)
            plain.train(layer.training)

    return found, passed_over, put_back


def _looks_linear(module: nn.Module) -> bool:
    leaf = not any(True for _ in module.children())
    return leaf and (isinstance(module, (nn.Linear, AdapterLinear)) or "Linear" in type(module).__name__)


def _why_not(model: nn.Module, own_name: str, module: nn.Module) -> str:
    """Return why a pool cannot serve a layer, or "" where it can."""
    if own_name.rpartition(".")[2] == "_orig_mod":
        return "torch.compile has compiled this layer on its own: make the pool first, then compile"
    if isinstance(module, FusedLoRAConv1D):
        return "a FusedLoRAConv1D, whose weight is [in, out], and a pool reads weights [out, in]"
    if isinstance(module, AdapterLinear):
        if module.merged or module.use_dora or bool(module.lora_B.count_nonzero()):
            return "it has an adapter of its own, which the pool would pass over: merge_and_unload(model) first"
        reason = "it has hooks, which would be lost" if fit.has_hooks(module) else ""
    else:
        reason = fit.why_not(module, in_place=True)
    reading = None if reason else readers.reading_in(model, own_name)
    return reason or (str(reading) if reading is not None and reading.always else "")


def device_of(layers: Mapping[str, PooledLinear]) -> torch.device:
    """Return the device of all layers. Raises ValueError where they are on several, or have no values."""
    first = next(iter(layers))
    device = layers[first].base.device
    for name, layer in layers.items():
        own = layer.base.device
        if own != device:
            raise ValueError(f"a pool serves a model on one device: {first} is on {device}, {name} on {own}")
    if device.type == "meta":
        raise ValueError(f"{first} is on the meta device: load the model's weights first")
    return device


def place_of(name: str, layer: PooledLinear, dtype: torch.dtype | None) -> Place:
    """Return what adapters of a layer must fit. Raises TypeError for a dtype that does not go with its weight's."""
    own = layer.weight_dtype
    if dtype is not None and dtype != own and not (dtype == torch.float32 and own in HALVES):
        raise TypeError(
            f"adapters in {dtype} do not go with {name}, whose weight is {own}: take {own}, or fp32 beside 16 bits"
        )
    if own not in DTYPES:
        raise TypeError(f"{name} has a weight in {own}; adapters go with {', '.join(map(str, DTYPES))}")
    return Place(layer.in_features, layer.out_features, dtype or own)
