"""The plug-in for vLLM: on a CPU, these kernels compute the low-rank half of vLLM's LoRA layers.

vLLM finds `register` by the entry point ``lora_kernels`` of the group ``vllm.general_plugins`` and calls it in each of
its processes. Nothing here imports vLLM before that.
"""

from __future__ import annotations

import inspect
import logging
import os
from types import ModuleType
from typing import Any

VARIABLE = "LORA_KERNELS_VLLM"
"""The environment variable that turns the plug-in off if it is 0. It is read when vLLM calls `register`."""

OLDEST, NEWEST = (0, 12), (0, 33)
"""The first and the last minor version of vLLM whose operators were read and found to be those that we replace."""

THEIRS = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
OURS = "lora_kernels.serving.vllm.punica.LoRAKernelsPunicaWrapper"

PARAMETERS = {
    "update_metadata": "mapping lora_index_to_id max_loras vocab_size kwargs",
    "add_lora_linear": "y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
    "add_lora_logits": "y x lora_a_stacked lora_b_stacked scale buffer kwargs",
    "add_lora_embedding": "y x lora_b_stacked add_inputs kwargs",
    "add_shrink": "y x lora_a_stacked scale kwargs",
    "add_expand": "y x lora_b_stacked output_slices offset_start add_inputs kwargs",
}
"""The parameters of the methods of vLLM's wrapper that we replace or extend."""


def register() -> None:
    """Let vLLM's CPU platform name our wrapper for LoRA.

    On another platform, and where the environment variable LORA_KERNELS_VLLM is 0, this does nothing. A vLLM whose
    version or methods are not known keeps its own wrapper, and a warning says so. Calling it again changes nothing.
    """
    log = logging.getLogger("vllm.plugins.lora_kernels")  # below vLLM's own logger, which prints it
    if os.environ.get(VARIABLE, "1").strip() == "0":
        log.info("lora_kernels leaves vLLM's LoRA operators as they are: %s is 0", VARIABLE)
        return
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or current_platform.get_punica_wrapper() == OURS:
        return
    reason = why_not(vllm, current_platform)
    if reason is not None:
        log.warning("lora_kernels leaves vLLM's LoRA operators as they are: %s", reason)
        return
    type(current_platform).get_punica_wrapper = classmethod(_ours)  # type: ignore[method-assign,assignment]
    log.info("lora_kernels computes the low-rank half of LoRA layers; %s=0 turns it off", VARIABLE)


def why_not(vllm: ModuleType, platform: Any) -> str | None:
    """Return why our wrapper cannot take the place of the one that this vLLM names for its platform, or None if it
    can."""
    version = str(vllm.__version__)
    if not OLDEST <= _minor(version) <= NEWEST:
        known = f"{_dotted(OLDEST)} to {_dotted(NEWEST)}"
        return f"vLLM {version} is installed, and the plug-in knows {known}. A newer lora_kernels may know it"
    named = platform.get_punica_wrapper()
    if named != THEIRS:
        return f"the platform {type(platform).__name__} has a wrapper of its own, {named}"
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for name, known in PARAMETERS.items():
        method = getattr(PunicaWrapperCPU, name, None)
        found = "nothing" if method is None else " ".join([*inspect.signature(method).parameters][1:])
        if found != known:
            return f"in vLLM {version}, {name} takes ({found}), and the plug-in knows ({known})"
    return None


def _ours(platform: type) -> str:
    """Return the name of our wrapper, as ``get_punica_wrapper`` of a platform."""
    return OURS


def _minor(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version; (0, 0) for what has none, such as "dev"."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
