"""The public names of `lora_kernels.nn.init` and `lora_kernels.nn.init_gradient`."""

from lora_kernels.nn.init import loftq, lq_lora, milora, olora, pissa
from lora_kernels.nn.init_gradient import lora_ga

__all__ = ["loftq", "lora_ga", "lq_lora", "milora", "olora", "pissa"]
