"""The plug-in for axolotl: it fuses the model that axolotl has loaded, and says which layers are fused.

    plugins:
      - lora_kernels.plugins.axolotl.LoraKernelsPlugin
    lora_kernels_strict: true   # stop if a layer cannot be fused
    lora_kernels_group: true    # q/k/v and gate/up in one call

Axolotl's own LoRA kernels read A and B past PEFT's layers, and axolotl switches them on by itself. The plug-in keeps
them off, and refuses a config that asks for them.
"""

from __future__ import annotations

import logging
import re
from importlib.metadata import version
from typing import Any

from lora_kernels.peft.fusing import FuseReport, fuse
from lora_kernels.plugins import check

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic import BaseModel, Field
except ImportError as error:
    raise ImportError(f"this plug-in is for axolotl, which cannot be imported here ({error})") from error

_LOG = logging.getLogger("axolotl.lora_kernels")  # below axolotl's own logger, which prints it

_METHODS = {
    "register": "self cfg",
    "get_input_args": "self",
    "post_model_load": "self cfg model",
    "post_train": "self cfg model",
}
"""The methods of axolotl's BasePlugin that the plug-in overrides, and their parameters."""

_OWN_KERNEL = re.compile(r"lora_\w+_kernel")
"""The settings that switch on axolotl's own kernels, such as lora_qkv_kernel."""


class LoraKernelsArgs(BaseModel):  # type: ignore[misc]  # pydantic may not be installed
    """The settings that the plug-in adds to axolotl's config."""

    lora_kernels_strict: bool | None = Field(
        default=None, json_schema_extra={"description": "Raise if a LoRA layer cannot be fused, or there is none."}
    )
    lora_kernels_group: bool | None = Field(
        default=None, json_schema_extra={"description": "Compute LoRA layers that read the same input in one call."}
    )


class LoraKernelsPlugin(BasePlugin):  # type: ignore[misc]  # axolotl may not be installed
    """Fuses the LoRA layers of axolotl's models. Making one raises RuntimeError if axolotl's plug-ins have changed."""

    def __init__(self) -> None:
        super().__init__()
        check(BasePlugin, _METHODS, f"axolotl {version('axolotl')}")
        self._report: FuseReport | None = None

    def get_input_args(self) -> str:
        """Return where the settings of the plug-in are declared."""
        return f"{LoraKernelsArgs.__module__}.{LoraKernelsArgs.__qualname__}"

    def register(self, cfg: Any) -> None:
        """Switch axolotl's own LoRA kernels off in `cfg`, before axolotl switches on those that it does not name.

        Raises:
            ValueError: `cfg` asks for one of them.
        """
        own = [name for name in AxolotlInputConfig.model_fields if _OWN_KERNEL.fullmatch(name)]
        if asked := [name for name in own if cfg.get(name)]:
            raise ValueError(
                f"{', '.join(asked)} of this config and lora_kernels exclude each other: axolotl's kernels read A and "
                "B past PEFT's layers, which lora_kernels computes. Remove them, or the plug-in"
            )
        for name in own:
            cfg[name] = False

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Fuse the LoRA layers of `model` and log the report.

        Raises:
            RuntimeError: with ``lora_kernels_strict``, where a layer cannot be fused, or there is none.
        """
        if not cfg.get("adapter"):
            _LOG.warning("lora_kernels has nothing to fuse: this config has no adapter")
            return
        self._report = fuse(
            model, strict=bool(cfg.get("lora_kernels_strict")), group=bool(cfg.get("lora_kernels_group"))
        )
        _LOG.info("%s", self._report)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Log the report again. It says which of the fused layers have had no fused call."""
        if self._report is not None:
            _LOG.info("after training: %s", self._report)
