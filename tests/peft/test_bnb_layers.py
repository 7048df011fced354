"""Fused layers over bitsandbytes' 4-bit and 8-bit weights give PEFT's results, or results nearer to those in fp64."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

peft = pytest.importorskip("peft", reason="PEFT is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from peft import PeftModel  # noqa: E402
from support.bnb_models import Net, Net8, make  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import config, fused_layers, randomise, run, same, with_our_masks  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.nn.mixed import mixed  # noqa: E402
from lora_kernels.quant.bnb import from_bnb  # noqa: E402
from lora_kernels.testing.judge import Problem, evaluate, truth  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def packed(model: nn.Module) -> list[bool]:
    return [
        getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False) for layer in fused_layers(model)
    ]


def fused_equals_peft(model: nn.Module, x: torch.Tensor, rtol: float = 1e-5, **kwargs) -> None:
    want = run(copy.deepcopy(model), x, **kwargs)
    report = lora_kernels.fuse(model, strict=True)
    assert len(report.fused) == len(fused_layers(model)) > 0
    same(run(model, x, **kwargs), want, rtol)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_values_and_gradients_are_pefts(quant_type, double, storage):
    net = Net(quant_type=quant_type, compress_statistics=double, quant_storage=storage)
    fused_equals_peft(make(net), torch.randn(2, 5, 64))


@pytest.mark.parametrize(
    "kwargs", [{"use_rslora": True}, {"bias": "all"}, {"target_modules": ["up"], "lora_bias": True}]
)
def test_settings_of_peft_are_honoured(kwargs):
    fused_equals_peft(make(**kwargs), torch.randn(6, 64))


def test_eight_bits_while_training_are_pefts():
    """In training mode on the CPU, bitsandbytes does not round x."""
    fused_equals_peft(make(Net8()), torch.randn(6, 64))


def problem_of(layer, x: torch.Tensor, dy: torch.Tensor) -> Problem:
    """Return the operands of one PEFT layer as a problem for the judge."""
    a, b = (getattr(layer, f"lora_{name}")["default"].weight.detach() for name in "AB")
    w = from_bnb(layer.base_layer).dequantize(FP32)
    return Problem(x, w, a, b, layer.base_layer.bias.detach(), dy, layer.scaling["default"], 0.0, None)


def results(layer, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {
        f"d{name.lower()}": getattr(layer, f"lora_{name}")["default"].weight.grad.clone() for name in "AB"
    }


def rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def as_near_as_peft(model: PeftModel, x: torch.Tensor, inner: torch.dtype, autocast: torch.dtype | None = None) -> None:
    """Assert that the results have PEFT's dtypes and an RMS error of at most 1.25 times the larger of two errors:
    PEFT's, and that of plain torch in the dtypes of the computation."""
    dy = torch.randn(*x.shape[:-1], 128).to(x.dtype)
    plain = copy.deepcopy(model).base_model.model.up
    q = problem_of(plain, x, dy)
    adapters = torch.promote_types(q.a.dtype, inner)
    want, torch_s = truth(q), evaluate(replace(q.to(inner), a=q.a.to(adapters), b=q.b.to(adapters)))
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.up
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        theirs, ours = results(plain, x, dy), results(layer, x, dy)
    assert layer.fused_calls == 1 and not layer.passed_over, layer.passed_over
    for name, got in ours.items():
        assert got.dtype == theirs[name].dtype, name
        allowed = 1.25 * max(rms(other[name].double() - want[name]) for other in (theirs, torch_s))
        assert rms(got.double() - want[name]) <= allowed, (name, rms(got.double() - want[name]), allowed)


@pytest.mark.parametrize(("x_dtype", "compute"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (BF16, None)])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bits_are_as_near_as_peft(x_dtype, compute, adapters):
    model = make(Net(compute_dtype=compute))
    for name, module in model.named_modules():
        if "lora_" in name:
            module.to(x_dtype if adapters == "same" else FP32)
    as_near_as_peft(model, torch.randn(96, 64).to(x_dtype), compute or x_dtype)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("compute", [FP32, BF16])
def test_autocast_is_as_near_as_peft(x_dtype, compute):
    as_near_as_peft(make(Net(compute_dtype=compute)), torch.randn(96, 64).to(x_dtype), compute, autocast=BF16)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
