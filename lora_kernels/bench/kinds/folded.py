"""The kinds of PEFT's adapters that fold into A' and B': a linear layer frozen, with plain LoRA, and with each kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.bench.kinds.cells import FROZEN, OURS, PEFT, Cell, Target, Way

PLAIN = "plain LoRA, fused"
"""PEFT's plain LoRA over the same layer after `lora_kernels.fuse`."""

_M, _N, _RANK = 512, 2048, 16
_EXACT, _AS_PEFT = 2e-5, 1e-4
"""The largest error of ours and of PEFT, as a fraction of the largest value in fp64."""

_NAMES = {
    "adalora": "AdaLoRA",
    "delora": "DeLoRA",
    "kasa": "KaSA",
    "bdlora": "BD-LoRA",
    "conv1d": "plain LoRA over a Conv1D",
    "dora conv1d": "DoRA over a Conv1D",
    "beside": "plain LoRA and DoRA",
}
_FOLDED = ("adalora", "delora", "kasa", "bdlora", "conv1d")
"""The kinds that cost no more than plain LoRA. DoRA has a norm of W and a pass over y to compute."""


def cells() -> list[Cell]:
    """Return a cell for each kind, at K = N = 2048 with 512 rows and r = 16."""
    return [_cell(kind) for kind in _NAMES]


def _cell(kind: str) -> Cell:
    targets = (Target(PLAIN, 1.1), Target(PEFT, 1.0)) if kind in _FOLDED else (Target(PEFT, 0.7),)
    name = f"{_NAMES[kind]}, {_N} → {_N}, {_M} rows, r {_RANK}"
    return Cell("folded", name, functools.partial(_ways, kind), targets)


def _ways(kind: str) -> Mapping[str, Way]:
    torch.manual_seed(0)
    base = _base(kind)
    x = torch.randn(_M, _N)
    theirs, plain = _model(base, kind), _model(base, "conv1d" if "conv1d" in kind else "lora")
    ours = copy.deepcopy(theirs)
    for fused in (ours, plain):
        lora_kernels.fuse(fused, strict=True)
    want = functools.cache(functools.partial(in_fp64, theirs, x))
    return {
        FROZEN: way_of(base, x),
        PLAIN: way_of(plain, x),
        PEFT: way_of(theirs, x, want, _AS_PEFT),
        OURS: way_of(ours, x, want, _EXACT),
    }


def _base(kind: str) -> nn.Module:
    if "conv1d" not in kind:
        return nn.Linear(_N, _N).requires_grad_(False)
    from transformers.pytorch_utils import Conv1D

    base: nn.Module = Conv1D(_N, _N)
    return base.requires_grad_(False)


def _config(kind: str) -> Any:
    import peft
    from peft.tuners.lora import config

    targets: dict[str, Any] = {"target_modules": ["0"]}
    if kind == "adalora":
        return peft.AdaLoraConfig(init_r=_RANK, target_r=_RANK // 2, lora_alpha=32, total_step=1000, **targets)
    if kind == "delora":
        return peft.DeloraConfig(r=_RANK, **targets)
    more: dict[str, Any] = {"fan_in_fan_out": "conv1d" in kind, "use_dora": kind == "dora conv1d"}
    if kind == "kasa":
        more |= {"kasa_config": config.KasaConfig()}
    if kind == "bdlora":
        more |= {"use_bdlora": config.BdLoraConfig(target_modules_bd_b=["0"], nblocks=4)}
    return peft.LoraConfig(r=_RANK, lora_alpha=32, **more, **targets)


def _model(base: nn.Module, kind: str) -> Any:
    """Return a model of PEFT that holds a copy of the layer alone, whose adapter is not zero."""
    import peft

    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), _config(kind))
    if kind == "beside":
        model.add_adapter("second", peft.LoraConfig(r=_RANK, lora_alpha=32, use_dora=True, target_modules=["0"]))
        model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for parameter in _adapter(model):
            if parameter.dim() > 1:
                parameter.normal_(0, _N**-0.5)
    return model


def _adapter(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def way_of(module: nn.Module, given: Tensor, want: Callable[[], list[Tensor]] | None = None, most: float = 0.0) -> Way:
    """Return the way of a model over rows like `given`, judged by the y and gradients that `want` returns, in which
    nothing may be off by more than `most` of its largest value."""
    x, adapter = given.clone().requires_grad_(), _adapter(module)
    trained = (x, *adapter)

    def run() -> Tensor:
        return module(x)  # type: ignore[no-any-return]

    def faults() -> list[str]:
        assert want is not None
        y = run()
        grads = torch.autograd.grad(y, trained, torch.ones_like(y))
        names = ["y", "dx", *(name for name, p in module.named_parameters() if p.requires_grad)]
        errors = {
            name: float((got.double() - value).abs().max() / value.abs().max())
            for name, got, value in zip(names, (y.detach(), *grads), want(), strict=True)
        }
        return [f"{name} is off by {e:.1e} of its largest value" for name, e in errors.items() if not e <= most]

    frozen = tuple(p for p in module.parameters() if not p.requires_grad)
    return Way(run, trained, frozen, None if want is None else faults)


def in_fp64(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return y and all gradients of its sum in fp64, by PEFT's own forward of a copy."""
    exact: Any = copy.deepcopy(model).double()
    norms = getattr(exact.base_model.model[0], "delora_w_norm", {})
    for name in list(norms):  # PEFT's dictionary of buffers keeps their dtype
        norms[name] = norms[name].double()
    leaf = x.double().requires_grad_()
    y = exact(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *_adapter(exact)], torch.ones_like(y))]
