"""How adapters are trained: learning rates by matrix, frozen matrices, restarts and their schedule."""

from lora_kernels.train.gradient_start import lora_ga as lora_ga
