"""A search for code that reads the weight of a linear layer instead of calling the layer, in the source of its parent.

A module's forward may hand ``self.proj.weight`` to a function instead of calling ``self.proj``. Then an adapter on proj
has no effect there and gets no gradient. `reading` finds such code in the parent's source. What it cannot see, such as
a weight that is read from elsewhere, shows in a dry forward (`lora_kernels.nn.dry_run`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

_HARMLESS = frozenset({"dtype", "device", "shape", "requires_grad", "ndim", "size", "dim", "numel", "is_cuda"})
"""Attributes and methods of a weight whose use does not count as reading it."""

_PARTS = ("weight", "bias")


class Reading(NamedTuple):
    """A method that reads a child's weight or bias itself."""

    method: str
    """The class and the method, such as "MultiheadAttention.forward"."""
    always: bool
    """Whether the child is never called beside that, so that an adapter on it could have no effect."""

    def __str__(self) -> str:
        how = "reads" if self.always else "may read"
        return f"{self.method} {how} its weight or bias without calling it, past an adapter"


def reading(parent: nn.Module, name: str) -> Reading | None:
    """Return how the forward of `parent`, or a method that it calls, reads the weight or bias of its child `name`. None
    where it does not, and where the class has no source. A dotted name stands for a module further inside.

    The mixers of state-space models (Mamba and its relatives, known by their A_log) hand most of their weights to one
    fused function where its kernel serves, so that what they may read counts as read always.
    """
    kind: Any = type(parent)
    own: Any = parent.__dict__.get("forward")  # a patch of this one module
    found = _readings(kind, _methods(kind), getattr(own, "__func__", own)).get(name)
    if found is not None and not found.always and isinstance(getattr(parent, "A_log", None), nn.Parameter):
        return found._replace(always=True)
    return found


def reading_in(model: nn.Module, name: str) -> Reading | None:
    """Return how the parent of the module with the dotted name `name` in `model` reads its weight, or else how another
    module around it may do so, as in ``self.attention.proj.weight``."""
    parts = name.split(".")
    around = model.get_submodule(".".join(parts[:-1]))
    found = reading(around, parts[-1])
    for depth in range(len(parts) - 2, -1, -1):
        if found is not None:
            break
        found = reading(model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:]))
    return found


def conversion_in(model: nn.Module, name: str) -> str:
    """Return the method of the parent of the module with the dotted name `name` that reads the dtype of its weight, as
    in ``x.to(self.proj.weight.dtype)``, with no exception for int8; "" where there is none.

    The codes of a quantised layer are int8, and an x that is converted to that is lost.
    """
    above, _, child = name.rpartition(".")
    parent = model.get_submodule(above)
    kind: Any = type(parent)
    own: Any = parent.__dict__.get("forward")
    return _conversions(kind, _methods(kind), getattr(own, "__func__", own)).get(child, "")


def close_fast_paths(model: nn.Module, kind: type[nn.Module]) -> Callable[[], None]:
    """Switch off the inference paths of nn.TransformerEncoder that read the weights of linear1 and linear2 without
    calling them, in each layer that holds a module of class `kind`. Returns a function that undoes it."""
    closed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for encoder, name, off in _FAST_PATHS:
            if isinstance(module, encoder) and any(isinstance(each, kind) for each in module.modules()):
                closed.append((module, name, getattr(module, name)))
                setattr(module, name, off)

    def undo() -> None:
        for module, name, value in closed:
            setattr(module, name, value)

    return undo


