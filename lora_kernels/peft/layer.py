"""`FusedLayer`: what every layer of PEFT has in common that `fuse` has put on a forward of this package.

`fuse` changes the class of a layer to a subclass that overrides ``forward`` and merging (`lora_kernels.peft.merging`),
so that saving, loading, swapping, switching and deleting adapters stay PEFT's. A call that the kernels cannot serve
goes to PEFT's own forward, and its reason is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.core.operands import Call
from lora_kernels.nn.dry_run import Watched
from lora_kernels.peft import merging
from lora_kernels.peft.kept import Kept
from lora_kernels.peft.merging import Sum


class Survey(NamedTuple):
    """What `fuse` finds out about a layer before it changes its class."""

    text: str = ""
    """The size of the base and its adapters, for the report."""
    reasons: tuple[str, ...] = ()
    """Why single adapters of the layer are left to PEFT. The layer is fused for the others."""
    calls: tuple[Call, ...] = ()
    """The forwards of the layer, for the report to tell which back-end serves them."""


class FusedLayer:
    """A layer of PEFT with a forward of this package. A subclass inherits from this class and then from `peft_class`.

    Attributes:
        fused_calls: the number of forwards on the fused path (not counted inside ``torch.compile``).
        passed_over: the number of forwards that were left to PEFT, by reason.
        base_calls: the number of forwards without an adapter to compute: merged, disabled, or none of them active.
    """

    peft_class: ClassVar[type[Any]]
    """PEFT's class."""
    own: ClassVar[dict[str, Callable[[], Any]]] = {
        "fused_calls": int,
        "passed_over": Counter,
        "base_calls": int,
        "_backend": lambda: None,
        "_kept_base": lambda: None,
    }
    """The attributes that a fused layer has beside PEFT's, and the functions that make their first values."""
    shares_input: ClassVar[bool] = False
    """Whether one call can compute layers of this class that read the same x (`lora_kernels.peft.groups`)."""

    fused_calls: int
    passed_over: Counter[str]
    base_calls: int
    _backend: str | None
    _kept_base: list[Kept] | None = None
    """What merging has replaced, until `unmerge` puts it back; None if nothing is merged here."""

    forward: Any
    merged_adapters: list[str]

    @classmethod
    def why_not_forward(cls) -> str:
        """Return why no layer of `peft_class` can be fused with the PEFT that is installed, or "" where they can."""
        return ""

    @classmethod
    def survey(cls, layer: Any) -> Survey | str:
        """Return what there is to fuse in `layer`, which may be of `peft_class` still, or why it is left to PEFT."""
        raise NotImplementedError

    @classmethod
    def inner(cls, layer: Any) -> Sequence[str]:
        """Return the names, beneath `layer`, of the layers of PEFT inside it that its own forward computes."""
        return ()

    def count_left(self, reason: str) -> None:
        """Count a forward that is left to PEFT's own; `reason` is "" where it has no adapter to compute."""
        if reason:
            self.passed_over[reason] += 1
        else:
            self.base_calls += 1

    def prepare(self) -> None:
        """Do the work that a layer needs once, before its first fused forward."""

    def leave(self, reason: str) -> None:
        """End what the layer shares with other layers, because of `reason`."""

    def watched(self) -> Watched | None:
        """Return what a dry forward looks at in this layer; None for a layer that computes no adapter at present."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters as PEFT does, by default the active ones, and keep the base for `unmerge`:
        `lora_kernels.peft.merging.merge`, which says what is raised. With `safe_merge` a merged weight that is not
        finite is refused."""
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the base of before `merge` back, bit for bit. Raises ValueError where the merged weight was written to
        since."""
        merging.unmerge(self)

    def adapters_to_merge(self) -> Container[str]:
        """Return the names of the adapters that this layer has."""
        adapters: Container[str] = self.lora_A  # type: ignore[attr-defined]
        return adapters

    def sums(self, names: Sequence[str]) -> Sequence[Sum] | None:
        """Return what merging the adapters `names` adds to which parameters; None where merging is PEFT's own. Raises
        NotImplementedError for an adapter whose update is no matrix."""
        return None

    def note_merged(self, names: list[str]) -> None:
        """Take down that `names` are the merged adapters from now on."""
        self.merged_adapters = names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base for a model without adapters, which PEFT's ``merge_and_unload`` and ``unload`` ask for. A
        quantised base is quantised once, from W + s·B A in fp32."""
        if merge:
            merging.merge(self, safe_merge, adapter_names, torch.float32)
        return merging.released(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does. Raises ValueError for one that is merged."""
        if self._kept_base is not None and adapter_name in self.merged_adapters:
            raise ValueError(f"Cannot delete adapter {adapter_name!r} while it is merged. Please unmerge it first.")
        self.peft_class.delete_adapter(self, adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        whole = super()._apply  # type: ignore[misc]
        return whole(fn, recurse) if self._kept_base is None else merging.apply(self, whole, fn, recurse)

    def before_fuse(self) -> Callable[[], None]:
        """Return a function that puts back what `fuse` changes in a layer that is fused already."""
        backend = self._backend

        def put_back() -> None:
            self._backend = backend

        return put_back

    def _get_name(self) -> str:
        return self.peft_class.__name__  # so that repr() begins with PEFT's name, lora.Linear

    def extra_repr(self) -> str:
        """Return the note that ``repr`` shows for a fused layer."""
        return "fused by lora_kernels"
