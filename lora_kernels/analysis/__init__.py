"""What an adapter has learned: measures of ΔW, and tools that change ranks."""

from lora_kernels.analysis.analysing import analyse
from lora_kernels.analysis.budgeting import budget
from lora_kernels.analysis.directions import amplification, intruder_dimensions, weight_similarity
from lora_kernels.analysis.extract import extract_lora
from lora_kernels.analysis.measures import effective_rank, energy_rank, stable_rank
from lora_kernels.analysis.merge import merge_adapters
from lora_kernels.analysis.resize import resize_adapter
from lora_kernels.analysis.subspaces import random_similarity, subspace_similarity

__all__ = [
    "amplification",
    "analyse",
    "budget",
    "effective_rank",
    "energy_rank",
    "extract_lora",
    "intruder_dimensions",
    "merge_adapters",
    "random_similarity",
    "resize_adapter",
    "stable_rank",
    "subspace_similarity",
    "weight_similarity",
]
