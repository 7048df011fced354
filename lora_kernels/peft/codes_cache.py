"""`CodesCache`: what was read from the base of a layer, kept for as long as the base has the same tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.quant.reader import Facts, Reader, Unreadable
from lora_kernels.quant.weight import QuantizedWeight


class _Stamp(NamedTuple):
    """What tells whether a tensor is the one that was read."""

    storage: StorageWeakRef
    """Held, so that no other storage gets its number while it is compared; it keeps no memory."""
    address: int
    shape: tuple[int, ...]


class _Kept(NamedTuple):
    stamps: tuple[_Stamp, ...]
    bits: tuple[int | None, ...]
    """A number of the values of each tensor on whose values the facts depend."""
    found: Facts | str
    """The facts, or why the weight cannot be read."""


class CodesCache:
    """The facts about the weight of a base layer. They are read again where one of its tensors is another one or lies
    at another address, as after moving, loading, merging and re-packing, and where the values that they depend on have
    changed. Version counters would not do: torchao's tensors do not count what is written to their parts. The codes
    themselves are never kept. A copy and an unpickled object start empty.
    """

    def __init__(self) -> None:
        self.last: _Kept | None = None
        """The last reading. It is replaced as a whole, because several threads may read the same layer."""

    def read(self, reader: Reader, base: Any) -> QuantizedWeight | str:
        """Return the weight of `base`, or why the kernels cannot read it."""
        compiling = torch.compiler.is_compiling()
        kept = self.last
        try:
            if not compiling:  # a compiler knows no addresses; `prepare` has read the weight before
                with torch._C.DisableTorchFunctionSubclass():
                    sources, bits = reader.sources(base), tuple(map(_bits, reader.values(base)))
                    if kept is None or bits != kept.bits or not _are(sources, kept.stamps):
                        self.last = kept = _Kept(tuple(map(_stamp, sources)), bits, _facts(reader, base))
            if kept is None:
                return "its base weight has not been read before torch.compile"
            if isinstance(kept.found, str):
                return kept.found
            return reader.weight(base, kept.found)
        except Unreadable as error:
            return f"its base weight cannot be read: {error}"

    def __deepcopy__(self, memo: object) -> CodesCache:
        return CodesCache()

    def __reduce__(self) -> tuple[type[CodesCache], tuple[()]]:
        return CodesCache, ()


@torch.inference_mode(False)  # copies are kept, and may be saved for a backward later
@torch.no_grad()
def _facts(reader: Reader, base: Any) -> Facts | str:
    try:
        facts = reader.facts(base)
        reader.weight(base, facts).check()
        return facts
    except (Unreadable, ValueError, TypeError) as error:
        return f"its base weight cannot be read: {error}"


def _stamp(t: Tensor) -> _Stamp:
    return _Stamp(StorageWeakRef(t.untyped_storage()), t.data_ptr(), tuple(t.shape))


def _bits(t: Tensor) -> int | None:
    """Return the sum of the memory of t as integers, which changes with practically every write. On another device,
    where it would have to be waited for, it is the version counter."""
    if not t.is_cpu:
        return None if t.is_inference() else t._version
    flat = t.detach().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # a single element may have any stride
    whole = flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return int(flat.view(torch.int64 if whole else torch.uint8).sum())


def _are(sources: tuple[Tensor, ...], stamps: tuple[_Stamp, ...]) -> bool:
    """Return whether `sources` are the tensors that were stamped."""
    if len(sources) != len(stamps):
        return False
    for t, (storage, address, shape) in zip(sources, stamps, strict=True):
        if t.untyped_storage()._cdata != storage.cdata or t.data_ptr() != address or t.shape != shape:
            return False
    return True
