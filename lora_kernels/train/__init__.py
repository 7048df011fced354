"""How adapters are trained: learning rates by matrix, frozen matrices, restarts and their schedule."""

from lora_kernels.train.loraplus import loraplus_groups

__all__ = ["loraplus_groups"]
