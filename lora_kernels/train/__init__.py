"""How adapters are trained: learning rates by matrix, frozen matrices, restarts and their schedule."""

from lora_kernels.train.dropping import adapter_dropout
from lora_kernels.train.lora_fa import FrozenA, freeze_a
from lora_kernels.train.loraplus import loraplus_groups

__all__ = ["FrozenA", "adapter_dropout", "freeze_a", "loraplus_groups"]