@pytest.mark.parametrize("autocast", [None, BF16])
def test_eight_bits_beside_a_16_bit_x_are_as_near_as_peft(x_dtype, autocast):
    as_near_as_peft(make(Net8()), torch.randn(96, 64).to(x_dtype), autocast or x_dtype, autocast=autocast)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bits_in_eval_mode_are_nearer_to_the_truth(threshold):
    """In eval mode bitsandbytes rounds x to 8 bits, except for outliers."""
    model = make(Net8()).eval()
    model.base_model.model.up.base_layer.state.threshold = threshold
    x, dy = torch.randn(96, 64), torch.randn(96, 128)
    x[:, 3] *= 20
    plain = copy.deepcopy(model).base_model.model.up
    want = truth(problem_of(plain, x, dy))
    lora_kernels.fuse(model, strict=True)
    theirs, ours = results(plain, x, dy), results(model.base_model.model.up, x, dy)
    assert rms(ours["y"].double() - want["y"]) < 0.01 * rms(theirs["y"].double() - want["y"])
    assert all(rms(ours[name].double() - want[name]) < 1e-6 * rms(want[name]) for name in ours)


def test_compute_dtype_is_that_of_the_first_x():
    """bitsandbytes sets it from the first x if none was given."""
    model = make(Net(compute_dtype=None))
    lora_kernels.fuse(model, strict=True)
    model(torch.randn(3, 64, dtype=BF16))
    assert [layer.base_layer.compute_dtype for layer in fused_layers(model)] == [BF16, BF16]
    model(torch.randn(3, 64))
    assert all(layer.fused_calls == 2 and not layer.passed_over for layer in fused_layers(model))
    assert [layer.base_layer.compute_dtype for layer in fused_layers(model)] == [BF16, BF16]


@pytest.mark.parametrize("net", [Net, Net8])
def test_dropout_is_pefts_with_our_mask(net, monkeypatch):
    model, x = make(net(), lora_dropout=0.3), torch.randn(3, 7, 64)
    plain, _ = with_our_masks(model, 0.3, monkeypatch)
    want = run(plain, x)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want, 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_active_adapters_give_pefts_sum(p, monkeypatch):
    model = make(lora_bias=True, target_modules=["up"], lora_dropout=p)
    model.add_adapter("second", config(r=7, target_modules=["up"], lora_dropout=p))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    for layer in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
        layer.eval()
    fused_equals_peft(model, torch.randn(5, 64))


@pytest.mark.parametrize("net", [Net, Net8])
def test_adapters_by_sample_leave_the_weight_as_it_is(net):
    model = make(net(), lora_dropout=0.1)
    model.add_adapter("second", config(r=2))
    randomise(model)
    bases = [model.base_model.model.up.base_layer, model.base_model.model.down.base_layer]
    model.eval()
    for base in bases:
        base.train()  # so that PEFT's own call, with which results are compared, does not re-pack the weight
    names = ["second", "__base__", "default", "second", "__base__"]
    x = torch.randn(5, 3, 64)
    with torch.no_grad():  # PEFT's own call has no backward over these layers
        want = model(x, adapter_names=names)
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(model(x, adapter_names=names), want)
    model.eval()
    y = run(model, x, adapter_names=names)
    torch.testing.assert_close(y["y"], want)
    assert len(y) == 2 + 4 and all(layer.fused_calls == 2 and not layer.passed_over for layer in fused_layers(model))
    assert net is Net8 or packed(model) == [False, False]


def test_eval_mode_does_not_re_pack_and_reads_what_is_re_packed():
    """On a CPU with AVX512-BF16 the first forward of bitsandbytes in eval mode re-packs the weight."""
    model, x = make().eval(), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    y = model(x)
    assert packed(model) == [False, False]
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    assert not torch.allclose(base, y)
    tolerance = 0.02 if any(packed(model)) else 1e-6  # re-packing rounds absmax to bf16
    torch.testing.assert_close(model(x), y, rtol=0, atol=tolerance * y.abs().max().item())
    model.state_dict()  # bitsandbytes puts the codes back in their order
    torch.testing.assert_close(model(x), y, rtol=0, atol=2 * tolerance * y.abs().max().item())
    assert all(layer.fused_calls == 3 and not layer.passed_over for layer in fused_layers(model))


