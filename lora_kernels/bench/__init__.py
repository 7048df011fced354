"""``python -m lora_kernels bench``: what a LoRA layer costs over its frozen layer, and whether it is right."""
