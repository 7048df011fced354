"""The forward of an experts module of transformers, with an adapter on one of its stacks or on both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_kernels.nn import experts_form, experts_rows
from lora_kernels.ops.autograd import as_dtype, device_type, no_autocast
from lora_kernels.ops.experts import lora_linear_experts


class StackAdapter(NamedTuple):
    """The adapters of the experts of one stack."""

    a: Tensor
    """A [E, R, K], of any strides."""
    b: Tensor
    """B [E, N, R], of any strides."""
    scale: float | Tensor
    p: float = 0.0
    """The dropout rate in this call."""


def check(x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Raise ValueError where x, the experts of each token and their weights do not fit together."""
    if reason := why_not(x, ids, weights):
        raise ValueError(reason)


def why_not(x: Tensor, ids: Tensor, weights: Tensor) -> str:
    """Return why x [T, H], ids [T, k] and weights [T, k] do not fit together, or "" where they do."""
    if x.dim() == 2 and ids.dim() == 2 and ids.shape == weights.shape and ids.shape[0] == x.shape[0]:
        return ""
    return (
        f"x must be [T, H], the experts and weights of each token [T, k]; got {tuple(x.shape)}, {tuple(ids.shape)}, "
        f"{tuple(weights.shape)}"
    )


def forward(
    kind: type[Any],
    module: Any,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    adapters: Mapping[str, StackAdapter],
    backend: str | None,
) -> Tensor:
    """Return y_t = Σ_j weights[t, j] · down_e(gate(gate_up_e(x_t))) for x [T, H], e = ids[t, j], where each stack is
    computed with its adapter in `adapters`, if it has one there.

    `module` has the parameters and attributes of an experts module of class `kind`. Under autocast the stacks are
    computed in the dtype in which the implementation that `module` chooses would compute them: "eager" in autocast's,
    the others in that of the weights.
    """
    routing = experts_rows.route(ids, module.num_experts)
    first, last = experts_form.names(module)
    z = experts_rows.gather(x, routing)
    z = _stack(module, first, z, routing, adapters.get(first), backend)
    z = experts_form.apply_gate(kind, module, z)
    z = _stack(module, last, z, routing, adapters.get(last), backend)
    if getattr(module, "has_post_expert_norm", False):
        z = module.post_expert_norm(z)
    return experts_rows.combine(z, weights, routing, x.dtype)


def _stack(
    module: Any,
    name: str,
    x: Tensor,
    routing: experts_rows.Routing,
    adapter: StackAdapter | None,
    backend: str | None,
) -> Tensor:
    """Return the rows of one stack, [T·k, N]."""
    weight, bias = experts_form.projection(module, name)
    if adapter is None:  # the operator takes no rank below 1
        E, N, K = weight.shape
        adapter = StackAdapter(weight.new_zeros(E, 1, K), weight.new_zeros(E, N, 1), 1.0)
    a, b, scale, p = adapter
    if experts_form.lowered_by_autocast(module):
        return lora_linear_experts(x, weight, a, b, routing.rows, scale=scale, bias=bias, dropout_p=p, backend=backend)
    with no_autocast(device_type(x)):
        x = as_dtype(x, weight.dtype)
        return lora_linear_experts(x, weight, a, b, routing.rows, scale=scale, bias=bias, dropout_p=p, backend=backend)
