"""What one forward of a module has computed for layers that read the same x and are yet to be called.

It is kept from the call of the first layer to that of the last, in one forward of their parent and in one thread. It
is valid only while everything that it was computed from is the same: x, its version and its address, the operands of
each layer and theirs, autocast, inference mode, and what observes operators. Nothing passes from one forward to the
next. So a recomputation of activation checkpointing makes the same calls as its forward did, saves the same tensors and
draws the same masks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lora_kernels.ops.autograd import as_dtype, autocast_of, device_type, no_autocast
from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.ops.watched import observers
from lora_kernels.peft import folds, hooked
from lora_kernels.peft.reading import Operands, PeftAdapter, as_one_adapter
from lora_kernels.quant.weight import QuantizedWeight


class SharedInput:
    """What a report says about two or more fused layers of one parent that read the same x.

    Attributes:
        names: the names of the layers in their parent.
        calls: the number of calls that computed several layers.
        passed_over: the number of calls of a layer in which it computed alone, by reason.
        dissolved: the reason why the group has ended, or None while it exists.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.calls = 0
        self.passed_over: Counter[str] = Counter()
        self.dissolved: str | None = None

    def __str__(self) -> str:
        names = ", ".join(self.names)
        if self.dissolved:
            return f"{names}: dissolved: {self.dissolved}"
        alone = "".join(f"; {count} times alone: {reason}" for reason, count in self.passed_over.most_common(1))
        return f"{names}: one call for all, {self.calls} so far{alone}"


class _Pending(NamedTuple):
    """Results for one x that are yet to be fetched."""

    x: Tensor
    state: tuple[Any, ...]
    """The `_state` of x when it was read."""
    ys: dict[int, tuple[Tensor, tuple[Any, ...], tuple[Any, ...]]]
    """y, the `_sources` that it was computed from and their `_versions`, by the place of a layer among the names."""


class Forward:
    """One forward of a parent, in one thread."""

    def __init__(self, parent: nn.Module, given: Sequence[Any]) -> None:
        """Begin the forward of `parent` with the arguments `given`."""
        self._parent = weakref.ref(parent)  # not held: the thread would keep the parent, and so the group, alive
        self._given: Sequence[Any] = given
        self._grad, self._hooks = torch.is_grad_enabled(), _saved_tensors_hooks(True)
        self._called: set[int] = set()
        self._pending: dict[int, _Pending] = {}
        self._divided: bool | None = None
        self._over = False

    def take(self, group: Any, layer: Any, x: Tensor) -> Tensor | None:
        """Return the y of `layer`, which belongs to the `Group` `group`, for x; None where the layer has to compute it
        alone.

        The saved tensors and the masks of dropout depend on which layers are computed together, so this must be the
        same in a forward and in its recomputation. So nothing that may differ between the two decides here. Grad mode
        differs: it is off in a forward under reentrant checkpointing, and on in the recomputation. It is therefore
        compared with that at the beginning of the same forward.
        """
        parent, report = self._parent(), group.report
        if parent is None or self._over:
            return None
        place, modules = -1, parent._modules
        for i, name in enumerate(report.names):
            if modules.get(name) is layer:
                place = i
        if place < 0:  # it was replaced, or another parent calls it
            return None
        if (
            torch.is_grad_enabled() is not self._grad
            or _saved_tensors_hooks(True) != self._hooks  # the layer is checkpointed within its parent
            or torch_module._global_backward_hooks  # these and those of a layer give it another x while grad mode is on
            or torch_module._global_backward_pre_hooks
            or _has_hooks(layer)
        ):
            self._called.add(place)
            return None
        pending = self._pending.get(id(x))
        if pending is not None:
            self._called.add(place)
            found = pending.ys.pop(place, None)
            if not pending.ys:
                del self._pending[id(x)]
            if found is None:  # a second y of this layer for this x
                return None
            y, sources, versions = found
            if _same(sources, _sources(layer, x)) and versions == _versions(sources) and pending.state == _state(x):
                return y
            report.passed_over[f"{report.names[place]}, or its input, was changed after it had been read"] += 1
            return None
        for other in self._pending.values():
            if place in other.ys:
                self._called.add(place)
                report.passed_over[f"{report.names[place]} reads another input than the rest"] += 1
                return None
        if place in self._called:
            self._called.clear()  # this forward calls its layers a second time
        self._called.add(place)
        if len(self._called) == 1 and self._is_divided(x):
            return None
        return self._compute(group, modules, place, x)

    def _compute(self, group: Any, modules: Any, place: int, x: Tensor) -> Tensor | None:
        """Return the y of the layer at `place`, and keep those of the layers that are yet to be called."""
        report = group.report
        first = modules[report.names[place]]
        members = {place: first}
        for i, name in enumerate(report.names):
            member = modules.get(name)
            if i in self._called or member is None or member.__dict__.get("_group") is not group:
                continue
            if member._backend == first._backend and not _has_hooks(member):
                members[i] = member
        if len(members) < 2 or torch._C._are_functorch_transforms_active():
            return None
        if x.is_inference():
            report.passed_over["a tensor of inference mode does not show that it was written to"] += 1
            return None
        layers: list[Layer] = []
        reads: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
        for i, member in members.items():
            sources = _sources(member, x)
            if not isinstance(sources, str) and reads and _dtypes_of(sources) != _dtypes_of(reads[0][0]):
                sources = "its adapter, or its computation, has another dtype"
            if isinstance(sources, str):
                self._over = True  # every layer computes alone to the end of this forward
                report.passed_over[f"{report.names[i]}: {sources}"] += 1
                return None
            try:
                reads.append((sources, _versions(sources)))
            except RuntimeError:
                self._over = True
                report.passed_over[f"{report.names[i]}: its weights are tensors of inference mode"] += 1
                return None
            layers.append(_layer(sources))
        state = _state(x)
        y, *others = _results(x, layers, reads[0][0], first._backend)
        report.calls += 1
        _, *rest = members
        self._pending[id(x)] = _Pending(
            x, state, {i: (other, *read) for i, other, read in zip(rest, others, reads[1:], strict=True)}
        )
        return y

    def _is_divided(self, x: Tensor) -> bool:
        """Return whether the parent was given two inputs of x's width, as in cross-attention. Then the layer that is
        called first may read one of them and the others the other one, so it computes alone and the others together."""
        if self._divided is None:
            like_x = {
                id(t)
                for t in self._given
                if isinstance(t, Tensor) and t.dim() == x.dim() and t.shape[-1] == x.shape[-1] and t.is_floating_point()
            }
            self._divided, self._given = len(like_x) > 1, ()
        return self._divided


