"""The plug-in for ms-swift: every LoRA layer that PEFT makes in ms-swift's processes is fused.

    swift sft --external_plugins "$(python -m lora_kernels.plugins.ms_swift)" ...

ms-swift imports the file `PATH` in each of its processes, before it builds the model. The file calls `install`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PATH = str(Path(__file__).parent / "external" / "lora_kernels_for_ms_swift.py")
"""The file for ``--external_plugins``. It lies in a folder of its own, because ms-swift puts that folder first on
sys.path."""


def install() -> None:
    """Fuse every LoRA layer that PEFT makes from now on, and say so in ms-swift's log.

    A worker of a DataLoader, in which ms-swift imports the file again, makes no layers and is left alone.

    Raises:
        RuntimeError: ms-swift no longer makes its LoRA layers by PEFT's LoraModel.
        ImportError: ms-swift or PEFT cannot be imported.
    """
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        return
    from peft import LoraConfig, LoraModel
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from swift.tuners import LoraConfig as Config
    from swift.utils import get_logger

    from lora_kernels.peft.enabling import enable

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get("LORA")  # type: ignore[call-overload]
    if not issubclass(Config, LoraConfig) or tuner is not LoraModel:
        raise RuntimeError(
            f"ms-swift {_version()} has {getattr(tuner, '__name__', tuner)} for the LoRA layers of {Config.__name__}; "
            "this plug-in of lora_kernels knows PEFT's LoraModel. A newer lora_kernels may know it. "
            "lora_kernels.fuse(model) fuses the layers of a model that is built"
        )
    enable()
    get_logger().info("lora_kernels fuses the LoRA layers that PEFT makes")


def _version() -> str:
    try:
        return version("ms-swift")
    except PackageNotFoundError:
        return "of an unknown version"


if __name__ == "__main__":
    print(PATH)