@pytest.mark.parametrize("net", [Net, Net8])
def test_merging_keeps_the_weight_and_what_was_read_of_it(net, monkeypatch):
    model, x = make(net()), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    want = model(x)
    reads = []
    monkeypatch.setattr("lora_kernels.peft.bnb.from_bnb", lambda base: reads.append(base) or from_bnb(base))
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=2e-3, atol=2e-3)
    model.unmerge_adapter()
    assert torch.equal(model(x), want) and not reads
    assert all(layer.fused_calls == 2 and not layer.passed_over for layer in fused_layers(model))


def test_the_weight_is_read_once_and_shared(monkeypatch):
    reads = []
    monkeypatch.setattr("lora_kernels.peft.bnb.from_bnb", lambda base: reads.append(base) or from_bnb(base))
    model, x = make(), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    reads.clear()
    model(x), model(x)
    assert not reads
    up, down = (layer.base_layer for layer in fused_layers(model))
    q, _ = fused_layers(model)[0].read_base(fused_layers(model)[0])
    assert q.codes.data_ptr() == up.weight.data_ptr() and q.scales is up.weight.quant_state.absmax
    up.weight.data = up.weight.data.clone()
    down.weight.quant_state.absmax = down.weight.quant_state.absmax.clone()
    model(x)
    assert reads == [up, down]


@pytest.mark.parametrize("net", [Net, Net8])
def test_a_weight_that_the_layer_gives_away_is_freed(net):
    model = make(net())
    lora_kernels.fuse(model, strict=True)
    model(torch.randn(4, 64))
    layer = fused_layers(model)[0]
    old, storage = weakref.ref(layer.base_layer.weight), StorageWeakRef(layer.base_layer.weight.untyped_storage())
    layer.base_layer.weight = make(net()).base_model.model.up.base_layer.weight
    state = getattr(layer.base_layer, "state", None)
    if state is not None:  # bitsandbytes itself holds the weight of a Linear8bitLt here
        state.CB = None
    gc.collect()
    assert old() is None and storage.expired()


@pytest.mark.parametrize("how", ["copy", "merge", "replace"])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_that_was_read_in_inference_mode_can_train_afterwards(how, double):
    model, x = make(Net(compress_statistics=double)), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    model(x)
    if how == "copy":
        model = copy.deepcopy(model)
    elif how == "merge":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        for layer in fused_layers(model):
            layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert all(layer.lora_A["default"].weight.grad is not None for layer in fused_layers(model))


def test_parts_of_a_quant_state_that_are_replaced_are_read_in_the_next_call():
    model, x = make(Net(compress_statistics=True)), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    before = model(x)
    for layer in fused_layers(model):
        state = layer.base_layer.weight.quant_state
        state.offset, state.state2.absmax = state.offset * 3, state.state2.absmax * 2
    plain = copy.deepcopy(model)
    lora_kernels.unfuse(plain)
    assert not torch.allclose(model(x), before)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    state.state2.absmax = torch.ones(64)[::2][:1].expand(2)
    with pytest.raises(ValueError, match="the nested absmax of a quantised weight as a contiguous tensor"):
        model(x)


@pytest.mark.parametrize("net", [Net, Net8])
def test_copies_and_pickles_are_fused_and_unfuse_gives_back_what_was(net):
    model, x = make(net()), torch.randn(4, 64)
    before = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    lora_kernels.fuse(model)
    y = model(x)
    assert list(model.state_dict()) == keys or net is Net8  # the first forward of a Linear8bitLt moves SCB
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y) and [layer.fused_calls for layer in fused_layers(other)] == [2, 2]
    lora_kernels.fuse(model)
    lora_kernels.unfuse(model)
    assert {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()} == before


def test_reports_name_the_format_and_strict_changes_nothing():
    model = make()
    text = str(lora_kernels.fuse(model))
    assert "2 of 2 LoRA layers fused" in text and "64→128, nf4 in float32, default r=4" in text
    assert "64→128, int8 (x is not quantised), default r=4" in str(lora_kernels.fuse(make(Net8())))
    assert repr(model.base_model.model.up).startswith("lora.Linear4bit(\n  fused by lora_kernels\n")
    model = make(use_dora=True)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.lora_A["default"].register_forward_hook(lambda module, args, y: y)
    with pytest.raises(RuntimeError, match="has hooks, which the fused path would pass over"):
        lora_kernels.fuse(model, strict=True)
    assert not fused_layers(model)
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    lora_kernels.fuse(model)
    x = torch.randn(4, 64)
    assert torch.equal(model(x), plain(x)) and all(layer.passed_over for layer in fused_layers(model))


