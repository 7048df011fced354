"""The random calls of `FusedLoRAMultiheadAttention` of `benchmarks.fuzz`, beside the equation in fp64.

A softmax is not a sum of products, so that no bound on its rounding follows from magnitudes: errors are held against
those of the same equation in the dtypes of the call. In exact mode there is one key, whose weight is 1. Then y is
exact, and with `need_weights` so are the gradients: torch's other backward computes the weight as exp(score - log-sum).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fuzz_calls import Results, Watched, missing, results, surroundings, twice, unequal
from benchmarks.fuzz_draw import DTYPES, MOST, PART, Draw
from lora_kernels import FusedLoRAMultiheadAttention
from lora_kernels.core import dropout

_ADAPTERS = {"a": "lora_A", "b": "lora_B", "a2": "lora_A_out", "b2": "lora_B_out"}


@dataclass
class _Call:
    """What a call has beside the tensors that may want gradients."""

    layer: FusedLoRAMultiheadAttention
    same: str
    """Which of query, key and value are one tensor: "qkv", "kv" or "none"."""
    batched: bool
    flags: dict[str, Any]
    masks: list[Tensor | None]
    """What dropout keeps of each input of a projection, times its factor: one for each call, as rows."""


def attention(draw: Draw) -> list[str]:
    """`FusedLoRAMultiheadAttention`, with all masks and flags."""
    H, D = draw.size("H", 6), draw.size("D", 24)
    E, R, L = H * D, draw.size("R", 16), draw.size("L", 40)
    same = draw.pick("same", ("qkv", "kv", "none"))
    S = 1 if draw.exact else L if same == "qkv" else draw.size("S", 40)
    if draw.exact and same == "qkv":
        L = 1
    batched = draw.chance("batched", 0.8)
    B = draw.size("B", 6) if batched else 1
    dtype, adapter_dtype = draw.pick("dtypes", DTYPES)
    if draw.chance("fp64", 0.3):
        dtype = adapter_dtype = torch.float64
    first, bias = draw.chance("batch_first", 0.5), draw.chance("bias", 0.6)
    longer = not draw.exact and draw.chance("bias_kv", 0.2), not draw.exact and draw.chance("zero_attn", 0.2)
    p = draw.pick("p", (0.0, 0.0, 0.5) if draw.exact else (0.0, 0.0, 0.3))
    made = nn.MultiheadAttention(
        E, H, bias=bias, add_bias_kv=longer[0], add_zero_attn=longer[1], batch_first=first, dtype=dtype
    )
    layer = FusedLoRAMultiheadAttention.from_attention(
        made, r=R, lora_alpha=R * draw.pick("scale", (1.0, 2.0, -1.0)), lora_dropout=p, adapter_dtype=adapter_dtype
    )
    shapes = [(B, L, E), *[(B, S, E)] * {"qkv": 0, "kv": 1, "none": 2}[same]]
    part = PART[dtype]
    while True:
        xs = [draw.numbers(math.prod(each[:2]), E, 1.0, min(1.0, part * 2 / E)).view(each).to(dtype) for each in shapes]
        dy = draw.numbers(B * L, E, 1.0, min(1.0, part * 2 / E)).view(shapes[0]).to(dtype)
        with torch.no_grad():
            for name, t in layer.named_parameters():
                std = 0.5 if "bias" in name else t.shape[-1] ** -0.5
                t.copy_(draw.numbers(t.numel() // t.shape[-1], t.shape[-1], std, min(0.5, part * 2 / E)).view(t.shape))
        call = _Call(layer, same, batched, _flags(draw, (B, H, L, S), dtype, batched, any(longer)), [])
        inputs = {name: _placed(t, first, batched) for name, t in zip("xkv", xs, strict=False)}
        seed = draw.random.getrandbits(31)
        call.masks = _masks(list(inputs.values()), (B * L, E), p, seed, first or not batched)
        trained = {name: getattr(layer, full) for name, full in _ADAPTERS.items()}
        if not draw.exact or part < 1e-4 or _largest(call, inputs | trained, dy) <= MOST[dtype]:
            break
        part /= 3
    dy_now = _placed(dy, first, batched)
    tensors: dict[str, Tensor] = {name: t.requires_grad_(draw.random.random() < 0.8) for name, t in inputs.items()}
    tensors |= {name: t.requires_grad_(draw.random.random() < 0.8) for name, t in trained.items()}
    watched = Watched(*layer.parameters(), *inputs.values(), *(t for t in call.flags.values() if isinstance(t, Tensor)))
    found: list[Tensor | None] = []

    def once() -> Results:
        for t in tensors.values():
            t.grad = None
        torch.manual_seed(seed)
        query, key, value = _qkv(inputs, same)
        y, weights = layer(query, key, value, **call.flags)
        found.append(None if weights is None else weights.detach())
        return results(y, dy_now, tensors)

    with surroundings(draw):
        got, faults = twice(draw, once)
    faults += missing(got["y"], got, tensors) + watched.faults()
    if found[0] is not None:
        got["weights"] = found[0]
    want = _evaluate(call, inputs | trained, dy_now, torch.float64)
    if draw.exact:
        return faults + unequal(got if call.flags["need_weights"] else {"y": got["y"]}, want)
    plain = _evaluate(call, inputs | trained, dy_now, None)
    size = max(float(t.abs().max()) for t in want.values())
    return faults + [
        fault for name, value in got.items() if (fault := _fault(name, value, want[name], plain[name], size, dtype))
    ]


def _fault(name: str, value: Tensor, want: Tensor, plain: Tensor, size: float, dtype: torch.dtype) -> str:
    """Return what is wrong with a result: the few roundings of a small one may be three times as bad as those of
    `plain`. Eight more of its largest element are allowed, or of `size`, the largest of all results, because the
    gradient of a softmax is a difference."""
    if value.shape != want.shape:
        return f"{name} has shape {tuple(value.shape)}, expected {tuple(want.shape)}"
    error, own = (value.double() - want).abs(), (plain.double() - want).abs()
    size = size * (100 if dtype.itemsize > 2 else 1 / 4)
    allowed = 3 * float(own.max()) + 8 * torch.finfo(dtype).eps * max(float(want.abs().max()), size)
    worst = float(error.max())
    return "" if worst <= allowed else f"{name}: error {worst:.3g}, allowed {allowed:.3g}"


def _flags(
    draw: Draw, sizes: tuple[int, int, int, int], dtype: torch.dtype, batched: bool, longer: bool
) -> dict[str, Any]:
    """Return the masks and flags of a call. No row is masked as a whole. There is no is_causal beside keys that the
    module appends (`longer`): torch then hides them, unless it returns weights or has another mask."""
    B, H, L, S = sizes
    flags: dict[str, Any] = {
        "need_weights": draw.chance("weights", 0.4), "average_attn_weights": draw.chance("average", 0.5)
    }  # fmt: skip

    def mask(*shape: int) -> Tensor:
        if draw.random.random() < 0.5:
            return torch.randn(shape, generator=draw.generator).to(dtype)
        chosen = torch.rand(shape, generator=draw.generator) < 0.4
        chosen[..., 0] = False
        return chosen

    kind = draw.pick("mask", ("none", "none", "two", "three", "causal"))
    if kind == "causal":
        flags |= {
            "attn_mask": torch.ones(L, S).triu(1).bool(),
            "is_causal": not longer and draw.chance("is_causal", 0.7),
        }
    elif kind != "none":
        flags["attn_mask"] = mask(L, S) if kind == "two" else mask(B * H, L, S)
    if draw.chance("padding", 0.3):
        own = flags.get("attn_mask")
        padding = mask(B, S)
        if own is not None and own.dtype != padding.dtype:  # torch warns of two kinds
            padding = (torch.rand(B, S, generator=draw.generator) < 0.3).to(own.dtype)
            padding[:, 0] = 0
        flags["key_padding_mask"] = padding if batched else padding[0]
    return flags


def _placed(t: Tensor, first: bool, batched: bool) -> Tensor:
    """Return t [B, L, E] as the module takes it."""
    return t[0].clone() if not batched else t.clone() if first else t.transpose(0, 1).contiguous()


def _qkv(inputs: Mapping[str, Tensor], same: str) -> tuple[Tensor, Tensor, Tensor]:
    query = inputs["x"]
    key = query if same == "qkv" else inputs["k"]
    return query, key, inputs["v"] if same == "none" else key


def _masks(xs: list[Tensor], out: tuple[int, int], p: float, seed: int, first: bool) -> list[Tensor | None]:
    """Return the masks of the inputs and of o. The seeds are those that torch's generator gives next."""
    torch.manual_seed(seed)
    shapes = [(t.numel() // t.shape[-1], t.shape[-1]) for t in xs] + [out]
    if not p:
        return [None] * len(shapes)
    return [
        dropout.keep_mask(dropout.draw_seed(torch.device("cpu")), *shape, p).double() * dropout.rescale(p)
        for shape in shapes
    ]


def _evaluate(call: _Call, given: Mapping[str, Tensor], dy: Tensor, dtype: torch.dtype | None) -> Results:
    """Return y, the weights and all gradients of the equation in `dtype`, or in the dtypes of the operands."""
    own = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()}
    y, weights = _equation(call, own, dtype, False)
    grads = torch.autograd.grad(y, list(own.values()), dy.to(y.dtype).view_as(y))
    found = {"y": y.detach().reshape(dy.shape)} | {f"d{name}": t for name, t in zip(own, grads, strict=True)}
    return found if weights is None else found | {"weights": weights.detach()}


def _equation(
    call: _Call, own: Mapping[str, Tensor], dtype: torch.dtype | None, absolute: bool
) -> tuple[Tensor, Tensor | None]:
    """Return y and the weights, written with one matrix after the other."""
    layer, flags = call.layer, call.flags
    E, H, s = layer.embed_dim, layer.num_heads, abs(layer.scaling) if absolute else layer.scaling

    def frozen(t: Tensor | None) -> Tensor | None:
        t = None if t is None else t.detach() if dtype is None else t.detach().to(dtype)
        return t if t is None or not absolute else t.abs()

    def project(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        x_hat = x if mask is None else x * mask.view(x.shape).to(x.dtype)
        y = F.linear(x, w, bias)
        return (y + s * F.linear(F.linear(x_hat.to(a.dtype), a), b)).to(y.dtype)

    w_in, w_out = frozen(layer.in_proj_weight), frozen(layer.out_proj.weight)
    assert w_in is not None and w_out is not None
    b_in, b_out = frozen(layer.in_proj_bias), frozen(layer.out_proj.bias)
    parts = []
    for i, x in enumerate(_qkv(own, call.same)):
        rows = slice(i * E, (i + 1) * E)
        mask = call.masks[{"qkv": 0, "kv": min(i, 1), "none": i}[call.same]]
        bias = None if b_in is None else b_in[rows]
        y = project(x, w_in[rows], bias, own["a"], own["b"][rows], mask)
        y = y.unsqueeze(0) if not call.batched else y if layer.batch_first else y.transpose(0, 1)
        parts.append(y.unflatten(-1, (H, E // H)).transpose(1, 2))
    q, k, v = parts
    B, S = k.shape[0], k.shape[2]
    extra = [t for pair in (layer.bias_k, layer.bias_v) if (t := frozen(pair)) is not None]
    if extra:
        k, v = (torch.cat((t, each.view(1, H, 1, -1).expand(B, -1, -1, -1)), 2)
                for t, each in zip((k, v), extra, strict=True))  # fmt: skip
    if layer.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    scores = (q @ k.mT) / math.sqrt(E // H)
    for name, shape in (("attn_mask", (-1, H, q.shape[2], S)), ("key_padding_mask", (B, 1, 1, S))):
        mask = flags.get(name)
        if mask is not None:
            mask = mask.view(1, 1, *mask.shape) if name == "attn_mask" and mask.dim() == 2 else mask.view(shape)
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(mask, float("-inf"))
            scores = scores + F.pad(mask.to(scores.dtype), (0, scores.shape[-1] - S))
    weights = scores.softmax(-1)
    o = (weights @ v).transpose(1, 2)
    turned = call.batched and not layer.batch_first
    o = (o.transpose(0, 1) if turned else o).flatten(-2)
    y = project(o, w_out, b_out, own["a2"], own["b2"], call.masks[-1])
    if not flags["need_weights"]:
        return y, None
    weights = weights.mean(1) if flags["average_attn_weights"] else weights
    return y, weights if call.batched else weights[0]


def _largest(call: _Call, given: Mapping[str, Tensor], dy: Tensor) -> float:
    """Return the largest sum of magnitudes in any result, for a single key, whose weight is 1."""
    own = {name: t.detach().double().abs().requires_grad_() for name, t in given.items()}
    y, _ = _equation(call, own, torch.float64, True)
    found = torch.autograd.grad(y, list(own.values()), _shaped(dy.double().abs(), y, call))
    # Products within a projection are not larger than four times what comes out where no factor is below 1/4.
    return 4 * max(float(t.max()) for t in (y.detach(), *found) if t.numel())


def _shaped(dy: Tensor, y: Tensor, call: _Call) -> Tensor:
    return _placed(dy, call.layer.batch_first, call.batched).view_as(y)
