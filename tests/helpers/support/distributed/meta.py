"""Layers of ours that FSDP2 shards on the meta device and fills later, in several processes."""

from __future__ import annotations

from pathlib import Path

import torch
from support.distributed.models import NO_FSDP, K, N, R, check
from support.distributed.tensor import refuses
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from lora_kernels import apply_lora

WHOLE = StateDictOptions(full_state_dict=True, strict=False)


def adapted(**settings) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(K, N))
    apply_lora(model, r=R, **settings)
    return model


def emptied(**settings) -> nn.Sequential:
    """Return a sharded model whose memory nobody has written."""
    with torch.device("meta"):
        model = adapted(**settings)
    fully_shard(model[0])
    fully_shard(model)
    torch.use_deterministic_algorithms(True)  # what is empty is then filled with NaN
    model.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    return model


@check("dense", "dora", why_not=NO_FSDP)
def fill_a_sharded_model(folder: Path, kind: str) -> None:
    """A plain checkpoint finds a new adapter, an adapted one brings its own, and reset_parameters makes all values."""
    torch.manual_seed(0)
    settings, x = {"use_dora": kind == "dora"}, torch.randn(3, K)
    base, full = nn.Sequential(nn.Linear(K, N)), adapted(**settings)
    nn.init.normal_(full[0].lora_B)
    for source in (base, full):
        model = emptied(**settings)
        set_model_state_dict(model, source.state_dict(), options=WHOLE)
        torch.testing.assert_close(model(x), source(x))
    model = emptied(**settings)
    model[0].reset_parameters()
    state = get_model_state_dict(model, options=WHOLE)
    assert not state or all(t.isfinite().all() for t in state.values())
    assert model(x).isfinite().all()
    for call in (model[0].merge, model[0].to_linear):
        refuses(ValueError, "is sharded", call)


@check("lora", "dora", why_not=NO_FSDP)
def fill_a_sharded_quantised_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    settings = {"quant": "nf4", "use_dora": kind == "dora"}
    full, x = adapted(**settings), torch.randn(3, K)
    nn.init.normal_(full[0].lora_B)
    model = emptied(**settings)
    set_model_state_dict(model, full.state_dict(), options=WHOLE)
    torch.testing.assert_close(model(x), full(x))
    base = {name: t for name, t in full.state_dict().items() if "lora" not in name}
    fresh = emptied(**settings)
    set_model_state_dict(fresh, base, options=WHOLE)  # a new magnitude becomes the norm of the codes of all processes
    torch.testing.assert_close(fresh(x), nn.functional.linear(x, full[0].quantized_weight().dequantize(), full[0].bias))
    refuses(ValueError, "is sharded", lambda: model[0].merge(lossy=True))
    refuses(ValueError, "codes of this", model[0].reset_parameters)
    dense = nn.Sequential(nn.Linear(K, N)).state_dict()
    refuses(ValueError, "codes of this", lambda: set_model_state_dict(model, dense, options=WHOLE))
