"""What an adapter has learned: measures of ΔW, and tools that change ranks."""

from lora_kernels.analysis.budget import budget
from lora_kernels.analysis.extract import extract_lora
from lora_kernels.analysis.merge import merge_adapters
from lora_kernels.analysis.resize import resize_adapter

__all__ = ["budget", "extract_lora", "merge_adapters", "resize_adapter"]
