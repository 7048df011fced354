"""A subclass of Tensor that serves torch's own operators only, as DTensor does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Wrapper(Tensor):
    """A tensor around another one that knows torch's own operators and no others, as DTensor does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))