# Before torch 2.8 nothing tells which hooks are in force.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def _has_hooks(layer: Any) -> bool:
    """Return whether something runs before a layer's forward, which may prepare its weights or replace its x."""
    own = layer.__dict__
    return bool(own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own)


def _state(x: Tensor) -> tuple[Any, ...]:
    """Return everything that y depends on beside the operands of the layer."""
    try:
        address = x.data_ptr()
    except RuntimeError:  # a nested, sparse or wrapped x has no memory of its own
        address = 0
    return x._version, address, x.requires_grad, torch.is_inference_mode_enabled(), autocast_of(x), observers()


def _sources(layer: Any, x: Tensor) -> tuple[Any, ...] | str:
    """Return the operands of a layer, (w, a, b, scale, bias, p) and in unusual cases the bias of B and the dtypes of
    the computation and of y; or why no group can compute them."""
    short: tuple[Any, ...] | None = layer.plain_operands(x)
    if short is not None:
        return short
    whole = layer.read(x)
    if isinstance(whole, str):
        return whole or "no adapter is to be computed"
    (name, adapter), *more = whole.adapters.items()
    if more or adapter.magnitude is not None:
        return "several adapters, or DoRA"
    if folds.is_folded(layer, name):
        return "its A or B is computed anew in every call"
    if layer.is_apart(whole):
        return "its base is computed in another dtype than its adapter"
    modules = layer._modules
    if any(hooked.converted(each) for each in (modules["base_layer"], layer.lora_A[name], layer.lora_B[name])):
        return "hooks convert its weights in every call"
    return whole.w, adapter.a, adapter.b, adapter.scale, whole.bias, adapter.p, adapter.b_bias, whole.inner, whole.outer


def _dtypes_of(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the dtypes that the layers of one call have in common: that of the adapter, and beside a quantised W those
    of the computation and of y."""
    return (sources[1].dtype, *(sources[7:] if isinstance(sources[0], QuantizedWeight) else ()))


def _results(x: Tensor, layers: list[Layer], sources: tuple[Any, ...], backend: str | None) -> Sequence[Tensor]:
    """Return the y of all layers; `sources` are the operands of the first. Over bitsandbytes' weights x and y are
    converted here, and not by autocast, as in the call of one layer."""
    if not isinstance(sources[0], QuantizedWeight):
        return lora_linear_group(x, layers, backend=backend)
    inner, outer = sources[7:]
    with no_autocast(device_type(x)):
        ys = lora_linear_group(as_dtype(x, inner), layers, backend=backend)
        return [as_dtype(y, outer) for y in ys]


def _layer(sources: tuple[Any, ...]) -> Layer:
    """Return the operands in the form that `lora_linear_group` takes."""
    if len(sources) > 6:
        w, a, b, scale, bias, p, b_bias, inner, _ = sources
        whole = Operands(w, bias, {"": PeftAdapter(a, b, b_bias, scale, p)}, inner, inner)
        sources = as_one_adapter(whole)
    return Layer(*sources)


def _versions(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what changes when one of the operands is written to, is given other memory, as by ``w.data = new``, or
    begins or ceases to want a gradient. Raises RuntimeError for tensors of inference mode."""
    w, a, b, scale, bias, _, *more = sources
    codes = w
    if isinstance(w, QuantizedWeight):
        codes, *scales = w.tensors
        more += scales
    version = codes._version + a._version + b._version  # none of them ever decreases
    wanted = a.requires_grad + 2 * b.requires_grad
    others = []
    for t in (scale, bias, *more):
        if isinstance(t, Tensor):
            version += t._version
            wanted = 2 * wanted + t.requires_grad
            others.append(t.data_ptr())
    return version, wanted, codes.data_ptr(), a.data_ptr(), b.data_ptr(), *others


def _same(before: tuple[Any, ...], now: tuple[Any, ...] | str) -> bool:
    """Return whether two readings of a layer gave the same operands."""
    if len(before) != len(now):
        return False
    return all(one is other or _equal(one, other) for one, other in zip(before, now, strict=True))


def _equal(one: Any, other: Any) -> bool:
    """Return whether two operands are the same. Every reading transposes a Conv1D's weight, and makes a new object of
    a quantised weight, whose tensors are the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.is_set_to(other)
    if isinstance(one, QuantizedWeight):
        if not isinstance(other, QuantizedWeight) or len(one.tensors) != len(other.tensors):
            return False
        alike = (one.format, one.shape, one.dtype, one.blocksize) == (
            other.format, other.shape, other.dtype, other.blocksize,
        )  # fmt: skip
        return alike and all(map(_equal, one.tensors, other.tensors))
    return bool(one == other)
