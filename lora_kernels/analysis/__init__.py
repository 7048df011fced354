"""What an adapter has learned: measures of ΔW, and tools that change ranks."""

from lora_kernels.analysis.amplification import amplification, intruder_dimensions, weight_similarity
from lora_kernels.analysis.measures import effective_rank, energy_rank, stable_rank
from lora_kernels.analysis.subspaces import random_similarity, subspace_similarity

__all__ = [
    "amplification",
    "effective_rank",
    "energy_rank",
    "intruder_dimensions",
    "random_similarity",
    "stable_rank",
    "subspace_similarity",
    "weight_similarity",
]
