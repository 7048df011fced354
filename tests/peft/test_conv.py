"""PEFT's LoRA convolutions on the fused path: PEFT's results where these are right, else the right ones."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels
from lora_kernels import apply_lora, load_adapter, merge_and_unload, save_adapter

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GOOD = {
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "patches": {"stride": 3},
    "one position": {"kernel_size": 1},
    "same": {"padding": "same"},
    "groups": {"padding": 1, "groups": 2},
}
"""Convolutions that PEFT computes right."""
BAD = {
    "dilation, same": {"padding": "same", "dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}
"""Convolutions for which PEFT returns something else than its merged layer does, without a word."""


def of_peft(n: int = 2, dtype: torch.dtype = torch.float32, *, conv: Any = None, **settings: Any) -> Any:
    """Return a model of PEFT that holds one convolution, with an adapter that is not zero."""
    kind = KINDS[n]
    made = kind(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "dtype": dtype, **(conv or {})})
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["0"], "init_lora_weights": False, **settings}
    )
    model: Any = peft.get_peft_model(nn.Sequential(made), config)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if "magnitude" in name:
            p.data.mul_(0.5 + torch.rand_like(p))
    return model


def inputs(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, *(9, 8, 7)[:n], dtype=torch.float32).to(dtype)


def fused_copy(model: Any) -> Any:
    other = copy.deepcopy(model)
    report = lora_kernels.fuse(other, strict=True)
    assert list(report.fused)
    return other


def results(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return y, and the gradients of x and of the adapter by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *names.values()], dy)
    return {"y": y.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


def calls(model: Any) -> tuple[int, dict[str, int]]:
    layer = model.base_model.model[0]
    return layer.fused_calls, dict(layer.passed_over)


@pytest.mark.parametrize("n", KINDS)
@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}])
def test_results_equal_pefts_where_they_are_right(n, kind, settings):
    if kind == "groups" and "use_dora" in settings:
        return  # left to PEFT, see below
    model = of_peft(n, torch.float64, conv=GOOD[kind], **settings)
    fused, x = fused_copy(model), inputs(n, torch.float64)
    want, got = results(model, x), results(fused, x)
    assert calls(fused) == (1, {}) and want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused(x[0]), want["y"][0], rtol=1e-9, atol=1e-9)


def test_dora_of_one_sample_is_computed_with_which_peft_raises():
    model = of_peft(2, torch.float64, conv={"padding": 1}, use_dora=True)
    x = inputs(2, torch.float64)
    with pytest.raises(RuntimeError, match="must match"):
        model(x[0])
    torch.testing.assert_close(fused_copy(model)(x[0]), model(x)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("use_dora", [False, True])
def test_results_are_right_where_pefts_are_not(kind, use_dora):
    model = of_peft(2, torch.float64, conv=BAD[kind], use_dora=use_dora)
    fused, x = fused_copy(model), inputs(2, torch.float64)
    right = copy.deepcopy(model).merge_and_unload()(x)
    torch.testing.assert_close(fused(x), right, rtol=1e-9, atol=1e-9)
    assert (model(x) - right).abs().max() > 0.01  # PEFT's own forward; where it is right one day, this test says so
    (line,) = lora_kernels.fuse(fused).fused.values()
    assert "which PEFT's own forward leaves out" in line


def test_a_dilation_with_which_peft_raises_is_computed():
    model = of_peft(2, torch.float64, conv={"padding": 1, "dilation": 2})
    x = inputs(2, torch.float64)
    with pytest.raises(RuntimeError, match="must match"):
        model(x)
    right = copy.deepcopy(model).merge_and_unload()(x)
    torch.testing.assert_close(fused_copy(model)(x), right, rtol=1e-9, atol=1e-9)


def test_the_gradients_are_right_where_pefts_are_not():
    model = of_peft(2, torch.float64, conv={"padding": 1, "padding_mode": "reflect", "bias": False})
    fused, x = fused_copy(model), inputs(2, torch.float64)
    got = results(fused, x)
    layer = model.base_model.model[0]
    a, b = (p.weight.detach().clone().requires_grad_() for p in (layer.lora_A.default, layer.lora_B.default))
    x = x.clone().requires_grad_()
    w = layer.base_layer.weight + 2 * (b.flatten(1) @ a.flatten(1)).view(8, 4, 3, 3)
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), w)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double()
    for name, value in zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, a, b), dy), strict=True):
        (mine,) = [t for key, t in got.items() if name in key]
        torch.testing.assert_close(mine, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_16_bits_are_as_near_to_the_truth_as_pefts(adapter, use_dora):
    model = of_peft(2, torch.bfloat16, conv={"padding": 1}, use_dora=use_dora)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter)
    x = inputs(2, torch.bfloat16)
    exact, theirs, mine = (
        results(m, t) for m, t in ((copy.deepcopy(model).double(), x.double()), (model, x), (fused_copy(model), x))
    )
    for name, value in exact.items():
        assert mine[name].dtype == theirs[name].dtype
        error, allowed = ((t[name].double() - value).square().mean().sqrt() for t in (mine, theirs))
        assert error <= 1.5 * allowed, name


def test_dora_with_dropout_and_fp32_adapters_beside_16_bits_is_computed_where_peft_raises():
    settings = {"conv": {"padding": 1}, "use_dora": True, "lora_dropout": 0.5}
    model, x = of_peft(2, torch.bfloat16, **settings), inputs(2, torch.bfloat16)
    with pytest.raises(RuntimeError, match="should be the same"):
        model(x)
    mine, wide = fused_copy(model), copy.deepcopy(model).double()
    lora_kernels.fuse(wide, backend="eager")  # no other back-end draws masks in fp64
    torch.manual_seed(1)
    got = results(mine, x)
    torch.manual_seed(1)
    for name, value in results(wide, x.double()).items():
        assert (got[name].double() - value).abs().max() <= 0.02 * value.abs().max(), name


def test_autocast_is_that_of_peft():
    model = of_peft(2, conv={"padding": 1})
    fused, x = fused_copy(model), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = results(model, x), results(fused, x)
    assert calls(fused) == (1, {})
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert (got[name] - value).abs().max() <= 0.05 * value.abs().max()


# --- dropout, several adapters, switches ---


def test_dropout_acts_on_the_adapter_in_training_only():
    model = of_peft(2, conv={"padding": 1}, lora_dropout=0.5)
    fused, x = fused_copy(model), inputs()
    torch.manual_seed(1)
    one, two = fused(x), fused(x)
    torch.manual_seed(1)
    assert torch.equal(fused(x), one) and not torch.equal(one, two) and calls(fused) == (3, {})
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))
    fused.train()
    mean = torch.stack([fused(x).detach() for _ in range(400)]).mean(0)
    change = (model(x) - model.base_model.model[0].base_layer(x)).abs().mean()
    assert (mean - model(x)).abs().mean() < 0.15 * change


@pytest.mark.parametrize("kind", ["padding", "groups", "patches"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_active_adapters_are_added(kind, p):
    model = of_peft(2, conv=GOOD[kind], lora_dropout=p)
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second", "third"])
    fused, x = fused_copy(model), inputs()
    if not p:
        want, got = results(model, x), results(fused, x)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))
    assert not calls(fused)[1]


def test_several_adapters_over_a_dilated_base_are_right_too():
    model = of_peft(2, torch.float64, conv=BAD["dilation, same"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    x = inputs(2, torch.float64)
    right = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])(x)
    torch.testing.assert_close(fused_copy(model)(x), right)


def test_switching_merging_and_unloading_stay_pefts():
    model = of_peft(2, conv={"padding": 1})
    fused, x = fused_copy(model), inputs()
    y = fused(x)
    with fused.disable_adapter():
        torch.testing.assert_close(fused(x), model.base_model.model[0].base_layer(x))
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), y)
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(x), y)
    fused.base_model.model[0].scaling["default"] = 0.0
    torch.testing.assert_close(fused(x), model.base_model.model[0].base_layer(x))
    lora_kernels.unfuse(fused)
    assert type(fused.base_model.model[0]) is type(model.base_model.model[0])
    assert not hasattr(fused.base_model.model[0], "fused_calls")


# --- what is left to PEFT ---


def hooked(layer: Any) -> None:
    layer.lora_A.default.register_forward_hook(lambda *_: None)


def trained_base(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_(True)


def own_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.1)


def other_stride(layer: Any) -> None:
    layer.lora_A.default.stride = (2, 2)


LEFT = {
    "hooks": (hooked, "has hooks"),
    "a trained base": (trained_base, "its base weight is trained"),
    "another dropout": (own_dropout, "AlphaDropout"),
    "another stride": (other_stride, "a stride, padding or groups of its own"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_not_served_is_reported_and_counted(what):
    change, text = LEFT[what]
    model, x = of_peft(conv={"padding": 1}), inputs()
    fused = fused_copy(model)
    change(fused.base_model.model[0])
    with pytest.raises(RuntimeError) if what == "another stride" else contextlib.nullcontext():
        fused(x)  # PEFT's own forward serves the call, and adds results of two sizes in the one case
    ((reason, count),) = calls(fused)[1].items()
    assert text in reason and count == 1 and calls(fused)[0] == 0
    change(model.base_model.model[0])
    assert text in next(iter(lora_kernels.fuse(model).not_fused.values()))


def test_dora_over_groups_and_names_for_each_sample_are_left_to_peft():
    dora = of_peft(conv={"groups": 2}, use_dora=True)
    assert "DoRA over groups" in next(iter(lora_kernels.fuse(dora).not_fused.values()))
    model = of_peft(conv={"padding": 1}).eval()
    fused, x = fused_copy(model), inputs()
    names = ["default", "__base__"]
    torch.testing.assert_close(fused(x, adapter_names=names), model(x, adapter_names=names))
    assert calls(fused) == (0, {"adapter_names over a convolution": 1})


class OwnConv(nn.Conv2d):
    pass


def test_a_base_of_a_class_of_its_own_is_left_to_peft():
    model = peft.get_peft_model(nn.Sequential(OwnConv(4, 8, 3)), peft.LoraConfig(target_modules=["0"]))
    assert "OwnConv" in next(iter(lora_kernels.fuse(model).not_fused.values()))


def test_verify_finds_the_layers_computed():
    model = of_peft(conv={"padding": 1})
    report = lora_kernels.fuse(model, verify=inputs())
    assert len(report.fused) == 1 and not report.not_fused
    assert "4→8, kernel 3×3, default r=4" in str(report)


def test_a_compiler_traces_a_fused_layer():
    torch._dynamo.reset()
    fused, x = fused_copy(of_peft(conv={"padding": 1})), inputs()
    inner = fused.base_model  # torch 2.6 cannot trace the forward of PeftModel around it
    torch.testing.assert_close(torch.compile(inner, fullgraph=True, backend="aot_eager")(x), fused(x))


# --- models without PEFT, and files in both directions ---


class Net(nn.Module):
    def __init__(self, **conv: Any) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, **conv)
        self.two = nn.Conv2d(4, 8, 3, **conv)
        self.three = nn.Conv3d(4, 8, 3, **conv)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x.flatten(2)), self.two(x), self.three(x.unsqueeze(2).expand(-1, -1, 4, -1, -1))
        return torch.cat([t.flatten() for t in y])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
@pytest.mark.parametrize("groups", [1, 2])
def test_files_go_to_peft_and_come_from_it(tmp_path, settings, groups):
    if groups > 1 and settings:
        return
    names, x = ["one", "two", "three"], inputs()
    torch.manual_seed(0)
    ours, theirs = Net(padding=1, groups=groups), Net(padding=1, groups=groups)
    theirs.load_state_dict(ours.state_dict())
    plain = copy.deepcopy(ours)
    report = apply_lora(ours, r=4, lora_alpha=8, target_modules=names, **settings)
    assert len(report.layers) == 3
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    save_adapter(ours, tmp_path / "mine")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "mine")
    torch.testing.assert_close(model(x), ours(x), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    other = copy.deepcopy(plain)
    load_adapter(other, tmp_path / "theirs")
    torch.testing.assert_close(other(x), ours(x), rtol=1e-4, atol=1e-5)
    if groups == 1:
        y = ours(x)
        merge_and_unload(ours)
        assert type(ours.two) is nn.Conv2d
        torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-5)


def test_a_file_of_peft_over_a_dilated_base_is_loaded_with_a_warning(tmp_path):
    conv = {"padding": "same", "dilation": 2}
    of_peft(conv=conv).save_pretrained(tmp_path)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **conv))
    with pytest.warns(UserWarning, match="leaves dilation=\\(2, 2\\) of the base out"):
        load_adapter(model, tmp_path)
