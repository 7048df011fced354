"""`FusedLoRAConv1D`: LoRA over the Conv1D of transformers, the linear layer of GPT-2 that stores Wᵀ."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.nn import construct, fit
from lora_kernels.nn.linear import FusedLoRALinear
from lora_kernels.nn.settings import LoRASettings


class FusedLoRAConv1D(FusedLoRALinear):
    """y = x Wᵀ + bias + s · (dropout(x) Aᵀ) Bᵀ with W and bias frozen: what the Conv1D of transformers computes, and
    LoRA. In spite of its name a Conv1D is a linear layer.

    It is a `FusedLoRALinear` whose `weight` is Wᵀ [in, out], as in a Conv1D: the very Parameter of the layer that it is
    made from, so that what was tied to it stays tied, and ``state_dict`` has the shapes that GPT-2's checkpoints have.
    The kernels read its transposed view, and nothing is copied. A is [r, in] and B is [out, r], as in PEFT's files.

    Args:
        in_features, out_features: a Conv1D's nx and nf.
        bias, r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend, device, dtype: as for
            `FusedLoRALinear`.

    Attributes:
        weight: [in, out], the frozen Wᵀ, or the merged weight while `merged`.
        nx, nf: in_features and out_features, under the names that a Conv1D gives them.
        bias, lora_A, lora_B, lora_magnitude_vector, scaling, merged: as in `FusedLoRALinear`.

    Raises what `FusedLoRALinear` raises.
    """

    plain = (fit.Conv1DLike,)

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
        init: str = "kaiming",
    ) -> FusedLoRAConv1D:
        """Return a module over the own weight and bias of `conv`, a Conv1D of transformers. They are shared, not
        copied, and are frozen. The keywords are those of `FusedLoRALinear.from_linear`.

        Raises:
            ValueError: as `FusedLoRALinear.from_linear`.
            TypeError: a module that is not a Conv1D of transformers, or that has hooks or a parametrization, which the
                new module would pass over.
        """
        settings = LoRASettings(r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_dtype, backend, init=init)
        return cls.from_settings(conv, settings)

    @classmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be trained later
    @torch.no_grad()
    def from_settings(cls, module: Any, settings: LoRASettings) -> FusedLoRAConv1D:
        """Return what `from_conv1d` returns, for its keywords as one object. Raises ValueError for settings.quant too,
        because a quantised weight could not be laid out as that of a Conv1D."""
        settings.check()
        if reason := fit.why_not_conv1d(module, in_place=False):
            raise TypeError(reason)
        if settings.quant is not None:
            raise ValueError(
                f"quant={settings.quant!r} is not for a Conv1D, whose checkpoints hold a dense weight [in, out]: leave "
                "out quant, or quantise an nn.Linear with the transposed weight"
            )
        return cast(FusedLoRAConv1D, construct.over_dense(cls, module, settings))

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """Return why a layer of this class cannot take the place of `module` in a model, or "" where it can."""
        return fit.why_not_conv1d(module, in_place=True)

    @staticmethod
    def sizes_of(module: Any) -> tuple[int, int]:
        """Return nx and nf of a Conv1D, which its weight tells."""
        in_features, out_features = module.weight.shape
        return in_features, out_features

    @staticmethod
    def turned(weight: Tensor) -> Tensor:
        """Return the transposed view of a matrix: W [out, in] for Wᵀ, and the other way round."""
        return weight.t()

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of `weight`."""
        return self.in_features, self.out_features

    @property
    def nx(self) -> int:
        """The number of inputs."""
        return self.in_features

    @property
    def nf(self) -> int:
        """The number of outputs."""
        return self.out_features

    def to_plain(self) -> nn.Module:
        """Return a Conv1D of transformers with the adapter merged into its weight, as `merge` computes it, and a copy
        of the bias. This module stays as it is. Raises what `merge` raises, and ImportError without transformers."""
        return self._made_plain(self._conv1d)

    def _conv1d(self, weight: Tensor) -> nn.Module:
        from transformers.pytorch_utils import Conv1D  # it is there if a Conv1D is

        with torch.device("meta"):
            conv: nn.Module = Conv1D(self.out_features, self.in_features)
        like = self.bias if self.bias is not None else weight.new_zeros(self.out_features)
        conv.weight = nn.Parameter(weight)
        conv.bias = nn.Parameter(like.detach().to(weight.dtype, copy=True))
        return conv.train(self.training)

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        weight, bias, a, b = super()._parts()
        return weight.t(), bias, a, b

    def _reset_base(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
