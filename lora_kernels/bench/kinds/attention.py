"""The cells of attention: self-attention of the sizes of a ViT-B/16 and of CLIP's text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, Cell, Target, Way
from lora_kernels.core import accuracy
from lora_kernels.nn.attention import FusedLoRAMultiheadAttention

_FUSED = "PEFT, fused"
_SIZES = ((768, 12, 197, 8, False), (512, 8, 77, 8, True))
"""E, the heads, the tokens, the batch, and whether a causal mask is given."""
_R, _ALPHA = 16, 16.0
_PEFT_MARGIN = 4.0
"""How many times the RMS error of plain torch PEFT's may be."""


def cells() -> list[Cell]:
    """Return the cells of attention."""
    return [
        Cell(
            "attention",
            f"E {E}, {L} tokens, batch {B}, r {_R}" + ", causal" * causal,
            partial(_ways, E, H, L, B, causal),
            (Target(PEFT, 0.8),),
        )
        for E, H, L, B, causal in _SIZES
    ]


def _ways(E: int, H: int, L: int, B: int, causal: bool) -> Mapping[str, Way]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    base = nn.MultiheadAttention(E, H, batch_first=True).requires_grad_(False)
    x = draw(B, L, E).requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(L) if causal else None
    factors = draw(_R, E, std=E**-0.5), draw(3 * E, _R), draw(_R, E, std=E**-0.5), draw(E, _R)

    def called(layer: Any) -> Callable[[], Tensor]:
        return lambda: layer(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)[0]

    def way(layer: Any, trained: Sequence[Tensor], counted: float, margin: float) -> Way:
        """Return a way that counts the update of out_proj `counted` times."""
        with torch.no_grad():
            for parameter, value in zip(trained, factors, strict=True):
                parameter.copy_(value)
            trained[3].div_(counted)
        equation = partial(_equation, base, factors, mask, H)
        check = partial(_faults, called(layer), (x, *trained), equation, counted, margin)
        return Way(called(layer), (x, *trained), tuple(base.parameters()), check)

    ours: Any = FusedLoRAMultiheadAttention.from_attention(base, r=_R, lora_alpha=_ALPHA)
    peft, fused = (_peft_layer(E, H, base, fuse) for fuse in (False, True))
    return {
        FROZEN: Way(called(base), (x,), tuple(base.parameters())),
        PEFT: way(peft, _adapter_of(peft), _counted(), _PEFT_MARGIN),
        _FUSED: way(fused, _adapter_of(fused), _counted(), accuracy.RATIO),
        OURS: way(ours, (ours.lora_A, ours.lora_B, ours.lora_A_out, ours.lora_B_out), 1.0, accuracy.RATIO),
    }


def _peft_layer(E: int, H: int, base: nn.MultiheadAttention, fused: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    from lora_kernels.peft.fusing import fuse

    own = nn.MultiheadAttention(E, H, batch_first=True)
    own.load_state_dict(base.state_dict())
    config = LoraConfig(r=_R, lora_alpha=int(_ALPHA), target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(own), config)  # type: ignore[arg-type]
    if fused:
        fuse(model, strict=True)
    return model.base_model.model[0]


def _adapter_of(layer: Any) -> list[Tensor]:
    parts = (layer, layer.base_layer.out_proj)
    return [weight for part in parts for weight in (part.lora_A["default"].weight, part.lora_B["default"].weight)]


def _counted() -> float:
    """Return how often the installed PEFT counts the update of out_proj."""
    from lora_kernels.peft.attention import counted

    return counted().value


def _faults(
    forward: Callable[[], Tensor],
    wanted: Sequence[Tensor],
    equation: Callable[[Tensor, Tensor, torch.dtype], list[Tensor]],
    counted: float,
    margin: float,
) -> list[str]:
    """Return what is wrong with y and the gradients: an RMS error above `margin` times that of plain torch. Where B of
    out_proj is 1 / `counted` of the equation's, so is the gradient of its A."""
    y = forward()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    got = [y.detach(), *torch.autograd.grad(y, wanted, dy)]
    got[4] = got[4] * counted
    exact, plain = (equation(wanted[0], dy, dtype) for dtype in (torch.float64, torch.float32))
    faults = []
    for name, *three in zip(
        ("y", "dx", "da", "db", "da of out_proj", "db of out_proj"), got, exact, plain, strict=True
    ):
        errors = accuracy.errors_beside(*three)
        allowed = errors.rms_allowed * margin / accuracy.RATIO
        if not errors.rms <= allowed:
            faults.append(f"{name}: RMS error {errors.rms:.3g}, allowed {allowed:.3g}")
    return faults


def _equation(
    base: nn.MultiheadAttention,
    factors: Sequence[Tensor],
    mask: Tensor | None,
    H: int,
    x: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return y and the gradients of x and of A and B of both projections, by plain torch operations in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *factors)]
    rows, a, b, a_out, b_out = leaves
    scale = _ALPHA / _R

    def linear(x: Tensor, w: Any, bias: Any, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w.to(dtype), bias.to(dtype)) + scale * F.linear(F.linear(x, a), b)

    qkv = linear(rows, base.in_proj_weight, base.in_proj_bias, a, b).chunk(3, -1)
    q, k, v = (each.unflatten(-1, (H, -1)).transpose(1, 2) for each in qkv)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = torch.softmax(scores if mask is None else scores + mask.to(dtype), -1)
    y = linear((weights @ v).transpose(1, 2).flatten(2), base.out_proj.weight, base.out_proj.bias, a_out, b_out)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
