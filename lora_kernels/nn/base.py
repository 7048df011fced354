"""`AdapterLinear`: the adapter of a fused layer, for dense and quantised layers alike."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.nn.settings import LoRASettings


class AdapterLinear(nn.Linear):
    """A linear layer with the parameters lora_A [r, in] and lora_B [out, r] beside a frozen weight and bias.

    A subclass makes the weight, computes the forward, and says with `merged` and `unmerge` how its weight takes in the
    adapter and gets rid of it.
    """

    quantized_kind: ClassVar[type[Any]]
    """`QuantizedLoRALinear`, set by ``nn/quantized.py``. `FusedLoRALinear` makes such layers, but cannot import their
    class, which is its own subclass."""

    init = "kaiming"
    """The scheme by which the adapter was initialised. Every scheme but "kaiming" splits W into a new base and an
    adapter, and that adapter is valid with this module's base only."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    backend: str | None
    scaling: float

    def _add_adapter(self, settings: LoRASettings) -> None:
        """Freeze the weight and bias, and add the adapter with values still to be set."""
        dtype, device = settings.dtype_beside(self.weight_dtype), self.weight.device
        self.r, self.lora_alpha, self.lora_dropout = settings.r, settings.lora_alpha, settings.lora_dropout
        self.use_rslora, self.use_dora, self.backend = settings.use_rslora, settings.use_dora, settings.backend
        self.scaling = settings.scaling
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, dtype=dtype, device=device))

    @torch.no_grad()
    def _start(self, init: str, *ab: Tensor) -> None:
        """Copy the A and B that the scheme `init` has made into the adapter. "kaiming" makes none, and the adapter then
        keeps its first values."""
        self.init = init
        if ab:
            self.lora_A.copy_(ab[0])
            self.lora_B.copy_(ab[1])

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of W, which x is expected in."""
        return self.weight.dtype

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W + s·B·A at present."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Take the adapter out of `weight`. Does nothing where nothing is merged."""
        raise NotImplementedError

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

    def _warn_if_trained(self, lora_a: Tensor) -> None:
        """Warn in the forward of a merged module if its adapter would be trained were it not merged."""
        if self.training and lora_a.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                f"this {type(self).__name__} is merged: its adapter gets no gradient until unmerge()", stacklevel=3
            )

    def reset_parameters(self) -> None:
        """Give weight and bias new values as nn.Linear does, then the adapter. Frameworks call it after ``to_empty``
        to materialise a model from the meta device."""
        made = "lora_A" in self._parameters  # nn.Linear's constructor calls this before there is an adapter
        if made:
            self.unmerge()
        super().reset_parameters()
        if made:
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Give the adapter its first values: A Kaiming-uniform(√5), B zero. A merged module is unmerged first."""
        self.unmerge()
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _check_rank(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise ValueError where the adapter in `state_dict` has another rank than this module's."""
        for key, dim in ((prefix + "lora_A", 0), (prefix + "lora_B", 1)):
            if key in state_dict and state_dict[key].shape[dim] != self.r:
                rank = state_dict[key].shape[dim]
                raise ValueError(
                    f"{key} {tuple(state_dict[key].shape)} is of rank {rank}, this module of r={self.r}: "
                    f"nothing was loaded into it. Build it with r={rank}"
                )

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows beside the shapes."""
        text = f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"
        if self.lora_dropout:
            text += f", lora_dropout={self.lora_dropout:g}"
        if self.use_dora:
            text += ", use_dora=True"
        if self.lora_A.dtype != self.weight_dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + (", merged" if self.merged else "")
