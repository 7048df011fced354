"""Rows of our linear layers have their adapter, or the base alone, as the context `mixed` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.layer_kinds import KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, dequantize_weight, mixed
from lora_kernels.nn.mixed import table_of

IDS = torch.tensor([0, -1, 0, -1])


def layer_of(N: int = 33, K: int = 64, dtype: torch.dtype = torch.float32, **kwargs: Any) -> FusedLoRALinear:
    layer = FusedLoRALinear.from_linear(nn.Linear(K, N, dtype=dtype), r=3, lora_alpha=6, **kwargs)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def base_of(layer: Any, x: Tensor) -> Tensor:
    w = layer.frozen_weight()
    return F.linear(x, w if isinstance(w, Tensor) else dequantize_weight(w, x.dtype), layer.bias)


def test_values_and_gradients_are_the_closed_form() -> None:
    layer = layer_of(7, 5, torch.float64)
    x = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 6, 7, dtype=torch.float64)
    with mixed(layer, IDS):
        y = layer(x)
        y.backward(dy)
    w, a, b, s = layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach(), 2.0
    own = (IDS == 0).double()[:, None, None]
    torch.testing.assert_close(y, x @ w.T + layer.bias + own * s * (x @ a.T) @ b.T)
    torch.testing.assert_close(x.grad, dy @ w + own * s * dy @ b @ a)
    rows, dys = (own * x.detach()).flatten(0, 1), dy.flatten(0, 1)
    torch.testing.assert_close(layer.lora_A.grad, s * (dys @ b).T @ rows)
    torch.testing.assert_close(layer.lora_B.grad, s * dys.T @ (rows @ a.T))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_rows_of_every_base_have_their_layers_values_or_those_of_the_base(kind: str) -> None:
    layer = layer_of(**KINDS[kind])
    x = torch.randn(4, 5, 64)
    with mixed(layer, IDS), torch.no_grad():
        y = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(y[::2], layer(x)[::2])
        torch.testing.assert_close(y[1::2], base_of(layer, x)[1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_the_adapter_have_the_bits_of_the_frozen_layer(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    x = torch.randn(4, 5, 64).to(dtype)
    with mixed(layer, IDS):
        y = layer(x)
    assert torch.equal(y[1::2], base_of(layer, x)[1::2])
    assert not torch.equal(y[::2], base_of(layer, x)[::2])
    with mixed(layer, [-1] * 4):
        assert torch.equal(layer(x), base_of(layer, x))


def test_the_adapter_is_called_default_as_in_peft() -> None:
    layer = layer_of()
    assert table_of(layer) == {"default": 0}
    x = torch.randn(2, 64)
    with torch.no_grad():
        with mixed(layer, ["default", None]):
            by_name = layer(x)
        with mixed(layer, [0, -1]):
            assert torch.equal(layer(x), by_name)


def test_conv1d_of_gpt2_computes_by_row_too() -> None:
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D(7, 5)
    from lora_kernels import FusedLoRAConv1D

    layer = FusedLoRAConv1D.from_conv1d(conv, r=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 5)
    with mixed(layer, IDS), torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y[1::2], conv(x)[1::2])
    torch.testing.assert_close(y[::2], layer(x)[::2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_rows_and_masks_inside_and_raises_outside(reentrant: bool) -> None:
    layer = layer_of(lora_dropout=0.4)
    x = torch.randn(4, 5, 64, requires_grad=True)

    def gradient(forward: Any) -> Tensor:
        torch.manual_seed(0)
        layer.zero_grad()
        with mixed(layer, IDS):
            forward().square().sum().backward()
        return layer.lora_A.grad

    want = gradient(lambda: layer(x)).clone()
    assert torch.equal(gradient(lambda: checkpoint(layer, x, use_reentrant=reentrant)), want)
    with mixed(layer, IDS):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="outside of the context"):
        y.sum().backward()


def test_no_adapter_gets_a_gradient_from_a_step_without_rows_of_it() -> None:
    layer = layer_of()
    with mixed(layer, [-1, -1]):
        layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None


def test_dora_and_merged_layers_are_refused() -> None:
    with pytest.raises(RuntimeError, match="0 has DoRA, which no row can be without"):
        mixed(nn.Sequential(layer_of(use_dora=True)), [0])
    layer = layer_of()
    layer.merge()
    with mixed(layer, [0]), pytest.raises(RuntimeError, match=r"call unmerge\(\) before"):
        layer(torch.randn(1, 64))


@pytest.mark.slow
def test_a_compiled_model_serves_other_rows_and_none() -> None:
    layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 64)
    with torch.no_grad():
        for ids in (None, IDS, -1 - IDS, None):
            if ids is None:
                torch.testing.assert_close(compiled(x), layer(x))
                continue
            with mixed(layer, ids):
                torch.testing.assert_close(compiled(x), layer(x))
