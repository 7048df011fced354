"""With LORA_KERNELS=1 in the environment, the LoRA layers that PEFT makes are fused. No code of the program changes.

torch calls `install` at the end of ``import torch``, in every process: the package's metadata names it in torch's group
of entry points "torch.backends". Without the variable it returns at once. With it, it only puts a finder on
sys.meta_path, which waits for PEFT. PEFT is imported by the program or not at all, and lora_kernels when PEFT makes its
first LoRA layer.

This module lies beside the package and not in it, because the import of a module of the package would import the
package, and with it much of torch, in the middle of ``import torch``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

VARIABLE = "LORA_KERNELS"
RUN = "LORA_KERNELS_RUN"
"""The variable that names a folder where each process tells its layers and calls. ``python -m lora_kernels run`` sets
it for the processes that it starts."""

_WAITED_FOR = {
    "peft.tuners.lora.model": "_watch_peft",
    "llamafactory.v1.plugins.model_plugins.kernels.interface": "_add_kernel",
}
"""A module → the function of this module that is called once the module has been imported."""


def install() -> None:
    """Wait for PEFT if the environment variable LORA_KERNELS is 1, and do nothing if it is 0, empty or unset.

    Another value is an error of `check`, which is raised where PEFT is imported: ``import torch`` never fails.
    """
    if os.environ.get(VARIABLE, "0").strip() in ("", "0") or any(type(each) is _Finder for each in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    late = [name for name in _WAITED_FOR if name in sys.modules]
    if late:
        _warn(f"{late[0]} was imported before torch")


def check(value: str) -> None:
    """Raise ValueError unless `value` is one that the variable LORA_KERNELS may have."""
    if value.strip() not in ("", "0", "1"):
        raise ValueError(
            f"the environment variable {VARIABLE} is {value!r}: 1 fuses the LoRA layers that PEFT makes, 0 or unset "
            "leaves them to PEFT"
        )


class _Finder:
    """A finder on sys.meta_path that finds nothing itself. It has a function called after the import of the modules of
    `_WAITED_FOR`, which the other finders find."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _WAITED_FOR:
            return None
        for finder in [each for each in sys.meta_path if each is not self]:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                try:
                    _call_after(spec.loader, name)
                except AttributeError as error:  # a loader that does not let its methods be replaced
                    _warn(f"{name} cannot be watched ({error})")
                return spec
        return None


def _call_after(loader: Any, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        check(os.environ.get(VARIABLE, ""))
        execute(module)
        try:
            if module.__name__ == name:
                globals()[_WAITED_FOR[name]](module)
        except Exception as error:  # the import is another package's, and must not fail because of this one
            _warn(f"{type(error).__name__}: {error}")

    loader.exec_module = exec_module


def _watch_peft(module: Any) -> None:
    """Fuse each layer that PEFT's LoraModel makes from now on, from its first on.

    Nothing of lora_kernels is imported before, because PEFT's own import is still under way here.
    """
    kind = module.LoraModel
    create = kind.__dict__["_create_new_module"].__func__
    works = True

    def create_fused(*args: Any, **kwargs: Any) -> Any:
        nonlocal works
        layer = create(*args, **kwargs)
        if not works:
            return layer
        try:
            from lora_kernels.peft.enabling import made_by_environment
        except Exception as error:
            works = False
            _warn(f"{type(error).__name__}: {error}")
            return layer
        layer = made_by_environment(layer)
        if RUN in os.environ:
            from lora_kernels.peft.tally import note

            note(layer, os.environ[RUN])
        return layer

    kind._create_new_module = staticmethod(create_fused)


def _add_kernel(_: Any) -> None:
    """Give LLaMA-Factory the kernel ``lora_kernels``. Its own import of kernels is complete here."""
    from lora_kernels.plugins.llamafactory import add_kernel

    add_kernel()


def _warn(reason: str) -> None:
    """Warn that layers are not fused. A program that turns warnings into errors gets a line on stderr instead, because
    it would fail in an import that is not its own."""
    import warnings

    text = f"{VARIABLE}=1 has no effect here, and PEFT's own LoRA layers stay: {reason}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        print(f"lora_kernels: {text}", file=sys.stderr)
