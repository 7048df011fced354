"""Merging fused layers of PEFT: the merged weight is the sum rounded once, and unmerging gives the very base back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from support.merge_models import (  # noqa: E402
    DENSE,
    base_weights,
    is_rounded_once,
    layers_of,
    make,
    merged_by_peft,
)

import lora_kernels  # noqa: E402

every_kind = pytest.mark.parametrize("kind", DENSE)
pytestmark = pytest.mark.filterwarnings("ignore:.*[Aa]lready:UserWarning")


def held(model: nn.Module) -> dict[str, tuple[object, int, torch.Tensor]]:
    """Return each base parameter: the object, its address and a copy of its values."""
    return {name: (p, p.data_ptr(), p.detach().clone()) for name, p in base_weights(model).items()}


def is_as_before(model: nn.Module, before: dict[str, tuple[object, int, torch.Tensor]]) -> bool:
    now = base_weights(model)
    return now.keys() == before.keys() and all(
        now[name] is p and p.data_ptr() == address and torch.equal(p, values)
        for name, (p, address, values) in before.items()
    )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_once_and_the_base_comes_back(kind, dtype):
    model, given = make(kind, dtype)
    want, exact = model(*given), merged_by_peft(model)
    assert not lora_kernels.fuse(model).not_fused or kind == "attention" or "bias" in kind
    before = held(model)
    model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model))
    changed = 0
    for name, p in base_weights(model).items():
        assert is_rounded_once(p.detach(), exact[name]), name
        changed += not torch.equal(p, before[name][2])
        assert p.dtype == dtype and p.stride() == before[name][0].stride() and not p.requires_grad
    assert changed
    got = model(*given)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert lora_kernels.merged_bytes(model) > 0
    model.unmerge_adapter()
    assert is_as_before(model, before) and lora_kernels.merged_bytes(model) == 0
    assert not any(layer.merged for layer in layers_of(model))
