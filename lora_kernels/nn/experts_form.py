"""What an experts module of transformers is made of, and why one cannot be computed here.

transformers 5 keeps the experts of a layer as stacks: ``gate_up_proj`` [E, 2I, H] (or ``up_proj`` [E, I, H]) and
``down_proj`` [E, H, I]; or, where ``is_transposed``, [E, H, 2I] and [E, I, H]. Its decorator
``use_experts_implementation`` gives a class of this form a forward that `config` chooses. All of them compute

    y_t = Σ_j weights[t, j] · down_e( gate( gate_up_e(x_t) ) )          e = ids[t, j]
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_kernels.nn.fit import has_hooks
from lora_kernels.ops import check

DOWN = "down_proj"

_HOME = "transformers.integrations.moe"
_LOWERS = frozenset((None, "eager"))
"""The implementations of transformers that autocast converts to 16 bits. The others compute in the dtype of the
weights."""


class Projection(NamedTuple):
    """One of the two stacks of an experts module, as the operator takes it."""

    weight: Tensor
    """W [E, N, K], a view where the stack is stored as [E, K, N]."""
    bias: Tensor | None
    """[E, N]."""


def names(module: Any) -> tuple[str, str]:
    """Return the names of the stacks of an experts module, in the order in which they are computed."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), DOWN


def projection(module: Any, name: str) -> Projection:
    """Return the stack `name` of an experts module."""
    weight = getattr(module, name)
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    return Projection(weight, getattr(module, f"{name}_bias") if module.has_bias else None)


def lowered_by_autocast(module: Any) -> bool:
    """Return whether the forward of an experts module follows autocast."""
    return module.config._experts_implementation in _LOWERS


def why_not_class(kind: type[Any]) -> str:
    """Return why modules of the class `kind` are not of the form above, or "" where they are."""
    forward = getattr(kind, "forward", None)
    home = getattr(forward, "__globals__", {}).get("__name__")
    if home != _HOME:
        return f"a {kind.__name__}, whose forward is not one that transformers' use_experts_implementation has made"
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))  # type: ignore[union-attr]
    interface = cells.get("experts_interface")
    if interface is None or interface.cell_contents is not getattr(sys.modules[_HOME], "ALL_EXPERTS_FUNCTIONS", None):
        return f"a {kind.__name__}, whose experts are quantised or computed by functions of its own"
    return ""


def why_not(module: Any, hooks: bool = True) -> str:
    """Return why the experts of `module` cannot be computed here, or "" where they can. Without `hooks` the caller has
    looked at the hooks of the module."""
    if reason := why_not_class(type(module)):
        return reason
    if hooks and has_hooks(module):
        return f"this {type(module).__name__} has hooks or a forward of its own, which would be passed over"
    if reason := _why_not_implementation(module):
        return reason
    for name in names(module):
        weight = _own(module, name)
        if type(weight) not in (nn.Parameter, Tensor):
            return f"its {name} is {_kind_of(module, name)}, not a plain Parameter"
        if weight.dim() != 3 or weight.shape[0] != module.num_experts or weight.dtype not in check.DTYPES:
            return (
                f"its {name} is {weight.dtype} {tuple(weight.shape)}, not a stack of {module.num_experts} matrices in "
                "floating numbers"
            )
        if module.has_bias and type(_own(module, f"{name}_bias")) not in (nn.Parameter, Tensor):
            return f"its {name}_bias is {_kind_of(module, f'{name}_bias')}, not a plain Parameter"
    return ""


def apply_gate(kind: type[Any], module: Any, y: Tensor) -> Tensor:
    """Return what an experts module of class `kind` computes between its two stacks. `module` has its attributes."""
    if getattr(module, "has_gate", True):
        return kind._apply_gate(module, y)  # type: ignore[no-any-return]
    return module.act_fn(y)  # type: ignore[no-any-return]


def _why_not_implementation(module: Any) -> str:
    """Return why the forward that the module's config names cannot be replaced, or "" where it is transformers'."""
    chosen = module.config._experts_implementation
    if chosen in _LOWERS:
        return ""
    function = sys.modules[_HOME].ALL_EXPERTS_FUNCTIONS.get(chosen)
    if getattr(function, "__module__", "").startswith("transformers."):
        return ""
    return f"its config chooses the experts implementation {chosen!r}, which is not one of transformers"


def _own(module: nn.Module, name: str) -> Any:
    """Return the parameter `name`, or None where it is computed from others. A replica of nn.DataParallel has its
    parameters among its attributes."""
    return module._parameters.get(name, module.__dict__.get(name))


def _kind_of(module: nn.Module, name: str) -> str:
    found = _own(module, name)
    if found is not None:
        return f"a {type(found).__name__}"
    return "parametrised" if hasattr(module, name) else "missing"
