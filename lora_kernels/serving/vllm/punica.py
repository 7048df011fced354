"""The class that vLLM makes on a CPU once the plug-in is on. Only vLLM imports this file, by its name."""

from __future__ import annotations

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from lora_kernels.serving.vllm.operators import LowRankOperators


class LoRAKernelsPunicaWrapper(LowRankOperators, PunicaWrapperCPU):  # type: ignore[misc]  # vLLM may not be installed
    """vLLM's wrapper for CPUs with the operators of `LowRankOperators`. Everything else is vLLM's: what it remembers of
    a step, and whole classification heads."""
