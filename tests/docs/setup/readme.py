"""The names that README.md takes for granted."""

from support.page_names import Attention, bias, linear, lora_a, lora_b, weight, x

base = Attention()
model = Attention()
