"""Convolutions with an adapter: made, merged, saved, loaded, copied, moved and refused as their base allows."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.nn.utils import prune

from lora_kernels import FusedLoRAConv1d, FusedLoRAConv2d, FusedLoRAConv3d, lora_conv
from lora_kernels.nn.settings import LoRASettings

CLASSES = {1: (FusedLoRAConv1d, nn.Conv1d), 2: (FusedLoRAConv2d, nn.Conv2d), 3: (FusedLoRAConv3d, nn.Conv3d)}
KINDS = {
    "plain": {},
    "same, dilated": {"padding": "same", "dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular, strided": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "in groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4},
    "no bias": {"bias": False, "kernel_size": 1},
    "patches": {"stride": 3},
}


def base(n: int = 2, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return CLASSES[n][1](**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "dtype": dtype, **settings})


def trained(conv: Any = None, n: int = 2, **settings: Any) -> Any:
    """Return a layer whose adapter is not zero, and whose magnitude is not the norm."""
    conv = base(n) if conv is None else conv
    layer = CLASSES[n][0].from_conv(conv, **{"r": 4, "lora_alpha": 8, "grouped": conv.groups > 1, **settings})
    nn.init.normal_(layer.lora_B)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(0.5 + torch.rand(layer.lora_magnitude_vector.shape))
    return layer


def inputs(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, *(7, 8, 6)[:n]).to(dtype)


# --- making ---


@pytest.mark.parametrize("n", CLASSES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_layer_computes_what_its_base_computes(n, use_dora):
    conv = base(n, padding=1)
    layer = CLASSES[n][0].from_conv(conv, r=4, use_dora=use_dora)
    x = inputs(n)
    torch.testing.assert_close(layer(x), conv(x))
    if not use_dora:
        large = torch.randn(2, 4, *(24, 24, 4)[:n])
        assert torch.equal(layer(large), conv(large))


def test_the_parameters_of_the_base_are_shared_and_frozen():
    conv = base(padding=1).eval()
    layer = FusedLoRAConv2d.from_conv(conv, r=4)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.lora_A.shape == (4, 4, 3, 3) and layer.lora_B.shape == (8, 4, 1, 1) and not layer.lora_B.any()
    bound = (4 * 9) ** -0.5  # Kaiming-uniform(√5) has the bound 1 / √fan_in
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


def test_the_constructor_makes_what_from_conv_makes():
    torch.manual_seed(1)
    one = FusedLoRAConv2d(4, 8, (3, 2), 2, 1, groups=2, padding_mode="reflect", r=4, grouped=True, use_dora=True)
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, (3, 2), 2, 1, groups=2, padding_mode="reflect")
    two = FusedLoRAConv2d.from_conv(conv, r=4, grouped=True, use_dora=True)
    assert repr(one) == repr(two)
    for (name, p), (other, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_beside_16_bits_are_fp32_unless_asked_for_otherwise(dtype):
    conv = base(dtype=dtype)
    layer = trained(conv, use_dora=True)
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.lora_magnitude_vector.dtype} == {torch.float32}
    assert layer(inputs(dtype=dtype)).dtype == dtype
    assert trained(conv, adapter_dtype=dtype).lora_A.dtype == dtype
    with pytest.raises(TypeError, match="adapter_dtype"):
        trained(base(), adapter_dtype=dtype)


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    layer, x = trained(lora_dropout=0.5), inputs()
    without = trained(layer_of(layer))
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), without(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - without(x)).abs().mean() < 0.1 * (without(x) - layer_of(layer)(x)).abs().mean()


def layer_of(layer: Any) -> nn.Module:
    """Return the base of a layer."""
    conv = nn.Conv2d(4, 8, 3)
    conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return conv


class Subclass(nn.Conv2d):
    pass


def with_hook() -> nn.Module:
    conv = base()
    conv.register_forward_hook(lambda *_: None)
    return conv


def pruned() -> nn.Module:
    return prune.l1_unstructured(base(), "weight", 0.5)


def parametrised() -> nn.Module:
    conv = base()
    parametrize.register_parametrization(conv, "weight", nn.Identity())
    return conv


REFUSED = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), "transposed convolution"),
    "subclass": (lambda: Subclass(4, 8, 3), "a subclass may compute something else"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "LazyConv2d"),
    "other dimensions": (lambda: nn.Conv1d(4, 8, 3), "a Conv1d, not torch's own nn.Conv2d"),
    "linear": (lambda: nn.Linear(4, 8), "a Linear"),
    "hooks": (with_hook, "hooks"),
    "pruned": (pruned, "not a plain Parameter"),
    "parametrised": (parametrised, "ParametrizedConv2d"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_modules_whose_forward_is_not_that_of_a_convolution_are_refused(what):
    make, text = REFUSED[what]
    with pytest.raises(TypeError, match=text):
        FusedLoRAConv2d.from_conv(make())
    assert text in FusedLoRAConv2d.why_not(make())
    assert not FusedLoRAConv2d.why_not(base())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"r": 0}, "r must be"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"r": 3}, "multiple of groups"),
        ({"r": 4, "use_dora": True, "grouped": False}, "grouped=True"),
    ],
)
def test_settings_that_no_layer_can_have_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        FusedLoRAConv2d.from_conv(base(groups=2), **settings)
    for more in ({"quant": "nf4"}, {"init": "pissa"}):
        with pytest.raises(ValueError, match="quant"):
            FusedLoRAConv2d.from_settings(base(), LoRASettings(**more))


# --- merging ---


@pytest.mark.parametrize("n", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_layer_computes_what_it_computed_before(n, kind, use_dora):
    layer, x = trained(base(n, torch.float64, **KINDS[kind]), n, use_dora=use_dora), inputs(n, torch.float64)
    y, w = layer(x), layer.weight
    plain = layer.to_plain()
    assert type(plain) is CLASSES[n][1] and not layer.merged
    torch.testing.assert_close(plain(x), y, rtol=1e-10, atol=1e-10)
    layer.eval().merge()
    layer.merge()
    assert (
        layer.merged and torch.equal(layer.weight, plain.weight) and torch.equal(layer.to_plain().weight, plain.weight)
    )
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-10, atol=1e-10)
    layer.unmerge()
    layer.unmerge()
    assert layer.weight is w and torch.equal(layer(x), layer.train()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_computes_in_fp64_and_rounds_once(dtype):
    layer = trained(base(dtype=dtype))
    a, b = (t.detach().double().flatten(1) for t in (layer.lora_A, layer.lora_B))
    want = (layer.weight.double() + layer.scaling * (b @ a).view(8, 4, 3, 3)).to(dtype)
    layer.merge()
    assert torch.equal(layer.weight, want)


def test_an_a_that_sees_all_channels_of_groups_cannot_be_merged():
    layer = trained(base(groups=2), grouped=False)
    w = layer.weight
    for merge in (layer.merge, layer.to_plain):
        with pytest.raises(ValueError, match="grouped=True"):
            merge()
    assert layer.weight is w and not layer.merged


def test_a_merge_that_fails_changes_nothing():
    layer = trained()
    w = layer.weight
    with torch.no_grad():
        layer.lora_B[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert layer.weight is w and not layer.merged
    layer.merge(safe=False)
    assert layer.merged
    for change in (prune.l1_unstructured, None):
        other = trained()
        if change is None:
            parametrize.register_parametrization(other, "weight", nn.Identity())
        else:
            change(other, "weight", 0.5)
        with pytest.raises(ValueError, match="parametrised"):
            other.merge()


def test_a_merged_layer_takes_no_other_weight_and_warns_while_it_is_trained():
    layer = trained()
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        layer.weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    with pytest.warns(UserWarning, match="no gradient until unmerge"):
        layer(inputs())


def test_a_merged_layer_that_accelerate_offloads_is_refused():
    accelerate = pytest.importorskip("accelerate")
    layer, x = trained().eval(), inputs()
    y = layer(x)
    accelerate.cpu_offload(layer, torch.device("cpu"))
    torch.testing.assert_close(layer(x), y)
    with pytest.raises(ValueError, match="meta device"):
        layer.merge()
    accelerate.hooks.remove_hook_from_module(layer)
    layer.merge()
    accelerate.cpu_offload(layer, torch.device("cpu"))
    with pytest.raises(ValueError, match="was merged when accelerate offloaded it"):
        layer(x)


# --- state ---


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_state_dicts_copies_and_pickles_hold_base_and_adapter(merged, use_dora):
    layer, x = trained(use_dora=use_dora).eval(), inputs()
    w = layer.weight.clone()
    y = layer(x)
    if merged:
        layer.merge()
    state = layer.state_dict()
    assert torch.equal(state["weight"], w) and sorted(state) == sorted(dict(layer.named_parameters()))
    other = trained(use_dora=use_dora).eval()
    if merged:
        other.merge()
    other.load_state_dict(state)
    for each in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert each.merged == merged
        torch.testing.assert_close(each(x), y)
        each.unmerge()
        assert torch.equal(each.weight, w)


def test_the_state_dict_of_a_convolution_can_be_loaded_and_the_magnitude_follows():
    conv, layer = base(), FusedLoRAConv2d.from_conv(base(), r=4, use_dora=True)
    a = layer.lora_A.clone()
    layer.load_state_dict(conv.state_dict())
    assert torch.equal(layer.lora_A, a)
    x = inputs()
    torch.testing.assert_close(layer(x), conv(x))
    with pytest.raises(ValueError, match="rank 3"):
        layer.load_state_dict(FusedLoRAConv2d.from_conv(base(), r=3, use_dora=True).state_dict())


def test_layers_are_moved_and_converted_as_a_whole():
    layer = trained(use_dora=True).eval()
    layer.merge()
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    last = trained(base(padding=1)).to(memory_format=torch.channels_last)
    x = inputs().to(memory_format=torch.channels_last)
    y = last(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, last(x.contiguous()))
    last.merge()
    torch.testing.assert_close(last.eval()(x), y)


def test_a_layer_from_the_meta_device_gets_its_first_values():
    layer = FusedLoRAConv2d(4, 8, 3, r=4, use_dora=True, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        layer.merge()
    layer.to_empty(device="cpu")
    assert not layer.lora_B.any() and layer.lora_A.any() and layer.lora_magnitude_vector.isnan().all()
    conv = base()
    layer.load_state_dict(conv.state_dict())
    x = inputs()
    torch.testing.assert_close(layer(x), conv(x))
    fresh = FusedLoRAConv2d(4, 8, 3, r=4, use_dora=True, device="meta").to_empty(device="cpu")
    fresh.reset_parameters()
    assert torch.isfinite(fresh(x)).all()
    assigned = FusedLoRAConv2d(4, 8, 3, r=4, device="meta")
    assigned.load_state_dict(conv.state_dict(), assign=True)
    torch.testing.assert_close(assigned(x), conv(x))


# --- files ---


def test_the_tensors_of_a_file_have_pefts_shapes():
    parts = trained(base(groups=2), grouped=False).file_parts()
    assert {key: tuple(part) for key, part in parts.items()} == {
        "lora_A.weight": ("lora_A", (4, 4, 3, 3)),
        "lora_B.weight": ("lora_B", (8, 2, 1, 1)),
    }
    dora = trained(base(3), 3, use_dora=True).file_parts()
    assert tuple(dora["lora_magnitude_vector"]) == ("lora_magnitude_vector", (1, 8, 1, 1, 1))
    with pytest.raises(ValueError, match="no A in groups"):
        trained(base(groups=2)).file_parts()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, ""),
        ({"dilation": 2}, "dilation=(2, 2)"),
        ({"dilation": 2, "kernel_size": 1}, ""),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": 0, "padding_mode": "reflect"}, ""),
        ({"padding": "same", "padding_mode": "circular", "dilation": 2}, "dilation=(2, 2) and padding_mode='circular'"),
        ({"padding": "valid", "padding_mode": "circular"}, ""),
    ],
)
def test_a_layer_says_where_pefts_forward_computes_something_else(settings, text):
    reason = trained(base(**settings)).why_not_file()
    assert text in reason and bool(reason) == bool(text)


# --- torch ---


def test_a_compiler_and_fx_trace_the_layer():
    torch._dynamo.reset()
    layer, x = trained(base(padding=1), lora_dropout=0.0), inputs()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert any(node.target is lora_conv for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), layer(x))


def test_the_layers_say_what_they_are():
    layer = trained(base(groups=2, padding=1, padding_mode="reflect"), use_dora=True, lora_dropout=0.1)
    layer.merge()
    assert repr(layer) == (
        "FusedLoRAConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), bias=True, r=4, scaling=2, padding=(1, 1), groups=2, "
        "padding_mode='reflect', grouped=True, lora_dropout=0.1, use_dora=True, merged)"
    )
    assert layer.size == "4 → 8, kernel 3×3, 2 groups"
