"""The kernel ``lora_kernels`` for version 1 of LLaMA-Factory's trainers (``USE_V1=1``): it fuses a model's LoRA layers.

    kernel_config: {name: lora_kernels}                           # alone
    kernel_config: {name: auto, include_kernels: lora_kernels}    # beside others

LLaMA-Factory applies the kernel after PEFT has made the layers. It imports the kernels of its own folder only, so that
this one has to be added: ``LORA_KERNELS=1 llamafactory-cli sft ...`` does so in each of its processes, and in your own
program `add_kernel` does.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lora_kernels.peft.fusing import fuse
from lora_kernels.plugins import check

try:
    from llamafactory.v1.accelerator.helper import DeviceType
    from llamafactory.v1.plugins.model_plugins.kernels.base import BaseKernel
    from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin
    from llamafactory.v1.plugins.model_plugins.kernels.registry import Registry
    from llamafactory.v1.utils.logging import get_logger
except ImportError as error:
    raise ImportError(
        f"this plug-in is for the kernels of LLaMA-Factory's version 1, which cannot be imported here ({error}). "
        "LORA_KERNELS=1 in the environment fuses the layers without it"
    ) from error

NAME = "lora_kernels"


class LoraKernels(BaseKernel):  # type: ignore[misc]  # LLaMA-Factory may not be installed
    """The kernel, for each kind of device."""

    _kernel_id = NAME
    _device: ClassVar = list(DeviceType)

    @classmethod
    def apply(cls, **kwargs: Any) -> Any:
        """Fuse the LoRA layers of ``kwargs["model"]`` and return the model.

        Raises:
            ValueError: there is no model.
            RuntimeError: none of its layers is a LoRA layer of PEFT.
        """
        model = kwargs.get("model")
        if model is None:
            raise ValueError(f"the kernel {NAME} takes model=..., and got {sorted(kwargs)}")
        report = fuse(model)
        if not (report.fused or report.not_fused):
            raise RuntimeError(
                f"the kernel {NAME} found no LoRA layer of PEFT: set peft_config to lora, or leave it out"
            )
        get_logger("llamafactory.lora_kernels").info(str(report))  # below its own logger, which prints it
        return model


def add_kernel() -> None:
    """Add the kernel to LLaMA-Factory's table. Calling it again changes nothing.

    Raises:
        RuntimeError: this version of LLaMA-Factory has another interface for kernels.
    """
    check(Registry, {"register": "kernel_cls", "get": "kernel_id"}, "this LLaMA-Factory")
    check(BaseKernel, {"apply": "kwargs", "get_kernel_id": "", "get_device": ""}, "this LLaMA-Factory")
    if Registry.get(NAME) is None:
        Registry.register(LoraKernels)
        KernelPlugin(NAME).register()(_apply)


def _apply(model: Any, include_kernels: Any = None) -> Any:
    """Apply the kernel where ``kernel_config`` has its name."""
    return LoraKernels.apply(model=model)
