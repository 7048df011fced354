"""The names that docs/backends.md takes for granted."""

from support.page_names import bias, linear, lora_a, lora_b, weight, x
