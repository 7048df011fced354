"""The random calls of `benchmarks.fuzz` that go through layers: this package's modules, and PEFT's fused ones."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fuzz_calls import (
    Results,
    compare,
    missing,
    results,
    run_layer,
    surroundings,
    unequal,
    wrong,
)
from benchmarks.fuzz_dora import dora_faults, norm_within
from benchmarks.fuzz_draw import FORMATS, MOST, Draw, Layered, is_exact, problems
from lora_kernels import FusedLoRALinear, QuantizedLoRALinear, fuse
from lora_kernels.core import dropout
from lora_kernels.ops.dora_norm import weight_norm
from lora_kernels.quant.bnb import from_bnb
from lora_kernels.testing.judge import Problem, rounding_bound, truth

HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_BNB = HAS_PEFT and importlib.util.find_spec("bitsandbytes") is not None


def module(draw: Draw) -> list[str]:
    """`FusedLoRALinear` or `QuantizedLoRALinear`, with DoRA or without, as it is or copied or loaded."""
    use_dora = draw.chance("dora", 0.25)
    format = "dense" if use_dora else draw.pick("w", ["dense", "dense", "dense", *FORMATS])
    (one,) = problems(draw, 1, format, use_dora, layer=True)
    layer, q = made(draw, one, use_dora)
    merge = draw.exact and format == "dense" and not use_dora
    way = draw.pick("state", ("new", "new", "copied", "loaded", "merged and unmerged" if merge else "new"))
    if way == "copied":
        layer = copy.deepcopy(layer)
    elif way == "loaded":
        other, _ = made(draw, one, use_dora)
        other.load_state_dict(layer.state_dict())
        layer = other
    elif way.startswith("merged"):
        layer.merge()
        layer.unmerge()
    layer.train(draw.chance("train", 0.8))
    q = replace(q, p=q.p if layer.training else 0.0, seed=q.seed if layer.training else None)
    q = seeded(draw, q)
    if use_dora:  # the digits of the norm depend on the strides of W, which a copy may change
        q = replace(q, w=layer.weight.detach())
        set_magnitude(draw, layer)
    if draw.exact and not is_exact(q, MOST[q.x.dtype] / (4 if use_dora else 1)):
        return []  # the mask of the layer's own seed keeps more than that of the problem
    x = q.x.detach().requires_grad_(draw.random.random() < 0.8)
    own: dict[str, Any] = {"x": x, "a": layer.lora_A, "b": layer.lora_B}
    if use_dora:
        own["m"] = layer.lora_magnitude_vector
    with surroundings(draw):
        y = run_layer(draw, layer, x)
        got = results(y, q.dy, own)
        norm = norm_within(q, own["m"]) if use_dora else None
    faults = missing(y, got, own)
    if norm is None:
        return faults + wrong(draw, got, one, q)
    return faults + dora_faults(draw, q, own["m"].detach(), norm, got)


def made(draw: Draw, one: Layered, use_dora: bool) -> tuple[FusedLoRALinear, Problem]:
    """Return a layer with the operands of a problem, and the problem with the layer's own scale."""
    q = one.q
    settings: dict[str, Any] = {
        "r": q.a.shape[0], "lora_alpha": abs(q.scale) * q.a.shape[0], "lora_dropout": q.p,
        "use_dora": use_dora, "adapter_dtype": q.a.dtype,
    }  # fmt: skip
    bias = None if q.bias is None else nn.Parameter(q.bias.detach(), requires_grad=False)
    if one.codes is not None:
        codes = replace(one.codes, dtype=q.x.dtype)  # else adapters would have to be in fp32
        layer: FusedLoRALinear = QuantizedLoRALinear.over(codes, bias, **settings)
    else:
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = q.w.shape[1], q.w.shape[0]
        linear.weight, linear.bias = nn.Parameter(q.w.detach(), requires_grad=False), bias  # type: ignore[assignment]
        layer = FusedLoRALinear.from_linear(linear, **settings)
    with torch.no_grad():
        layer.lora_A.copy_(q.a)
        layer.lora_B.copy_(q.b)
    if use_dora:
        set_magnitude(draw, layer)
    return layer, replace(q, scale=layer.scaling)


@torch.no_grad()
def set_magnitude(draw: Draw, layer: FusedLoRALinear) -> None:
    """Set the magnitude of a layer to a multiple of its norm, in exact mode to twice the norm."""
    m = layer.lora_magnitude_vector
    m.copy_(weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, m))
    m.mul_(2.0 if draw.exact else 0.7)


def seeded(draw: Draw, q: Problem) -> Problem:
    """Seed torch, and return the problem with the seed that the next call draws."""
    seed = draw.random.getrandbits(31)
    torch.manual_seed(seed)
    drawn = dropout.draw_seed(torch.device("cpu")) if q.p else None
    torch.manual_seed(seed)
    return replace(q, seed=drawn)


