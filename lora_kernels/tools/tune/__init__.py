"""``python -m lora_kernels tune``: measures the plans of a GPU back-end and keeps the fastest."""
