"""What a fused layer reads from PEFT's modules in one pass per forward, and the operands that it makes of them.

A reading belongs to one call and is not kept. PEFT's users may change everything in it between two calls: adapters,
scaling, dropout, hooks, dtypes, the base weight and whether it is merged. Reading all of it again costs about as much
as a cache key that would notice every such change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.core.operands import Call
from lora_kernels.ops.autograd import device_type
from lora_kernels.quant.weight import QuantizedWeight


class PeftAdapter(NamedTuple):
    """One adapter of a PEFT layer."""

    a: Tensor
    """The weight of ``lora_A``, [R, K]."""
    b: Tensor
    """The weight of ``lora_B``, [N, R]."""
    b_bias: Tensor | None
    """The bias of ``lora_B``, [N], which the adapter has with ``lora_bias=True``."""
    scale: float | Tensor
    p: float
    """The dropout probability in this call: 0 while the dropout module is not in training mode."""
    magnitude: Tensor | None = None
    """DoRA's magnitude vector, [N]; None for plain LoRA."""


class Operands(NamedTuple):
    """What one forward computes with."""

    w: Tensor | QuantizedWeight
    """W [N, K] of the base."""
    bias: Tensor | None
    """The base's own bias, [N]."""
    adapters: dict[str, PeftAdapter]
    """The active adapters, by name; with ``adapter_names`` those that are named. There is at least one."""
    inner: torch.dtype
    """The dtype in which base and adapters are computed."""
    outer: torch.dtype
    """The dtype of y."""


def as_one_adapter(
    operands: Operands, bias_dtype: torch.dtype
) -> tuple[Tensor | QuantizedWeight, Tensor, Tensor, float | Tensor, Tensor | None, float]:
    """Return (w, a, b, scale, bias, p) that `lora_linear` takes. Several adapters become one of the sum of their ranks,
    which is possible without dropout only. Their own biases are added to the base's, in `bias_dtype`."""
    w, bias, adapters, inner, _ = operands
    for adapter in adapters.values():
        if adapter.b_bias is not None:
            term = adapter.b_bias * adapter.scale
            bias = term if bias is None else bias + term
    if bias is not None and bias.dtype != bias_dtype:
        bias = bias.to(bias_dtype)
    a, b, _, scale, p, _ = adapter
    if len(adapters) > 1:
        a = torch.cat([each.a for each in adapters.values()])
        b = torch.cat([each.b * each.scale for each in adapters.values()], 1)
        scale = 1.0
    if inner == torch.float32 and not a.dtype == b.dtype == inner:  # 16 bits, beside a bitsandbytes base in fp32
        a, b = a.to(inner), b.to(inner)
    return w, a, b, scale, bias, p


def weight_and_bias(module: Any) -> tuple[Any, Any]:
    """Return ``(module.weight, module.bias)``, past nn.Module's attribute look-up, which takes a microsecond for each.

    They are attributes of another kind where the module is a replica of DataParallel or parametrised.
    """
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        return module.weight, module.bias


def autocast_of(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast converts x; None where it is off, and for fp64, which it leaves as it is."""
    device = device_type(x)
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def only_eager(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int, int],
    dropout: bool,
    w_format: str,
) -> bool:
    """Return whether the automatic choice has no kernel for the forward or the backward of such calls, whatever their
    number of rows: it is then `eager`. `dtypes` are those of x and the adapter, `shape` is (N, K, R)."""
    call = Call("forward", device, *dtypes, 1, *shape, dropout, w_format)
    return dispatch.automatic(call) == "eager" or dispatch.automatic(Call("backward", *call[1:])) == "eager"
