"""`AdapterLinear`: the adapter of a fused layer, for dense and quantised layers alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.nn import merging, offload
from lora_kernels.nn.adapter import AdapterLayer, FilePart
from lora_kernels.nn.init_values import FIRST_VALUES, kaiming
from lora_kernels.nn.settings import LoRASettings


class AdapterLinear(AdapterLayer):
    """A linear layer with the parameters lora_A [r, in] and lora_B [out, r] beside a frozen weight and bias.

    It has the attributes of an ``nn.Linear`` but is none, as PEFT's and torchtune's layers are none: code that finds an
    ``nn.Linear`` may build another layer from its weight and bias, and the adapter would be lost without a word.

    A subclass makes the weight, computes the forward, and says with `merged` and `unmerge` how its weight takes in the
    adapter and gets rid of it.
    """

    quantized_kind: ClassVar[type[Any]]
    """`QuantizedLoRALinear`, set by ``nn/quantized.py``. `FusedLoRALinear` makes such layers, but cannot import their
    class, which is its own subclass."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    _merged_as: Tensor | None = None
    """The Parameter that `merge` has put in as `weight`, or one in its place that has been found not to be W. None
    where the merged weight is offloaded."""

    def _add_adapter(self, settings: LoRASettings) -> None:
        """Freeze the weight and bias, and add the adapter with values still to be set."""
        weight, bias = self.weight, self.bias
        dtype, device = settings.dtype_beside(self.weight_dtype), weight.device
        self.r, self.lora_alpha, self.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        self.use_rslora, self.use_dora, self.backend = settings.use_rslora, settings.use_dora, settings.backend
        self.scaling, self.init = settings.scaling, settings.init
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, dtype=dtype, device=device))

    @torch.no_grad()
    def _start(self, init: str, *ab: Tensor) -> None:
        """Copy the A and B that the scheme `init` has made from W into the adapter. A scheme that leaves W as it is
        makes none, and the adapter then keeps its first values."""
        self.init = init
        if ab:
            self.lora_A.copy_(ab[0])
            self.lora_B.copy_(ab[1])

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        """Return weight, bias, lora_A and lora_B.

        They come from the dictionary of parameters, because nn.Module's attribute look-up takes about a microsecond for
        each, in every call. In a replica of nn.DataParallel, and where a parameter is parametrised or pruned, some are
        not in this dictionary.
        """
        p = self._parameters
        if "weight" in p and "bias" in p and "lora_A" in p and "lora_B" in p:
            return p["weight"], p["bias"], p["lora_A"], p["lora_B"]
        return self.weight, self.bias, self.lora_A, self.lora_B

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of W, which x is expected in."""
        return self.weight.dtype

    @property
    def size(self) -> str:
        """The size of W, as reports show it."""
        return f"{self.in_features} → {self.out_features}"

    def file_parts(self) -> dict[str, FilePart]:
        """Return the tensors of the adapter in PEFT's file: A [r, in], B [out, r] and with DoRA m [out]."""
        parts = {
            "lora_A.weight": FilePart("lora_A", (self.r, self.in_features)),
            "lora_B.weight": FilePart("lora_B", (self.out_features, self.r)),
        }
        if self.use_dora:
            parts["lora_magnitude_vector"] = FilePart("lora_magnitude_vector", (self.out_features,))
        return parts

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of `weight`, which holds a quantised W as codes."""
        return self.out_features, self.in_features

    @property
    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of W, as it is stored, A and B in a process that holds all of them."""
        N, K = self.out_features, self.in_features
        return {"weight": self.stored_shape, "lora_A": (self.r, K), "lora_B": (N, self.r)}

    def _check_merged(self, weight: Tensor, base: Tensor, lora_a: Tensor) -> None:
        """Check the forward of a merged module, with `weight` as its weight and `base` as W. Warn if its adapter would
        be trained were it not merged. Raise ValueError where `weight` is W again: accelerate, for example, offloads the
        values of ``state_dict``, which are W."""
        if torch.compiler.is_compiling():
            return
        if self.training and lora_a.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"this {type(self).__name__} is merged: its adapter gets no gradient until unmerge()", stacklevel=3
            )
        self._refuse_lost_merge()
        self.__dict__["_merged_as"] = merging.refuse_lost(self, weight, base, self._merged_as)

    def _refuse_lost_merge(self) -> None:
        """Raise ValueError for a merged module that accelerate has offloaded since it was merged."""
        if offload.hook_of(self) is not None and not offload.has_replaced(self, "weight"):
            raise ValueError(
                f"this {type(self).__name__} was merged when accelerate offloaded it, and accelerate has kept the "
                "weight without the adapter. Call accelerate.hooks.remove_hook_from_module(model, recurse=True) and "
                "unmerge(), then offload the model, and merge it after that"
            )

    def reset_parameters(self) -> None:
        """Give weight and bias new values as nn.Linear does, then the adapter. Frameworks call it after ``to_empty``
        to materialise a model from the meta device. Raises what `reset_adapter` raises."""
        self._refuse_offloaded()
        self.unmerge()
        self._reset_base()
        self.reset_adapter()

    def _reset_base(self) -> None:
        """Give weight and bias new values."""
        raise NotImplementedError

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A Kaiming-uniform(√5), B zero; or those of `init`, where it is "gaussian"
        or "orthogonal". A merged module is unmerged first.

        Raises ValueError where the weights are offloaded, because these values would be overwritten by the old ones.
        """
        self._refuse_offloaded()
        self.unmerge()
        self._reset_adapter()

    def _refuse_offloaded(self) -> None:
        if hasattr(self, "_hf_hook"):  # without accelerate's hook a meta tensor is one that is to be filled later
            merging.refuse_absent(self)

    def _reset_adapter(self) -> None:
        FIRST_VALUES.get(self.init, kaiming)(self.lora_A, self.lora_B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLinear:
        """Move and convert every tensor with `fn`. Where `fn` gives memory that nobody has written, as
        ``Module.to_empty`` does, the adapter gets its first values: a checkpoint of the plain layer has none for it."""
        emptied = self.lora_A.is_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        known = self._merged_as is not None and self._parameters.get("weight") is self._merged_as
        super()._apply(fn, recurse)
        if known:
            self.__dict__["_merged_as"] = self._parameters["weight"]
        if emptied and not self.lora_A.is_meta:
            self._reset_adapter()
        return self

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the shapes."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", r={self.r}, scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        if self.use_dora:
            text += ", use_dora=True"
        if self.lora_A.dtype != self.weight_dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.merged else "")
