"""`Chain`: layers of one kind in consecutive blocks, and what they hand on to later ones within one forward.

An input or middle shortcut of ResLoRA reads what an earlier layer has read or computed in the same forward. That
belongs to one forward of one thread. The module around the blocks opens it before its forward and closes it after, also
after an error, and every layer looks for it in its own thread. So no forward sees the tensors of another one, and none
stay behind.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.recompute import in_backward


class _Call:
    """One forward of the module around a chain."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.in_backward = in_backward()
        """Whether a backward has opened it: the module around the chain is then computed again as a whole."""
        self.kept: dict[int, tuple[Tensor, int | None]] = {}
        """What the layers of the chain hand on, by their places in it, and its version counter then."""
        self.unread: set[int] = set()
        """The layers whose tensors the next layer has not read yet."""


class _Open(threading.local):
    """The forwards that are under way in a thread, the innermost one last."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_OPEN = _Open()

_WAY_OUT = (
    'apply_reslora(..., structure="bs") needs no other layer\'s activations and goes with every kind of checkpointing'
)


class Chain:
    """The layers of one kind in consecutive blocks, in their order.

    The layers and the hooks of the module around them share one `Chain`, which is all that tells them apart from those
    of another model. It holds no tensors.
    """

    def __init__(self, names: tuple[str, ...], around: str, reach: int) -> None:
        self.names, self.around = names, around or "the model"
        self.reach = reach
        """How many layers back a layer reads."""

    def put_around(self, module: nn.Module) -> None:
        """Make `module` open and close the calls of this chain."""
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end, always_call=True)

    def take_from(self, module: nn.Module) -> None:
        """Take the hooks of `put_around` away, wherever `module` has them."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Open a call: the forward pre-hook of the module around the chain."""
        refuse_compilers()
        if not in_backward():
            self._close()  # what an interrupt has left open
        _OPEN.calls.append(_Call(self))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Close the call: the forward hook of the module around the chain, which runs after an error too."""
        for i in range(len(_OPEN.calls) - 1, -1, -1):
            if _OPEN.calls[i].chain is self:
                del _OPEN.calls[i]
                return

    def _close(self) -> None:
        _OPEN.calls[:] = [call for call in _OPEN.calls if call.chain is not self]

    def _call(self, place: int) -> _Call:
        """Return the call that the layer at `place` belongs to. Raises RuntimeError where there is none."""
        call = next((call for call in reversed(_OPEN.calls) if call.chain is self), None)
        name = self.names[place]
        if in_backward() and (call is None or not call.in_backward):
            raise RuntimeError(
                f"activation checkpointing computes {name} again in the backward, where what layers of its kind handed "
                f"on in the forward is gone. Checkpoint {self.around} as a whole, or none of its blocks. {_WAY_OUT}"
            )
        if call is None:
            raise RuntimeError(
                f"{name} was called outside of a forward of {self.around}, in which layers of its kind hand on what "
                f"they read: call {self.around}. {_WAY_OUT}"
            )
        return call

    def is_read(self, place: int) -> bool:
        """Return whether a later layer reads what the layer at `place` hands on."""
        return self.reach > 0 and place < len(self.names) - 1

    def hand_on(self, place: int, t: Tensor) -> None:
        """Keep t, the input or the h of the layer at `place`, for later layers of the same forward.

        Raises RuntimeError where the next layer has not read what this one handed on before: which of the two is its
        own could not be told.
        """
        if not self.is_read(place):
            return
        call = self._call(place)
        if place in call.unread:
            raise RuntimeError(
                f"{self.names[place]} was called twice in one forward of {self.around} before "
                f"{self.names[place + 1]} was called once, so it cannot be told which call is whose. {_WAY_OUT}"
            )
        if t.is_inference():  # which has no version counter
            call.kept[place] = t.clone(), None
        else:
            call.kept[place] = t, t._version
        call.unread.add(place)

    def before(self, place: int, number: int) -> list[Tensor]:
        """Return what the `number` layers before the one at `place` have handed on in this forward, the nearest first.
        Raises RuntimeError where one of them was not called, or where a tensor was written to in the meantime."""
        if not number:
            return []
        call = self._call(place)
        wanted = range(place - 1, place - 1 - number, -1)
        missing = [self.names[i] for i in wanted if i not in call.kept]
        if missing:
            raise RuntimeError(
                f"{self.names[place]} needs what {', '.join(missing[:5])} hand on, which were not called in this "
                f"forward of {self.around}: every block must run in every forward, so switch off what skips blocks, "
                f"such as layerdrop. {_WAY_OUT}"
            )
        call.unread.discard(place - 1)
        found = [call.kept[i] for i in wanted]
        for i, (t, version) in zip(wanted, found, strict=True):
            if version is not None and version != t._version:
                raise RuntimeError(
                    f"the x of {self.names[i]} was written to after that layer had read it, and {self.names[place]} "
                    f"needs it as it was: write y = y + x for y += x in the model. {_WAY_OUT}"
                )
        call.kept.pop(place - self.reach, None)  # no later layer reads it
        return [t for t, _ in found]


def refuse_compilers() -> None:
    """Raise RuntimeError while torch.compile traces. It then leaves the frame to Python, or with ``fullgraph=True``
    gives up with this message."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            'the shortcuts of structure="is" and "ms" between layers are not compiled: leave out fullgraph=True, or '
            'take structure="bs", which is compiled whole'
        )
