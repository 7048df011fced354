"""PEFT's VeRA on the fused path computes what PEFT computes, and saves h alone. What it cannot serve goes to PEFT."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import peft
import pytest
import torch
from support import judging
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels.peft.vera import FusedVeraLinear

NAMES = ["up", "middle", "down"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(12, 20), Conv1D(16, 20), nn.Linear(16, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))


def both(dtype=torch.float32, net=None, **settings):
    """Return a model of PEFT whose adapter is not zero, and a fused copy."""
    torch.manual_seed(0)
    config = peft.VeraConfig(**{"r": 8, "target_modules": NAMES, "fan_in_fan_out": False} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT corrects
        theirs = peft.get_peft_model((net or Net()).to(dtype), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_()
    ours = copy.deepcopy(theirs)
    report = lora_kernels.fuse(ours, strict=True)
    assert len(report.fused) == len(config.target_modules) and "VeRA r=8" in str(report)
    return theirs, ours


def layers(model):
    return [module for module in model.modules() if isinstance(module, FusedVeraLinear)]


def same(theirs, ours, x, calls=1, tolerance=1e-5, **kwargs):
    """Assert that both give one y and the same gradients, and that ours ran `calls` fused forwards in each layer."""
    before = [layer.fused_calls for layer in layers(ours)]
    found = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        torch.manual_seed(4)
        y = model(leaf, **kwargs)
        y.float().square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": leaf.grad} | grads)
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        got, scale = found[1][name], float(want.abs().max()) or 1.0
        assert got.dtype == want.dtype, name
        torch.testing.assert_close(got / scale, want / scale, rtol=tolerance, atol=tolerance, msg=name)
    assert [layer.fused_calls - n for layer, n in zip(layers(ours), before, strict=True)] == [calls] * len(before)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2),
])  # fmt: skip
def test_values_and_gradients_are_pefts(dtype, tolerance):
    theirs, ours = both(dtype)
    if dtype == torch.float64:
        theirs, ours = theirs.double(), ours.double()
    same(theirs, ours, torch.randn(7, 12, dtype=dtype), tolerance=tolerance)


def test_autocast_gives_pefts_dtypes_and_values():
    theirs, ours = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(theirs, ours, torch.randn(64, 12), tolerance=5e-2)


def test_evaluation_keeps_the_fold_until_an_adapter_changes():
    theirs, ours = both()
    x = torch.randn(3, 12)
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        for change in (lambda *_: None, lambda p: p.mul_(2), lambda p: p.data.mul_(2)):
            for model in (theirs, ours):
                for name, p in model.named_parameters():
                    if "vera_lambda" in name:
                        change(p)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        for model in (theirs, ours):
            model.base_model.vera_B["default"].mul_(0.5)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    kept = [layer._kept for layer in layers(ours)]
    assert all(kept)
    assert [layer._kept for layer in layers(copy.deepcopy(ours))] == [None] * 3
    assert b"_kept" in pickle.dumps(ours)
    ours.train()(x)
    assert [layer._kept for layer in layers(ours)] == [None] * 3


def test_no_m_by_n_is_saved():
    class One(nn.Sequential):
        pass

    theirs, ours = both(net=One(nn.Linear(24, 40)), target_modules=["0"])
    x, M = torch.randn(256, 24, requires_grad=True), 256
    slices = sum(t.untyped_storage().nbytes() for t in ours.buffers())
    assert judging.saved_bytes(lambda: ours(x)) <= M * 8 * 4 + slices + 64
    assert judging.saved_bytes(lambda: theirs(x)) >= M * 40 * 4


def test_dropout_drops_elements_of_x_in_the_update_alone():
    _, ours = both(vera_dropout=0.5)
    x = torch.ones(400, 12)
    with torch.no_grad():
        mean = torch.stack([ours.base_model.model.up(x) for _ in range(20)]).mean((0, 1))
        ours.eval()
        torch.testing.assert_close(mean, ours.base_model.model.up(x)[0], rtol=0.1, atol=0.3)
    assert layers(ours)[0].fused_calls == 21


def test_a_base_with_a_forward_of_its_own_is_fused_around_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Around(Net):
        def __init__(self):
            super().__init__()
            self.up = Doubled(12, 20)

    theirs, ours = both(net=Around())
    assert "around Doubled" in str(lora_kernels.fuse(ours))
    same(theirs, ours, torch.randn(7, 12))
    theirs.eval()
    ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.ones(2, 12)), theirs(torch.ones(2, 12)), rtol=1e-4, atol=1e-4)


def test_bases_of_bitsandbytes_are_fused_around_them():
    bnb = pytest.importorskip("bitsandbytes")
    if not hasattr(peft.tuners.vera.layer, "resolve_quantization_backend"):
        pytest.skip("this PEFT has classes of its own for VeRA over bitsandbytes")

    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")

        def forward(self, x):
            return self.up(x)

    net = Four()
    net.up.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4").to("cpu")
    net.up.to("cpu")
    theirs, ours = both(net=net, target_modules=["up"])
    same(theirs, ours, torch.randn(5, 64), tolerance=1e-4)


def test_disabled_and_merged_adapters_are_pefts_own():
    theirs, ours = both()
    x = torch.randn(3, 12)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    want = theirs(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    same(theirs, ours, x)
    lora_kernels.unfuse(ours)
    assert not layers(ours)
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
    assert not any("_kept" in module.__dict__ for module in ours.modules())


def test_what_is_not_served_goes_to_peft_with_its_reason():
    theirs, ours = both()
    x = torch.randn(3, 12)
    for model in (theirs, ours):
        model.add_adapter("second", peft.VeraConfig(r=8, target_modules=NAMES))
        model.base_model.set_adapter(["default", "second"])
    same(theirs, ours, x, calls=0)
    assert layers(ours)[0].passed_over == {"several adapters": 1}
    for model in (theirs, ours):
        model.set_adapter("second")
        model.base_model.model.up.vera_lambda_b["second"].data.fill_(0.5)
    same(theirs, ours, x)


def test_vectors_in_two_dtypes_are_left_to_peft():
    theirs, ours = both()
    for model in (theirs, ours):
        model.base_model.vera_A["default"] = model.base_model.vera_A["default"].double()
    report = str(lora_kernels.fuse(ours))
    assert "adapter 'default' is in torch.float32, torch.float64" in report


def test_input_casting_that_is_off_is_pefts_own():
    _, ours = both(torch.bfloat16)
    up = layers(ours)[0]
    up.cast_input_dtype_enabled = False
    with contextlib.suppress(RuntimeError):  # of two dtypes, in PEFT's forward where it knows the attribute
        ours(torch.randn(3, 12, dtype=torch.bfloat16))
    assert up.passed_over == {"the adapter is torch.float32 beside torch.bfloat16": 1}


@pytest.mark.slow
def test_a_compiler_sees_one_graph():
    theirs, ours = both()
    x = torch.randn(3, 12)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_verify_sees_that_every_layer_computes_its_update():
    _, ours = both()
    assert len(lora_kernels.fuse(ours, strict=True, verify=torch.randn(2, 12)).fused) == 3


def test_a_forward_that_is_not_known_is_left_to_peft(monkeypatch):
    monkeypatch.setattr(peft.tuners.vera.layer.Linear, "forward", lambda self, x: self.base_layer(x))
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.VeraConfig(r=2, target_modules=["0"]))
    report = lora_kernels.fuse(model)
    assert not report.fused and "has been replaced by a function of" in str(report)
