"""The @triton.jit kernels, and the table of their tiles. Imported by `lora_kernels.backends.triton` only."""
