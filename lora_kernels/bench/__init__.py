"""``python -m lora_kernels bench``: times of a LoRA layer beside its frozen layer, PEFT and others, and its bytes."""
