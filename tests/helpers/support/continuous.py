"""Whether the installed transformers has the continuous batching that `lora_kernels.serving.continuous` is for."""

from __future__ import annotations


def lacks() -> str:
    """Return what transformers lacks of it, as the reason of a skipped test, or ""."""
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError:
        return "this transformers has no continuous batching"
    if not hasattr(ContinuousBatchingConfig(), "cuda_graph_booleans"):  # Requests refuses it by this name
        return "the continuous batching of this transformers is older than the one that Requests is for"
    return ""
