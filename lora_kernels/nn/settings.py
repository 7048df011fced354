"""`LoRASettings`: the settings of a fused layer, as one object that the modules and `apply_lora` pass on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoRASettings:
    """The keywords of `FusedLoRALinear.from_linear`, which documents them, with its defaults.

    Its constructor checks nothing. The layer that is made from it calls `check`, so that `apply_lora` can name the
    layer in the error for a bad value.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    adapter_dtype: torch.dtype | None = None
    backend: str | None = None
    quant: str | None = None
    blocksize: int = 64
    double_quant: bool = False
    init: str = "kaiming"

    def check(self) -> None:
        """Raise ValueError where r, lora_alpha or lora_dropout has a value that no layer can have."""
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be an integer of at least 1, got {self.r!r}")
        if not isinstance(self.lora_alpha, (int, float)) or not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")

    @property
    def scaling(self) -> float:
        """The s of these settings, as `scaling_of` gives it."""
        return scaling_of(self.lora_alpha, self.r, self.use_rslora)

    def dtype_beside(self, weight: torch.dtype) -> torch.dtype:
        """Return the dtype of A and B beside a W of dtype `weight`: fp32 beside fp16 and bf16, as in PEFT, where
        adapter_dtype is None. Raises TypeError where adapter_dtype does not go with the weight."""
        default = torch.float32 if weight in (torch.float16, torch.bfloat16) else weight
        dtype = self.adapter_dtype or default
        if dtype not in (weight, default):
            raise TypeError(f"adapter_dtype must be the weight's ({weight}), or fp32 beside fp16 or bf16; got {dtype}")
        return dtype


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Return s = α/r, or with rsLoRA s = α/√r (Kalajdzievski, 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
