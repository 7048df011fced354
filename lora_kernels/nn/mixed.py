"""`mixed`: a context in which the rows of a model's x belong to several of its adapters, or to none.

    with mixed(model, ["a", "b", None]):
        loss = model(x)          # x[0] is computed with adapter "a", x[1] with "b", x[2] with the base alone

A layer that can do this has a static method ``adapter_table(model)``, which returns the numbers of the model's adapters
by name, and raises where something in the model cannot be computed by row. In its forward such a layer asks
`in_force.current_for`, and hands what it has computed to `Mixed.computed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.core.rows import Rows
from lora_kernels.nn import recompute
from lora_kernels.nn.adapter import AdapterLayer
from lora_kernels.nn.in_force import CURRENT, HERE

NamesOrIds = Sequence[str | None] | Sequence[int] | Tensor | Rows
"""What `mixed` takes."""

Table = Mapping[str, int]
"""The numbers of adapters, by name."""


class Mixable(NamedTuple):
    """What `mixed` has to know about a model. It is valid until layers or adapters are added or removed."""

    layers: frozenset[int]
    """The layers that compute by row, each as its ``id``."""
    table: Table


class Mixed:
    """A context in force: which rows belong to which adapters of which layers.

    It refers to no module, and it is used once. A layer sees it through `current_for`.
    """

    def __init__(self, mixable: Mixable, names_or_ids: NamesOrIds) -> None:
        """Take the rows of a model for the next ``with``. Raises what `mixed` raises for `names_or_ids`."""
        self.layers, self.table = mixable
        rows, self.shape = rows_of(names_or_ids, self.table)
        n = size_of(self.table)
        if rows.n > n:
            raise ValueError(
                f"the rows name {rows.n} adapters, and the model has {n}: {', '.join(self.table) or 'none'}"
            )
        self.rows = rows.padded(n)
        """The rows beside all adapters of the table. `shape` is that of the ids, if there is one for each token."""
        self.outer: Mixed | None = None
        """The context in which this one was entered."""
        self.in_backward = False
        """Whether a backward has entered it: it then belongs to a function that is computed again."""
        self.forwards: set[int] = set()
        """The layers that have computed in it outside of a backward, each as its ``id``."""
        self._token: Token[Mixed | None] | None = None

    def of(self, x: Tensor) -> Rows:
        """Return the rows of x, with their tensors on its device. They are copied once.

        Raises ValueError for ids [B, S] beside an x [S, B, K], whose rows have another order.
        """
        rows, compiling = self.rows, torch.compiler.is_compiling()
        if not compiling and self.shape is not None and x.dim() == 3 and 1 not in self.shape:
            B, S = self.shape
            if B != S and x.shape[:2] == (S, B):
                raise ValueError(
                    f"the ids are {tuple(self.shape)}, and a layer has x {tuple(x.shape)}: they must have the order of "
                    "x. Transpose the ids if the model takes (S, B)"
                )
        if rows.order.device != x.device:
            rows = rows.to(x.device)
            if not compiling:
                self.rows = rows
        return rows

    def computed(self, layer: Any, y: Tensor) -> Tensor:
        """Return y, which `layer` has computed with these rows, and remember it for a recomputation in the backward."""
        if not torch.compiler.is_compiling():
            recompute.remember(layer, self, y)
        return y

    def __enter__(self) -> Mixed:
        if self._token is not None:
            raise RuntimeError("a context of lora_kernels.mixed is entered once: call mixed() again")
        self.outer, self.in_backward = CURRENT.get(), recompute.in_backward()
        self._token = CURRENT.set(self)
        HERE.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        HERE.leave(self)
        CURRENT.reset(self._token)


def mixed(model: nn.Module, names_or_ids: NamesOrIds) -> Mixed:
    """Return a context in which each row of the model's x is computed with an adapter of its own, or with the base
    alone. It serves forwards and backwards, in training mode too, where PEFT refuses its ``adapter_names``.

    Only this thread and the layers of `model` see the context. With activation checkpointing, call ``backward()``
    inside it.

    Args:
        model: a model of PEFT after `lora_kernels.fuse`, one with `FusedLoRALinear` layers, whose adapter is number 0
            and called "default", or another whose layers compute by row.
        names_or_ids: the adapters, in one of these forms:

            * one name for each sample, x[j]; None and "__base__" are the base alone,
            * ids [B], one number for each sample; -1 is the base alone,
            * ids [B, S], one number for each token of x [B, S, K]: a packed batch has B = 1,
            * a `Rows`.

            An adapter's number is its place in the model's ``peft_config``; `table_of` returns all of them.

    Raises:
        RuntimeError: where no layer of the model computes by row, or a part of it has adapters that cannot be computed
            so, or in a backward that computes a layer again outside of the context.
        KeyError: for an unknown name. ValueError, TypeError: for ids out of range, or of another form.
    """
    return Mixed(mixable(model), names_or_ids)


def table_of(model: nn.Module) -> dict[str, int]:
    """Return the numbers of the model's adapters by name, which `mixed` takes as ids. Raises RuntimeError as `mixed`
    does."""
    return dict(mixable(model).table)


def mixable(model: nn.Module) -> Mixable:
    """Return the layers of `model` that compute by row, and its adapters. Raises RuntimeError where there is no such
    layer, or a part of the model has adapters that cannot be computed by row."""
    layers = set()
    inside: set[int] = set()  # the frozen layers that such layers hold
    tables: dict[Callable[[nn.Module], Table], None] = {}
    for module in model.modules():
        kind = type(module)
        find: Callable[[nn.Module], Table] | None = getattr(kind, "adapter_table", None)
        if find is not None and id(module) not in inside:
            layers.add(id(module))
            inside.update(map(id, module.children()))
            tables[find] = None
        elif isinstance(module, AdapterLayer) and id(module) not in inside:
            raise RuntimeError(
                f"a {kind.__name__} has one adapter, which every row would get: mixed takes FusedLoRALinear and "
                "QuantizedLoRALinear, models of PEFT after lora_kernels.fuse(model), and an AdapterPool"
            )
        elif isinstance(module, nn.DataParallel):
            raise RuntimeError("the threads of nn.DataParallel do not see a context: take DistributedDataParallel")
    if not tables:
        raise RuntimeError(
            "no layer of this model can compute each row with an adapter of its own: call lora_kernels.fuse(model) "
            "after get_peft_model or from_pretrained. Only LoRA on linear layers can (not VeRA and others)"
        )
    if len(tables) > 1:
        raise RuntimeError("this model has layers of PEFT, of this package or of a pool: mixed takes one kind of them")
    (find,) = tables
    return Mixable(frozenset(layers), find(model))


def size_of(table: Table) -> int:
    """Return the number of adapters that rows of this table name: one more than the largest number in it."""
    return max(table.values(), default=-1) + 1


def rows_of(names_or_ids: NamesOrIds, table: Table) -> tuple[Rows, torch.Size | None]:
    """Return the rows that one of the forms of `mixed` stands for, and the shape of ids [B, S], else None. Raises what
    `mixed` raises for it."""
    if isinstance(names_or_ids, Rows):
        return names_or_ids, None
    if isinstance(names_or_ids, (str, Mapping)):
        raise TypeError(f"mixed takes one name or id for each sample, got {names_or_ids!r}")
    if not isinstance(names_or_ids, Tensor):
        each = list(names_or_ids)
        if all(one is None or isinstance(one, str) for one in each):
            return Rows.by_sample(each, table), None  # type: ignore[arg-type]
        if any(one is None or isinstance(one, str) for one in each):
            raise TypeError(f"mixed takes either names or ids, got both: {each}")
        names_or_ids = torch.tensor(each, device="cpu")
    if names_or_ids.dim() not in (1, 2):
        raise ValueError(f"ids must be [B] or [B, S], got shape {tuple(names_or_ids.shape)}")
    rows = Rows.by_id(names_or_ids.reshape(-1), size_of(table))
    if names_or_ids.dim() == 2:
        return rows, names_or_ids.shape
    return Rows(rows.order, rows.starts, rows.known_counts, per_sample=True), None
