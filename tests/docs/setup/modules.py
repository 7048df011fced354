"""The names that docs/modules.md takes for granted."""

from support.page_names import Attention, bias, linear, lora_a, lora_b, weight, x

model = Attention()
