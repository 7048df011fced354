"""Plug-ins for trainers that load code by name: axolotl, ms-swift and LLaMA-Factory. Each imports its own trainer."""

from __future__ import annotations

import inspect
from typing import Any


def check(owner: Any, methods: dict[str, str], version: str) -> None:
    """Raise RuntimeError unless the functions of `owner` take the parameters that a plug-in knows.

    `methods` holds the names of the parameters by function, separated by spaces; `version` names the trainer.
    """
    for name, known in methods.items():
        method = getattr(owner, name, None)
        found = "nothing" if method is None else " ".join(inspect.signature(method).parameters)
        if found != known:
            raise RuntimeError(
                f"in {version}, {owner.__name__}.{name} takes ({found}), and this plug-in of lora_kernels knows "
                f"({known}). A newer lora_kernels may know it. LORA_KERNELS=1 in the environment, without the plug-in, "
                "fuses the layers too"
            )
