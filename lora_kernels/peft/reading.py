"""The operands of a fused PEFT layer, which are read from PEFT's modules in every forward.

They are not kept between calls, because a user may change any of them: adapters, scaling, dropout, hooks, dtypes, the
base weight and whether it is merged. Reading all of them again takes about as much time as a cache key that would
notice every such change. For the most frequent case there is a shorter reading, `Fused.plain_operands`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.nn.fit import has_hooks
from lora_kernels.ops import check
from lora_kernels.peft import hooked
from lora_kernels.quant.weight import CODES, DTYPES, QuantizedWeight

DROPOUTS = (nn.Identity, nn.Dropout)
"""PEFT's modules for a dropout of 0, and for others."""


class PeftAdapter(NamedTuple):
    """One adapter of a PEFT layer."""

    a: Tensor
    """The weight of ``lora_A``, [R, K]."""
    b: Tensor
    """The weight of ``lora_B``, [N, R]."""
    b_bias: Tensor | None
    """The bias of ``lora_B``, [N], which the adapter has with ``lora_bias=True``."""
    scale: float | Tensor
    """PEFT's ``scaling`` of the adapter."""
    p: float
    """The dropout probability in this call: 0 while the dropout module is not in training mode."""
    magnitude: Tensor | None = None
    """DoRA's magnitude vector, [N]; None for plain LoRA."""
    activated: bool = False
    """Whether it is an activated LoRA, which has the tokens from its invocation tokens on."""


class Operands(NamedTuple):
    """The operands of one forward."""

    w: Tensor | QuantizedWeight
    """W [N, K] of the base."""
    bias: Tensor | None
    """The base's own bias, [N]."""
    adapters: dict[str, PeftAdapter]
    """The active adapters by name, or with ``adapter_names`` those that it names. There is at least one."""
    inner: torch.dtype
    """The dtype in which base and adapters are computed."""
    outer: torch.dtype
    """The dtype of y."""
    activated: bool = False
    """Whether one of the adapters is an activated LoRA."""

    def with_bias(self, bias: Tensor | None) -> Operands:
        """Return the same with another bias. torch 2.6 can trace this, but not ``_replace``."""
        return Operands(self.w, bias, self.adapters, self.inner, self.outer, self.activated)

    def with_adapters(self, adapters: dict[str, PeftAdapter]) -> Operands:
        """Return the same with other adapters."""
        return Operands(self.w, self.bias, adapters, self.inner, self.outer, self.activated)


OneAdapter = tuple[Tensor | QuantizedWeight, Tensor, Tensor, float | Tensor, Tensor | None, float]
"""(w, a, b, scale, bias, p), as `lora_linear` takes them."""


def as_one_adapter(operands: Operands) -> OneAdapter:
    """Return the operands of `lora_linear` for all adapters. Several of them become one, whose rank is the sum of
    theirs; the caller makes sure that they have no dropout. The adapters' own biases are added to the base's."""
    w, bias, adapters, inner, _, _ = operands
    for adapter in adapters.values():
        if adapter.b_bias is not None:
            term = adapter.b_bias.to(inner) * adapter.scale
            bias = term if bias is None else bias + term
    a, b, _, scale, p, _, _ = adapter  # the only adapter, or the last of several: these replace a, b and scale
    if len(adapters) > 1:
        # In 16 bits s·B would be rounded, and the gradient of s·B may overflow where that of B, s times it, does not.
        wide = torch.promote_types(a.dtype, torch.float32)
        a = torch.cat([each.a.to(wide) for each in adapters.values()])
        b = torch.cat([each.b.to(wide) * each.scale for each in adapters.values()], 1)
        scale = 1.0
    # Adapters in 16 bits may stand beside a bitsandbytes base that computes in fp32.
    if inner == torch.float32 and not a.dtype == b.dtype == inner:
        a, b = a.to(inner), b.to(inner)
    return w, a, b, scale, bias, p


def why_not_biased(dtype: torch.dtype) -> str:
    """Return why adapters with a bias in lora_B cannot be fused in a computation in `dtype`, or "" where they can.

    The kernels take one bias, in the dtype of the computation. In 16 bits the sum of the base's bias and s times that
    of lora_B may overflow, or have digits below those that 16 bits hold, where y has neither because x Wᵀ cancels most
    of it. PEFT adds the second bias in fp32.
    """
    return f"lora_bias beside {dtype}: the sum of the two biases would be rounded to it" * (dtype in check.HALVES)


def probability(dropout: Any, name: str) -> float | str:
    """Return the probability with which `dropout`, the module of adapter `name`, drops an element in this call, or why
    the adapter cannot be fused."""
    kind = type(dropout)
    if kind not in DROPOUTS:
        return f"adapter {name!r} has a dropout of its own, {kind.__name__}: an nn.Dropout is served"
    if has_hooks(dropout) and isinstance(hooks := hooked.of(dropout), str):
        return hooked.refused(f"the dropout of adapter {name!r}", hooks)
    p = float(dropout.p) if kind is nn.Dropout and dropout.training else 0.0
    return f"adapter {name!r} drops everything: p = {dropout.p}" if p >= 1 else p


def base_weights(module: Any, hooks: hooked.Hooks) -> tuple[Any, Tensor | None]:
    """Return the weight and the bias of a base whose hooks may convert them in every call, converted. A matrix in e4m3
    stays as it is where a kernel reads it so: it holds the codes of fp8 with a scale of one."""
    weight, bias = weight_and_bias(module)
    dtype = hooks.dtype
    if dtype is None:
        return weight, bias
    if bias is not None:
        bias = bias.to(dtype)
    if weight.dtype == CODES["fp8"] and dtype in DTYPES and weight.dim() == 2 and weight.is_contiguous():
        N, K = weight.shape
        if not only_eager(weight.device, (dtype, dtype), (N, K, 8), False, "fp8"):
            scale = torch.ones(1, 1, device=weight.device)
            return QuantizedWeight("fp8", (N, K), dtype, weight, scale, checked=True), bias
    return weight.to(dtype), bias


def weight_and_bias(module: Any) -> tuple[Any, Any]:
    """Return ``(module.weight, module.bias)``, from the dictionary of parameters where they are in it: nn.Module's
    attribute look-up takes a microsecond for each.

    In a replica of DataParallel, and where a parameter is parametrised, they are not in the dictionary.
    """
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        return module.weight, module.bias


ROWS = 2048
"""The number of rows of x for which it is told whether a kernel serves a layer: one of training."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def only_eager(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int, int],
    dropout: bool,
    w_format: str,
) -> bool:
    """Return whether the automatic choice is `eager`, which has no kernel, for the forward or the backward of such
    calls. `dtypes` are those of x and the adapter, and `shape` is (N, K, R). The number of rows is that of training:
    a layer is not left to PEFT if `eager` is the choice for few rows only."""
    facts = device, *dtypes, ROWS, *shape, dropout, w_format, 1
    # Every forward with dropout makes these tuples. ``Call(...)`` would enter one more Python function for each.
    forward, backward = tuple.__new__(Call, ("forward", *facts)), tuple.__new__(Call, ("backward", *facts))
    return dispatch.automatic(forward) == "eager" or dispatch.automatic(backward) == "eager"