def peft(draw: Draw) -> list[str]:
    """A PEFT model of one linear, fused: one or several adapters, dense or in bitsandbytes' 4 bits."""
    import peft as library

    quantised = HAS_BNB and not draw.exact and draw.chance("bnb", 0.3)
    (one,) = problems(draw, layer=True)
    q = one.q
    if not q.w.numel():
        return []
    if quantised:
        base, w = bnb_linear(draw, q)
        (N, K), (M, R), dtype = w.shape, (q.x.shape[0], q.a.shape[0]), q.x.dtype
        x, dy = draw.numbers(M, K, 1.0, 1.0).to(dtype), draw.numbers(M, N, 1.0, 1.0).to(dtype)
        q = adapted(draw, replace(q, w=w, x=x, dy=dy, bias=None), R)
    else:
        base = nn.Linear(q.w.shape[1], q.w.shape[0], bias=q.bias is not None, dtype=q.x.dtype)
        with torch.no_grad():
            base.weight.copy_(q.w)
            if q.bias is not None:
                base.bias.copy_(q.bias)
    count = 1 if q.p else draw.pick("adapters", (1, 1, 2, 3))
    parts = [q, *(adapted(draw, q, draw.size(f"R{i}", 12)) for i in range(1, count))]
    names = ["default", "second", "third"][:count]
    model: Any = None
    for name, part in zip(names, parts, strict=True):
        r = part.a.shape[0]
        config = library.LoraConfig(r=r, lora_alpha=abs(q.scale or 1.0) * r, lora_dropout=q.p, target_modules=["0"])
        if model is None:
            net = nn.Sequential(base)
            net.is_loaded_in_4bit = quantised  # type: ignore[assignment]
            model = library.get_peft_model(net, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, part in zip(names, parts, strict=True):
            layer.lora_A[name].to(part.a.dtype).weight.copy_(part.a)
            layer.lora_B[name].to(part.a.dtype).weight.copy_(part.b)
            layer.scaling[name] = q.scale
    report = fuse(model)
    if report.not_fused:
        return [f"not fused: {report.not_fused}"]
    active = [name for name in names if draw.random.random() < 0.8] or names[:1]
    draw.say("active", tuple(active))
    layer.set_adapter(active)
    layer.train()
    q = seeded(draw, q)
    joined = replace(
        q,
        a=torch.cat([part.a for name, part in zip(names, parts, strict=True) if name in active]),
        b=torch.cat([part.b for name, part in zip(names, parts, strict=True) if name in active], dim=1),
    )
    x = q.x.detach().requires_grad_()
    with surroundings(draw):
        y = run_layer(draw, layer, x)
        got = results(y, q.dy, {"x": x})
    for which in ("a", "b"):
        grads = [getattr(layer, f"lora_{which.upper()}")[name].weight.grad for name in names if name in active]
        if any(grad is None for grad in grads):
            return [f"d{which} is missing"]
        got[f"d{which}"] = torch.cat(grads, dim=int(which == "b"))
    faults = ["a call was left to PEFT"] if layer.passed_over else []
    return faults + sum_faults(draw, got, joined, len(active))


def sum_faults(draw: Draw, got: Results, q: Problem, count: int) -> list[str]:
    """Return the faults of the results of several adapters, whose A and B stand side by side in one problem."""
    want = truth(q)
    if draw.exact:
        return [] if any(t.abs().max() > 64 for t in truth(q.absolute()).values() if t.numel()) else unequal(got, want)
    magnitude, own = truth(q.absolute()), torch.finfo(q.x.dtype).eps / 2
    faults = []
    for name, value in got.items():
        bound = rounding_bound(name, q, want[name], magnitude[name]) + 2 * count * own * magnitude[name]
        faults += compare(draw, name, value, want[name], bound)
    return faults


def adapted(draw: Draw, q: Problem, R: int) -> Problem:
    """Return the problem with another adapter, of rank R."""
    (N, K), dtype = q.w.shape, q.a.dtype
    return replace(q, a=draw.numbers(R, K, K**-0.5, 0.2).to(dtype), b=draw.numbers(N, R, R**-0.5, 0.1).to(dtype))


def bnb_linear(draw: Draw, q: Problem) -> tuple[nn.Module, Tensor]:
    """Return a Linear4bit, and its weight as it is stored, in fp32. Its K is a multiple of the blocksize."""
    import bitsandbytes as bnb

    N, K = draw.size("N4", 96), 64 * draw.pick("K4", (1, 2, 3))
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=q.x.dtype, quant_type=draw.pick("type", ("nf4", "fp4")))
    layer.weight = bnb.nn.Params4bit(
        draw.numbers(N, K, K**-0.5, 1.0), requires_grad=False, quant_type=layer.weight.quant_type,
        compress_statistics=draw.chance("nested", 0.5),
    )  # fmt: skip
    layer.to("cpu")
    return layer, from_bnb(layer).dequantize(torch.float32)
