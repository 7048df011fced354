"""The first values that leave W as it is: B A is zero, and the files are those of every adapter."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear, apply_lora, load_adapter, save_adapter
from lora_kernels.nn.init_values import gaussian, orthogonal

INITS = ["gaussian", "orthogonal"]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"quant": "nf4"}, {"quant": "int8", "use_dora": True}])
@pytest.mark.parametrize("init", INITS)
def test_w_stays_and_the_output_is_that_of_the_base(init, settings):
    linear, x = nn.Linear(40, 24), torch.randn(5, 40)
    plain = FusedLoRALinear.from_linear(copy.deepcopy(linear), r=6, **settings)
    layer = FusedLoRALinear.from_linear(linear, r=6, init=init, **settings)
    assert layer.init == init and not layer.splits_base
    if not settings:
        assert layer.weight is linear.weight
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [1, 2, 7, 64])
def test_gaussian_has_the_standard_deviation_one_over_r(r):
    a, b = torch.full((r, 4096), math.nan), torch.full((5, r), math.nan)
    gaussian(a, b)
    assert a.double().std().item() == pytest.approx(1 / r, rel=0.05) and abs(a.mean().item()) < 0.1 / r
    assert not b.any()


@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_orthogonal_halves_the_rank_and_its_product_is_zero(r):
    a, b = torch.full((r, 50), math.nan), torch.full((30, r), math.nan)
    with torch.autocast("cpu", torch.bfloat16):
        orthogonal(a, b)
    assert torch.linalg.matrix_rank(a) == (r + 1) // 2 and torch.linalg.matrix_rank(b) == r // 2
    assert (b.double() @ a.double()).abs().max() <= 4 * torch.finfo(torch.float32).eps * r
    # The rows of A are a normal matrix, divided by 10, in ⌈r/2⌉ of r dimensions.
    assert a.double().square().sum().item() == pytest.approx(50 * ((r + 1) // 2) / 100, rel=0.5)


@pytest.mark.parametrize("init", INITS)
def test_the_values_are_those_of_peft_for_the_same_seed(init):
    layer_of_peft = pytest.importorskip("peft.tuners.lora.layer").LoraLayer
    theirs = SimpleNamespace(
        r={"d": 6},
        in_features=40,
        out_features=24,
        lora_A={"d": nn.Linear(40, 6, bias=False)},
        lora_B={"d": nn.Linear(6, 24, bias=False)},
        lora_bias={"d": False},
        lora_embedding_A={},
        get_base_layer=lambda: nn.Linear(1, 1),
    )
    torch.manual_seed(3)
    if init == "gaussian":
        layer_of_peft.reset_lora_parameters(theirs, "d", init)
    else:
        base = nn.Linear(1, 1)
        theirs.get_base_layer = lambda: base
        torch.manual_seed(3)
        layer_of_peft.orthogonal_init(theirs, "d")
    a, b = torch.empty(6, 40), torch.empty(24, 6)
    torch.manual_seed(3)
    {"gaussian": gaussian, "orthogonal": orthogonal}[init](a, b)
    torch.testing.assert_close(a, theirs.lora_A["d"].weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, theirs.lora_B["d"].weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_the_adapter_is_saved_because_its_base_is_the_models_own(init, tmp_path):
    first, x = model(), torch.randn(3, 40)
    second = copy.deepcopy(first)
    apply_lora(first, r=4, init=init, target_modules=["0", "2"])
    with torch.no_grad():
        first[0].lora_B += 0.1
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("init", INITS)
def test_new_first_values_are_of_the_same_scheme(init):
    """`reset_adapter` and ``to_empty`` give first values anew."""
    layer = FusedLoRALinear.from_linear(nn.Linear(400, 24), r=8, init=init)
    for reset in (layer.reset_adapter, lambda: layer.to_empty(device="cpu")):
        before = layer.lora_A.detach().clone()
        reset()
        assert not torch.equal(layer.lora_A, before)
        wanted = 1 / 8 if init == "gaussian" else math.sqrt(0.5) / 10
        assert layer.lora_A.std().item() == pytest.approx(wanted, rel=0.15)
        assert bool(layer.lora_B.any()) == (init == "orthogonal")


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("lora_ga", r"lora_kernels\.train\.lora_ga"),
        ("eva", "load_adapter reads the file"),
        ("corda", r"let PEFT compute it, then call fuse\(model\)"),
    ],
)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_scheme_that_needs_data_is_refused_with_the_way_to_it(init, message, quant):
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(nn.Linear(8, 8), init=init, quant=quant)


def test_only_linear_layers_take_an_init():
    embedding = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0: init='gaussian' is for linear layers|init='gaussian' is for linear"):
        apply_lora(embedding, r=2, init="gaussian", target_modules=["0", "1"])
