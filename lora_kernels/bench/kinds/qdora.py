"""DoRA over bitsandbytes' weights of 4 and 8 bits: the layer of bitsandbytes alone, PEFT's, and the same one fused."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import reference
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, SAVED, Cell, Target, Way
from lora_kernels.quant.bnb import from_bnb

_M, _RANK, _ALPHA = 512, 16, 16
_ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""The largest error of a result, as a fraction of its largest value in fp64, by the dtype of x."""


class _Size(NamedTuple):
    format: str
    width: int
    dtype: torch.dtype = torch.float32
    p: float = 0.0


_SIZES = (
    _Size("nf4", 2048),
    _Size("nf4", 2048, torch.bfloat16),
    _Size("nf4", 2048, torch.bfloat16, 0.1),
    _Size("nf4", 4096),
    _Size("nf4", 4096, torch.bfloat16),
    _Size("int8", 2048),
)


def cells() -> list[Cell]:
    """Return the cells of DoRA over quantised weights."""
    return [_cell(size) for size in _SIZES]


def _cell(size: _Size) -> Cell:
    name = f"{size.format}, {size.width} → {size.width}, M {_M}, r {_RANK}" + (f", dropout {size.p}" if size.p else "")
    targets = Target(PEFT, 0.7), Target(PEFT, 1.0, SAVED)
    return Cell("DoRA over 4 and 8 bits", name, functools.partial(_ways, size), targets, dtype=size.dtype)


def _ways(size: _Size) -> Mapping[str, Way]:
    peft = _with_peft(size)
    ours = copy.deepcopy(peft)
    lora_kernels.fuse(ours, strict=True)
    x = torch.randn(_M, size.width, generator=torch.Generator().manual_seed(2)).to(size.dtype)
    want = functools.cache(functools.partial(_equation, peft.base_model.model[0], x))
    return {
        FROZEN: _way(_base(size), x, (), want),
        PEFT: _way(peft, x, _adapter(peft), want),
        OURS: _way(ours, x, _adapter(ours), want),
    }


def _base(size: _Size) -> Any:
    """Return a layer of bitsandbytes, in training mode, in which it neither re-packs its weight nor rounds x."""
    bnb: Any = importlib.import_module("bitsandbytes")
    made: Any = (
        bnb.nn.Linear4bit(size.width, size.width, bias=False, compute_dtype=size.dtype, quant_type=size.format)
        if size.format == "nf4"
        else bnb.nn.Linear8bitLt(size.width, size.width, bias=False, has_fp16_weights=False)
    )
    values = torch.randn(size.width, size.width, generator=torch.Generator().manual_seed(0)) / size.width**0.5
    made.weight.data.copy_(values)
    return made.to("cpu").requires_grad_(False).train()


def _with_peft(size: _Size) -> Any:
    """Return a model of PEFT that holds such a layer alone. Its B is not zero, and its m not the norm."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(1)
    holder = nn.Sequential(_base(size))
    holder.is_loaded_in_4bit, holder.is_loaded_in_8bit = size.format == "nf4", size.format == "int8"  # type: ignore
    settings = LoraConfig(r=_RANK, lora_alpha=_ALPHA, lora_dropout=size.p, target_modules=["0"], use_dora=True)
    model = get_peft_model(holder, settings)
    _, b, m = _adapter(model)
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, generator=generator) / _RANK**0.5)
        m.mul_(0.5 + torch.rand(m.shape, generator=generator))
    return model.train()


def _adapter(model: Any) -> list[Tensor]:
    layer = model.base_model.model[0]
    return [layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight]


def _way(module: Any, x: Tensor, adapter: Sequence[Tensor], want: Callable[[], list[Tensor]]) -> Way:
    leaf = x.clone().requires_grad_()
    trained = leaf, *adapter

    (base,) = (each for each in module.modules() if type(each).__module__.startswith("bitsandbytes."))
    state = getattr(base, "state", None)

    def run() -> Tensor:
        y: Tensor = module(leaf)
        if state is not None:  # PEFT 0.21.2 loses the scales of 8 bits in each forward on a CPU, and the next one fails
            base.weight.SCB = state.SCB
        return y

    def faults() -> list[str]:
        dropouts = [each for each in module.modules() if isinstance(each, nn.Dropout)]
        for each in dropouts:  # the masks differ
            each.eval()
        y = run()
        for each in dropouts:
            each.train()
        got = y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))
        errors = {
            name: float((own.double() - value).abs().max() / value.abs().max())
            for name, own, value in zip(("y", "dx", "dA", "dB", "dm"), got, want(), strict=True)
        }
        most = _ERRORS[x.dtype]
        return [f"{name} is off by {e:.1e} of its largest value" for name, e in errors.items() if not e <= most]

    return Way(run, trained, from_bnb(base).tensors, faults if adapter else None)


def _equation(layer: Any, x: Tensor) -> list[Tensor]:
    """Return y and the gradients of a sum of y for x, A, B and m, in fp64, over the dequantised weight."""
    w = from_bnb(layer.base_layer).dequantize(torch.float32).double()
    adapter = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight
    leaves = [t.detach().double().requires_grad_() for t in (x, *adapter)]
    x, a, b, m = leaves
    y = reference.dora_linear(x, w, a, b, m, scale=layer.scaling["default"])
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
