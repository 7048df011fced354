"""The public names of `lora_kernels.ops.group`."""

from lora_kernels.ops.group import Layer, lora_linear_group

__all__ = ["Layer", "lora_linear_group"]
