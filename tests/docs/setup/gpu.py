"""The names that docs/gpu.md takes for granted."""

from support.page_names import lora_a, lora_b, weight, x
