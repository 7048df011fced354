"""What a merged layer of PEFT keeps of its base: the objects that were there, and how they come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from lora_kernels.peft.checksum import checksum
from lora_kernels.peft.dense_stand_in import MergedLinear


def stamp(t: Tensor | None) -> int | None:
    """Return the `checksum` of t; None for a tensor without values."""
    if t is None or t.is_meta or type(t) not in (Tensor, nn.Parameter):
        return None
    return checksum(t)


class Kept:
    """What merging has replaced at one place. A subclass says what it was."""

    owner: nn.Module
    """The module in which it was."""
    name: str
    """Its name there."""
    before: Any
    """What was there."""
    stamps: tuple[int | None, ...] = ()
    """The `stamp` of each merged tensor."""

    def __init__(self, owner: nn.Module, name: str, before: Any) -> None:
        self.owner, self.name, self.before = owner, name, before

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that are there while merged."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Put back what was there."""
        raise NotImplementedError

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert what is kept, as ``nn.Module._apply`` does it with what is not."""
        raise NotImplementedError

    def extra_bytes(self) -> int:
        """Return the bytes that are in memory because of the merge."""
        kept: int = self.before.nbytes
        return kept

    def seal(self) -> None:
        """Take down the values that are there now as those of the merge."""
        self.stamps = tuple(map(stamp, self.tensors()))

    def is_trained(self) -> bool:
        """Return whether a backward has given the merged weight a gradient, which no optimiser knows."""
        return any(t is not None and t.grad is not None for t in self.tensors())

    def is_written(self) -> bool:
        """Return whether the values there are not those that merging has put there, or have a gradient."""
        return self.is_trained() or self.stamps != tuple(map(stamp, self.tensors()))


class KeptParameter(Kept):
    """A dense parameter. Another Parameter is in its place, so the one that is kept was not touched."""

    before: nn.Parameter

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the merged parameter."""
        return (self.owner._parameters.get(self.name),)

    def put_back(self) -> None:
        """Put the parameter back, the object itself, with the requires_grad that the merged one has now."""
        now = self.tensors()[0]
        if now is not None and now.requires_grad != self.before.requires_grad:
            self.before.requires_grad_(now.requires_grad)
        self.owner.__dict__.pop(self.name, None)
        self.owner._parameters[self.name] = self.before

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the parameter. torch's own rules say whether it stays the same object."""
        holder = nn.Module()
        holder.register_parameter("weight", self.before)
        self.before = cast(nn.Parameter, holder._apply(fn)._parameters["weight"])


class KeptBase(Kept):
    """A base layer with a quantised weight. A `MergedLinear` is in its place."""

    before: nn.Module

    @property
    def standing(self) -> MergedLinear | None:
        """The `MergedLinear`; None where other code has put something else there."""
        now = self.owner._modules.get(self.name)
        return now if isinstance(now, MergedLinear) else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the merged weight, and the bias if it is merged too."""
        return (None,) if self.standing is None else self.standing.own_tensors()

    def put_back(self) -> None:
        """Put the layer back, in the mode of now, and with the bias of now if that was not merged."""
        if self.standing is not None:
            self.before.train(self.standing.training)
            if not self.standing.has_own_bias and "bias" in self.before._parameters:
                self.before._parameters["bias"] = self.standing._parameters["bias"]
        self.owner._modules[self.name] = self.before

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the layer."""
        self.before._apply(fn)

    def extra_bytes(self) -> int:
        """Return the bytes of the dense weight beside the codes."""
        return sum(t.nbytes for t in self.tensors() if t is not None)


class KeptShard(Kept):
    """This process's part of a parameter that is a DTensor, as FSDP2 leaves it. The values are copied, because FSDP2
    holds the parameter itself: merging writes into it."""

    before: Tensor

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__(owner, name, None)
        self.before = self._local().detach().clone()

    def is_gathered(self) -> bool:
        """Return whether FSDP2 has put the whole weight there, as between a forward and its backward."""
        return not hasattr(self.owner._parameters.get(self.name), "to_local")

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the part of the merged parameter."""
        return (None,) if self.is_gathered() else (self._local().detach(),)

    def put_back(self) -> None:
        """Write the values back."""
        self._local().copy_(self.before)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the values."""
        self.before = fn(self.before)

    def _local(self) -> Tensor:
        parameter: Any = self.owner._parameters[self.name]
        local: Tensor = parameter.to_local()
        return local
