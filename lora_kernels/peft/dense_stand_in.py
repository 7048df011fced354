"""`MergedLinear`: the dense layer that stands in the place of a quantised base while it is merged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import offload
from lora_kernels.ops.autograd import device_type, no_autocast
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.quant.reader import Unreadable
from lora_kernels.quant.torchao import TORCHAO

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Dequantised(NamedTuple):
    """The quantised W [N, K] of a base layer."""

    shape: tuple[int, int]
    dtype: torch.dtype
    """The dtype in which the base computes."""
    device: torch.device
    rows: Callable[[int, slice], Tensor]
    """Returns rows of W; the first argument is 0."""


class MergedLinear(nn.Linear):
    """y = x Wᵀ + bias with a merged W in the place of a quantised base, of which it keeps nothing.

    Over bitsandbytes' 4 bits x is converted to the dtype of W, as a Linear4bit converts it to its compute_dtype, and y
    to that of x. Otherwise W is converted to the dtype of x.
    """

    def __init__(self, base: Any, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):  # as HQQ has it
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.rounds_x = hasattr(base, "compute_dtype")
        self.has_own_bias = False
        """Whether the bias is merged too, and not the Parameter of the base."""
        self.train(base.training)
        if "forward" in base.__dict__ and "_hf_hook" not in base.__dict__:
            raise ValueError(
                f"the forward of the base, a {type(base).__name__}, is replaced on the instance, and would not be "
                "called while merged: nothing was changed. Take that forward away first, or do not merge"
            )
        for name in _HOOKS:
            if name in base.__dict__:
                self.__dict__[name] = base.__dict__[name]
        offload.offload_like(base, self)

    def own_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that are not the base's."""
        return (self.weight, self.bias) if self.has_own_bias else (self.weight,)

    def take_bias(self, bias: nn.Parameter) -> None:
        """Take a bias of its own."""
        self.bias, self.has_own_bias = bias, True

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the dtype of x, or without `rounds_x` in that of torch's linear."""
        if not self.rounds_x:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        dtype = self.weight.dtype
        with no_autocast(device_type(x)):
            y = F.linear(x.to(dtype), self.weight, None if self.bias is None else self.bias.to(dtype))
        return y.to(x.dtype)


def is_quantised(base: Any) -> bool:
    """Return whether the weight of a base layer has few bits, and can be read densely."""
    weight = base._parameters.get("weight")
    package = type(weight).__module__.partition(".")[0]
    if package == "bitsandbytes":
        return not getattr(getattr(base, "state", None), "has_fp16_weights", False)
    return hasattr(weight if package == "torchao" else base, "dequantize")


def read(base: Any) -> Dequantised:
    """Return the weight of a base for which `is_quantised` is True."""
    weight = base._parameters.get("weight")
    package = type(weight).__module__.partition(".")[0]
    if package == "bitsandbytes":
        q = from_bnb(base)
        bias = getattr(base, "bias", None)
        # A Linear8bitLt computes in the dtype of x, and its model's is known from a bias alone.
        dtype = getattr(base, "compute_dtype", None) or (q.dtype if bias is None else bias.dtype)
        return Dequantised(q.shape, dtype, q.device, lambda g, block: q.rows(block.start, block.stop, torch.float32))
    if package == "torchao":
        try:
            q = TORCHAO.read(base)
            return Dequantised(
                q.shape, weight.dtype, q.device, lambda g, block: q.rows(block.start, block.stop, torch.float32)
            )
        except Unreadable:
            pass
    w = (weight if package == "torchao" else base).dequantize()
    return Dequantised((w.shape[0], w.shape[1]), w.dtype, w.device, lambda g, block: w[block])


def requantise(base: Any, merged: MergedLinear) -> bool:
    """Quantise the weight of `merged` into `base`, a layer of bitsandbytes, in the format that it has. Return False for
    another base, which is not changed."""
    weight: Any = base._parameters.get("weight")
    if weight is None or not type(weight).__module__.startswith("bitsandbytes."):
        return False
    warnings.warn(
        f"the merged weight of a {type(base).__name__} is quantised again, so that generations may differ by rounding "
        "errors: lora_kernels.merge_losses(model) tells before it how much of each update is lost",
        stacklevel=5,
    )
    kind, device, dense = type(weight), weight.device, merged.weight.detach().to("cpu")
    if hasattr(weight, "quant_state"):
        dtype = getattr(weight.quant_state, "original_dtype", None) or weight.quant_state.dtype
        given = {name: value for name, value in weight.__dict__.items() if not name.startswith("_") and name != "data"}
        given |= {"requires_grad": False, "bnb_quantized": False, "quant_state": None}
        new = kind(dense, **given).to(device)
        new.quant_state.dtype = dtype
    else:
        new = kind(dense, requires_grad=False, has_fp16_weights=weight.has_fp16_weights).to(device)
        base.state.reset_grads()
        base.state.CB = base.state.SCB = None
    base._parameters["weight"] = new
    if merged.has_own_bias:
        base._parameters["bias"] = merged._parameters["bias"]
    return True
