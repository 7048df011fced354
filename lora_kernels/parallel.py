"""The public names of `lora_kernels.nn.parallel`."""

from lora_kernels.nn.parallel import ColwiseLoRA, RowwiseLoRA

__all__ = ["ColwiseLoRA", "RowwiseLoRA"]