def test_what_is_not_served_says_why():
    class Twice(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    net = Net()
    net.down = Twice(128, 64, compute_dtype=FP32).to("cpu")
    net.up.register_forward_hook(lambda module, args, y: 2 * y)
    hooks, twice = lora_kernels.fuse(make(net)).not_fused.values()
    assert hooks.startswith("its base layer has hooks, which the fused path would pass over (a forward hook, ")
    assert twice.startswith("its base is a Twice with a forward of its own")
    assert all("anew in every call" in why for why in lora_kernels.fuse(make(Net8(True))).not_fused.values())
    model = make()
    lora_kernels.fuse(model, strict=True)
    up, _ = fused_layers(model)
    x = torch.randn(4, 64)
    for dtype, given in ((FP16, x.bfloat16()), (torch.float64, x), (FP32, x.double())):
        up.base_layer.compute_dtype = BF16 if given.dtype == BF16 else FP32
        up.lora_A.to(dtype), up.lora_B.to(dtype)
        reason = up.read(given)
        assert isinstance(reason, str) and str(given.dtype if dtype == FP32 else dtype) in reason
    net = Net()
    net.up = bnb.nn.Linear4bit(64, 128, compute_dtype=FP32)
    report = lora_kernels.fuse(make(net))
    assert len(report.fused) == 1 and "not quantised yet" in report.not_fused["base_model.model.up"]
    model = make()
    lora_kernels.fuse(model, backend="cuda")
    with pytest.raises(ValueError, match="cuda"):
        model(torch.randn(4, 64))


def test_enable_fuses_every_model_that_peft_makes():
    lora_kernels.enable()
    try:
        model = make()
    finally:
        lora_kernels.disable()
    x = torch.randn(4, 64)
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    torch.testing.assert_close(model(x), plain(x))
    assert [layer.fused_calls for layer in fused_layers(model)] == [1, 1] and not fused_layers(make())


@compiles_whole_models
def test_a_model_compiles_into_one_graph():
    model, x = make(), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    want = run(model, x)
    model.compile(backend="aot_eager", fullgraph=True)
    same(run(model, x), want)


def test_bitsandbytes_is_not_needed():
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch, lora_kernels; from peft import LoraConfig, get_peft_model\n"
        "m = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=['0']))\n"
        "assert len(lora_kernels.fuse(m).fused) == 1 and 'lora_kernels.peft.bnb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bias_of_lora_b_is_pefts_in_16_bits():
    """The bias of lora_B would be rounded to 16 bits. The report says so where compute_dtype shows it."""
    model = make(Net(compute_dtype=BF16), lora_bias=True, target_modules=["up"])
    why = f"lora_bias beside {BF16}: the sum of the two biases would be rounded to it"
    report = lora_kernels.fuse(model)
    assert list(report.not_fused.values()) == [why]
    model(torch.randn(5, 64, dtype=BF16))
    assert fused_layers(model)[0].passed_over == {why: 1}


@pytest.mark.parametrize("net", [Net, Net8])
def test_adapters_by_row_train_over_a_quantised_weight(net):
    """Each adapter has the gradients that it has alone on its samples."""
    model = make(net())
    model.add_adapter("second", config(r=2))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    lora_kernels.fuse(model.train(), strict=True)
    names, x = ["second", None, "default", "second"], torch.randn(4, 3, 64)
    with mixed(model, names):
        got = run(model, x)
    for name in ("default", "second"):
        mine = [j for j, each in enumerate(names) if each == name]
        model.base_model.set_adapter([name])
        want = run(model, x[mine])
        for key in ("y", "dx"):
            torch.testing.assert_close(got[key][mine], want[key], rtol=1e-4, atol=1e-5)
        grads = [key for key in want if f".{name}." in key]
        assert len(grads) == 4
        for key in grads:
            torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5 * want[key].abs().max().item())
    assert not any(layer.passed_over for layer in fused_layers(model))


def test_activated_lora_has_pefts_values_over_four_bits():
    model = make(alora_invocation_tokens=[1]).eval()
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.train()  # in evaluation mode bitsandbytes may compute in bf16
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    x, offsets = torch.randn(3, 5, 64), [2, None, 9]
    got, want = (each(x, alora_offsets=offsets) for each in (model, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))
