"""The @triton.jit kernels. Imported by `lora_kernels.backends.triton` only."""