_FAST_PATHS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""Modules with a path for inference, and the attribute and its value that switch this path off."""


def _methods(kind: type[nn.Module]) -> tuple[FunctionType, ...]:
    """Return the functions of a class and its bases, which are a part of the key of what was read. A function does not
    change its source, but a package that patches the class replaces functions."""
    bases = (base for base in kind.__mro__ if base not in _NOT_READ)
    return tuple(each for base in bases for each in vars(base).values() if isinstance(each, FunctionType))


@functools.cache
def _readings(
    kind: type[nn.Module], methods: tuple[FunctionType, ...], forward: Callable[..., Any] | None
) -> dict[str, Reading]:
    read: dict[str, str] = {}
    used: set[str] = set()
    for owner, function in _methods_of_forward(kind, forward):
        for node, parent in _attributes_of_self(function):
            if not isinstance(parent, ast.Attribute) and not _is_asked_about(parent):
                used.add(node.attr)  # it is called, or handed to another function
            name, parent = _part(node)
            if isinstance(parent, ast.Attribute) and _is_value(parent):
                read.setdefault(name, f"{owner.__name__}.{function.name}")
    # What lies further inside is called by its own parent.
    return {name: Reading(method, "." not in name and name not in used) for name, method in read.items()}


@functools.cache
def _conversions(
    kind: type[nn.Module], methods: tuple[FunctionType, ...], forward: Callable[..., Any] | None
) -> dict[str, str]:
    found: dict[str, str] = {}
    for owner, function in _methods_of_forward(kind, forward):
        if any(isinstance(node, ast.Attribute) and node.attr == "int8" for node in ast.walk(function)):
            continue
        for node, _ in _attributes_of_self(function):
            name, part = _part(node)
            up = getattr(part, "up", None)
            if isinstance(part, ast.Attribute) and isinstance(up, ast.Attribute) and up.attr == "dtype":
                found.setdefault(name, f"{owner.__name__}.{function.name}")
    return found


def _part(node: ast.Attribute) -> tuple[str, ast.AST]:
    """Return the dotted name of the child that ``self.child`` begins, and what follows it: an Attribute if that is the
    child's weight or bias."""
    name, parent = node.attr, node.up  # type: ignore[attr-defined]
    while isinstance(parent, ast.Attribute) and parent.attr not in _PARTS:
        name, parent = f"{name}.{parent.attr}", parent.up  # type: ignore[attr-defined]
    return name, parent


def _methods_of_forward(
    kind: type[nn.Module], forward: Callable[..., Any] | None
) -> Iterator[tuple[type, ast.FunctionDef]]:
    """Yield the syntax tree of a forward, and of every method that is called from there on self, by ``super()`` or as
    ``Class.method(self, ...)``, each with the class that defines it. The forward is `forward`, or that of `kind` where
    this is None. Methods of nn.Module itself are left out. Each node gets the attribute `up`, which is the node around
    it."""
    mro = kind.__mro__
    todo = [("forward", 0)]  # the name of a method, and the place in the mro from which on it is looked for
    seen = set(todo)
    while todo:
        name, first = todo.pop()
        place = next((i for i in range(first, len(mro)) if name in mro[i].__dict__), len(mro) - 1)
        owner = mro[place]
        method = owner.__dict__.get(name)
        if (name, first) == ("forward", 0) and forward is not None:
            place, owner, method = -1, kind, forward
        if owner in _NOT_READ or (function := _source(method)) is None:
            continue
        for node in ast.walk(function):
            for child in ast.iter_child_nodes(node):
                child.up = node  # type: ignore[attr-defined]
            called = _method_called(node, mro, place)
            if called is not None and called not in seen:
                seen.add(called)
                todo.append(called)
        yield owner, function


_NOT_READ: tuple[type, ...] = (nn.TransformerEncoderLayer, nn.Module, object)
"""Classes whose methods are not looked at. `close_fast_paths` makes the first one call what it would read."""


def _method_called(node: ast.AST, mro: tuple[type, ...], place: int) -> tuple[str, int] | None:
    """Return the name of the method that a node calls on self, and the place in the mro from which on it is looked for;
    None for other nodes. The node stands in a method of ``mro[place]``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    of, name = node.func.value, node.func.attr
    if _is_self(of):
        return name, 0
    if isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super":
        return name, place + 1
    if isinstance(of, ast.Name) and node.args and _is_self(node.args[0]):
        return next(((name, i) for i, each in enumerate(mro) if each.__name__ == of.id), None)
    return None


def _source(method: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError):  # built in, made by exec, or no function at all
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return None
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == function.args.args[0].arg:
            node.id = "self"  # a patch may call it otherwise
    return function


def _attributes_of_self(function: ast.FunctionDef) -> Iterator[tuple[ast.Attribute, ast.AST]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and _is_self(node.value):
            yield node, node.up  # type: ignore[attr-defined]


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_value(node: ast.Attribute) -> bool:
    """Return whether the values of ``self.child.weight`` are used: not its dtype, not whether it is there, and not as
    the target of an assignment."""
    up = node.up  # type: ignore[attr-defined]
    if isinstance(up, ast.Attribute) and up.attr == "data":  # the values themselves, under another name
        up = up.up  # type: ignore[attr-defined]
    if (isinstance(up, ast.Attribute) and up.attr in _HARMLESS) or isinstance(node.ctx, ast.Store):
        return False
    return not _is_asked_about(up) and not isinstance(up, ast.Compare)


def _is_asked_about(up: ast.AST) -> bool:
    return isinstance(up, ast.Call) and isinstance(up.func, ast.Name) and up.func.id in ("isinstance", "hasattr")
