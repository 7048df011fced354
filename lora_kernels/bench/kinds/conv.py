"""Convolutions: a layer of torch frozen, trained as a whole, with PEFT's adapter, and with ours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, SAVED, Cell, Target, Way

WHOLE = "full fine-tuning"
"""The layer without an adapter, whose weight and bias are trained."""

_RANK, _ALPHA = 8, 16
_EXACT, _AS_PEFT = 2e-5, 1e-4
"""The largest error of ours and of PEFT, as a fraction of the largest value in fp64."""


class _Size(NamedTuple):
    name: str
    x: tuple[int, ...]
    """The sizes of x [B, C, ...]."""
    N: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int = 0
    most: float = 1.05
    """The target: the time over PEFT's."""
    first: bool = False
    """Whether it is the first layer of a model, whose x needs no gradient."""


_SIZES = (
    _Size("64 → 64, kernel 3, 56²", (8, 64, 56, 56), 64, (3, 3), padding=1),
    _Size("128 → 128, kernel 3, 28²", (8, 128, 28, 28), 128, (3, 3), padding=1),
    _Size("256 → 256, kernel 3, 14²", (8, 256, 14, 14), 256, (3, 3), padding=1),
    _Size("256 → 64, kernel 1, 56²", (8, 256, 56, 56), 64, (1, 1), most=0.8),
    _Size("256 → 512, kernel 1, stride 2, 56²", (8, 256, 56, 56), 512, (1, 1), 2, most=0.8),
    _Size("ViT, 3 → 768, patches 16²", (8, 3, 224, 224), 768, (16, 16), 16, most=0.8, first=True),
    _Size("Qwen-VL, 3 → 1280, patches 2×14²", (256, 3, 2, 14, 14), 1280, (2, 14, 14), (2, 14, 14), 0, 0.8, True),
    _Size("Whisper, 80 → 384, kernel 3", (4, 80, 3000), 384, (3,), padding=1, first=True),
)
_CHANNELS_LAST = ("256 → 64, kernel 1, 56²", "64 → 64, kernel 3, 56²")


def cells() -> list[Cell]:
    """Return the cells of convolutions: without dropout and with it, and a few in channels_last."""
    made = [_cell(size, p, False) for p in (0.0, 0.1) for size in _SIZES]
    return made + [_cell(size, 0.0, True) for size in _SIZES if size.name in _CHANNELS_LAST]


def _cell(size: _Size, p: float, channels_last: bool) -> Cell:
    targets: tuple[Target, ...] = (Target(PEFT, size.most),)
    if p:
        targets += (Target(WHOLE, 1.1, SAVED),)
    name = size.name + (f", dropout {p}" if p else "") + (", channels_last" if channels_last else "")
    return Cell("convolution", name, functools.partial(_ways, size, p, channels_last), targets)


def _ways(size: _Size, p: float, channels_last: bool) -> Mapping[str, Way]:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size.kernel) - 1]
    generator = torch.Generator().manual_seed(0)
    base = kind(size.x[1], size.N, size.kernel, size.stride, size.padding).requires_grad_(False)
    x = torch.randn(size.x, generator=generator)
    for t in base.parameters():
        t.copy_(torch.randn(t.shape, generator=generator) / base.weight[0].numel() ** 0.5)
    if channels_last:
        x, base = x.to(memory_format=torch.channels_last), base.to(memory_format=torch.channels_last)
    ours: Any = getattr(lora_kernels, f"FusedLoRA{kind.__name__}").from_conv(
        copy.deepcopy(base), r=_RANK, lora_alpha=_ALPHA, lora_dropout=p
    )
    with torch.no_grad():
        ours.lora_B.copy_(torch.randn(ours.lora_B.shape, generator=generator) / _RANK**0.5)
    peft = _with_peft(base, p)
    with torch.no_grad():
        for own, value in zip(_peft_parameters(peft), (ours.lora_A, ours.lora_B), strict=True):
            own.copy_(value)
    want = functools.cache(functools.partial(_equation, size, x, ours))
    return {
        FROZEN: _way(base, x.clone().requires_grad_(), []),
        WHOLE: _whole(base, _input(size, x)),
        PEFT: _way(peft, _input(size, x), _peft_parameters(peft), want, _AS_PEFT),
        OURS: _way(ours, _input(size, x), [ours.lora_A, ours.lora_B], want, _EXACT),
    }


def _input(size: _Size, x: Tensor) -> Tensor:
    return x.clone().requires_grad_(not size.first)


def _whole(base: Any, x: Tensor) -> Way:
    layer = copy.deepcopy(base).requires_grad_(True)
    return Way(lambda: layer(x), (x, *layer.parameters()))


def _way(
    module: Any,
    x: Tensor,
    adapter: Sequence[Tensor],
    want: Callable[[], dict[str, Tensor]] | None = None,
    most: float = 0.0,
) -> Way:
    trained = (*(t for t in (x,) if t.requires_grad), *adapter)

    def run() -> Tensor:
        return module(x)  # type: ignore[no-any-return]

    def faults() -> list[str]:
        assert want is not None
        training = module.training
        module.eval()  # without dropout, whose masks differ
        y = run()
        module.train(training)
        grads = torch.autograd.grad(y, trained, torch.ones_like(y))
        names = [name for name in ("dx", "dA", "dB") if name != "dx" or x.requires_grad]
        got = {"y": y.detach()} | dict(zip(names, grads, strict=True))
        errors = {name: _error(got[name], value) for name, value in want().items()}
        return [f"{name} is off by {e:.1e} of its largest value" for name, e in errors.items() if not e <= most]

    frozen = tuple(p for p in module.parameters() if not p.requires_grad)
    return Way(run, trained, frozen, faults if adapter else None)


def _error(got: Tensor, value: Tensor) -> float:
    return float((got.double() - value).abs().max() / value.abs().max())


def _equation(size: _Size, x: Tensor, layer: Any) -> dict[str, Tensor]:
    """Return y and the gradients of a sum of y, in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B)]
    a, b = leaves
    x = _input(size, x.double().contiguous())
    w = layer.weight.double() + layer.scaling * (b.flatten(1) @ a.flatten(1)).view(layer.weight.shape)
    convolution: Any = getattr(nn.functional, f"conv{len(size.kernel)}d")
    y = convolution(x, w, layer.bias.double(), layer.stride, layer.padding)
    wanted = {"dx": x, "dA": a, "dB": b} if x.requires_grad else {"dA": a, "dB": b}
    grads = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y))
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def _with_peft(base: nn.Module, p: float) -> Any:
    """Return a model of PEFT that holds the layer alone."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=_RANK, lora_alpha=_ALPHA, lora_dropout=p, target_modules=["0"])
    return get_peft_model(nn.Sequential(copy.deepcopy(base)), settings)


def _peft_parameters(model: Any) -> list[Tensor]:
    layer = model.base_model.model[0]
    return [layer.lora_A.default.weight, layer.lora_B.default.weight]
