"""AdaLoRA of PEFT over bitsandbytes' weights of 4 and 8 bits, on the fused path: `lora_kernels.peft.folded` and
`lora_kernels.peft.bnb` in one.

This module is imported only where PEFT has made such a layer, so that other models do not need bitsandbytes.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora import bnb as peft_layers
from torch import Tensor

from lora_kernels.peft.bnb import Over4bit, Over8bit
from lora_kernels.peft.folded import SVD

_USES = """
T _cast_input_dtype active_adapters base_layer clone disable_adapters dtype float float32 is_autocast_enabled keys
lora_A lora_B lora_E lora_dropout ranknum scaling to torch
"""


class _Merged:
    """The forward while merged. PEFT, which does not merge such layers, would add the adapters once more."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y, of the dense weight alone while merged."""
        if self.merged:
            if not self.disable_adapters:
                y: Tensor = self.base_layer(x, *args, **kwargs)
                return y
            self.unmerge()
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return y


class FusedSVDLinear4bit(_Merged, SVD, Over4bit, peft_layers.SVDLinear4bit):
    """AdaLoRA over a ``Linear4bit``."""

    peft_class = peft_layers.SVDLinear4bit
    uses = _USES


class FusedSVDLinear8bitLt(_Merged, SVD, Over8bit, peft_layers.SVDLinear8bitLt):
    """AdaLoRA over a ``Linear8bitLt`` with has_fp16_weights=False. x is not rounded to 8 bits."""

    peft_class = peft_layers.SVDLinear8bitLt
    uses = _USES
