"""`unchanged`: a context that notes the operands of every operator in it, and in the end undoes changes of a model."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_MAPPINGS, _SETS, _LISTS = (dict, OrderedDict, Counter, defaultdict), (set,), (list, deque)


class Operands(TorchDispatchMode):
    """A mode that notes which tensors' values the operators read, and keeps the old values of `kept` tensors before
    an operator writes into them."""

    supports_higher_order_operators = True

    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()
        self.read: set[int] = set()
        """The storages of the tensors that were read, as `storage` gives them."""
        self._kept = {storage(t): t for t in kept}
        self._old: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note its operands."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # operators of a higher order have none
        tensors = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # The schemas of batch norms do not say that the running statistics are written to.
        writes = schema is not None and (schema.is_mutable or "batch_norm" in schema.name)
        if writes:
            self._keep(tensors)
        # A view reads no values. Its result has the same storage, so that an operator that computes with it is seen.
        if writes or schema is None or not any(result.alias_info for result in schema.returns):
            self.read.update(map(storage, tensors))
        return func(*args, **kwargs)

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        for key in map(storage, tensors):
            if key in self._kept and key not in self._old:
                self._old[key] = self._kept[key].detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Write the old values back."""
        for key, value in self._old.items():
            self._kept[key].copy_(value)


def storage(t: Tensor) -> int:
    """Return a number that tensors have in common if they share their memory; 0 for a tensor that has no single
    storage, such as a sparse one."""
    try:
        return t.untyped_storage()._cdata
    except NotImplementedError:
        return 0


@contextmanager
def unchanged(model: nn.Module, others: Iterable[object] = ()) -> Iterator[Operands]:
    """Run a block under `Operands`. Afterwards these are as before: the attributes of every module of `model` and of
    every object of `others`, with the containers among them; the values of parameters, buffers and other tensors that
    modules hold; and the random generators of torch, Python and NumPy, with the torch.Generators among the attributes.
    """
    objects = [*model.modules(), *others]
    attributes = [(each, dict(each.__dict__)) for each in objects]
    containers = [(value, copy.copy(value)) for _, own in attributes for value in own.values() if _is_container(value)]
    tensors = [t for _, own in attributes for t in own.values() if isinstance(t, Tensor)]
    generators = [(g, g.get_state()) for _, own in attributes for g in own.values() if isinstance(g, torch.Generator)]
    operands = Operands([*model.parameters(), *model.buffers(), *tensors])
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    gpus = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(gpus), operands:
            yield operands
    finally:
        operands.restore()
        for generator, state in generators:
            generator.set_state(state)
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
        for value, old in containers:
            _refill(value, old)
        for each, own in attributes:
            each.__dict__.clear()
            each.__dict__.update(own)


def _is_container(value: object) -> bool:
    return type(value) in (*_MAPPINGS, *_SETS, *_LISTS)


def _refill(value: Any, old: Any) -> None:
    value.clear()
    (value.extend if type(value) in _LISTS else value.update)(old)
