"""``python -m lora_kernels bench --suite many``: many adapters in one batch, beside other ways to do it."""
