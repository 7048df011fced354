"""The public names of `lora_kernels.nn.init`."""

from lora_kernels.nn.init import loftq, lq_lora, olora, pissa

__all__ = ["loftq", "lq_lora", "olora", "pissa"]
