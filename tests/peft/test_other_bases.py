"""PEFT's layers over the layers of other packages, fused around their own forward: PEFT's values and gradients."""

from __future__ import annotations

import importlib
import itertools
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402
from support.peft_models import MaskOfSeed, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft.around import FusedAround  # noqa: E402

K, N = 64, 128


class StandIn(nn.Module):
    """A layer that stores W as int8 and multiplies by it in its own forward, as quantisers have it."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.infeatures, self.outfeatures = K, N, K, N
        for name in ("qweight", "codes", "weight"):
            self.register_buffer(name, torch.randint(-127, 128, (N, K), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(N, 1, dtype=dtype) / 500)

    def forward(self, x):
        return x @ (self.qweight.to(self.scale.dtype) * self.scale).t().to(x.dtype)


class Linear(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__(K, N, dtype=dtype)

    def forward(self, x):
        return super().forward(x).tanh()


class Net(nn.Module):
    def __init__(self, quantised, dtype=torch.float32) -> None:
        super().__init__()
        self.first, self.q, self.last = nn.Linear(K, K, dtype=dtype), quantised, nn.Linear(N, 5, dtype=dtype)

    def forward(self, x):
        return self.last(self.q(torch.tanh(self.first(x))))


def gptq(dtype):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=4, group_size=64, sym=True, desc_act=False, in_features=K, out_features=N, bias=False,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    layer.qweight.copy_(torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape).int())
    layer.scales.fill_(0.02)
    layer.qzeros.fill_(0x88888888 - 2**32)
    layer.post_init()
    return layer


def awq(dtype):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = AwqTorchLinear(
        bits=4, group_size=64, sym=True, desc_act=False, in_features=K, out_features=N, bias=False,
        register_buffers=True,
    )  # fmt: skip
    layer.qweight.copy_(torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape).int())
    layer.scales.fill_(0.02)
    layer.qzeros.fill_(0x88888888 - 2**32)
    layer.post_init()
    return layer


def hqq(dtype):
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(nn.Linear(K, N).requires_grad_(False), config, compute_dtype=dtype, device="cpu")


def torchao(dtype):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Sequential(nn.Linear(K, N, dtype=dtype))
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0]


def fp8(dtype):
    """transformers' layer, with its kernel, which a hub has, in torch operations."""
    from transformers.integrations import finegrained_fp8

    layer = finegrained_fp8.FP8Linear(K, N, block_size=(64, 64), has_bias=False)
    layer.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data.fill_(0.1)
    return layer.requires_grad_(False)


def _fp8_linear(x, weight, scale, block_size, bias, *_):
    from transformers.integrations import finegrained_fp8

    return nn.functional.linear(x, finegrained_fp8._dequantize_fp8_weight(weight, scale, block_size, x.dtype), bias)


PACKAGES = {"gptqmodel": gptq, "gptqmodel's AWQ": awq, "hqq": hqq, "torchao": torchao, "transformers": fp8}


@pytest.fixture(params=[*PACKAGES, "a forward of its own"])
def make(request, monkeypatch):
    """Makes a base layer in a dtype, of each package that is installed. Where the kernels could read its codes, they
    are kept from it: test_bases.py has what they compute."""
    name = request.param
    monkeypatch.setattr("lora_kernels.peft.codes.class_for", lambda kind, layer: None)
    if name == "a forward of its own":
        return Linear
    pytest.importorskip(name.partition("'")[0], reason=f"{name.partition(chr(39))[0]} is not installed")
    if name == "transformers":
        fp8_module = pytest.importorskip("transformers.integrations.finegrained_fp8")
        if not hasattr(fp8_module, "FP8LinearFunction"):
            pytest.skip("this version of transformers has no backward through its FP8Linear")
        monkeypatch.setattr(fp8_module, "fp8_linear", _fp8_linear)
    return PACKAGES[name]


def model_of(base, dtype=torch.float32, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's merge needs what a model of transformers has
        net = Net(base, dtype)
        model = get_peft_model(net, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q"]} | kwargs)))
    randomise(model)
    return model


def layer_of(model):
    return model.base_model.model.q


def rtol_of(model) -> float:
    """Return how near results are to PEFT's. gptqmodel's layers round x and dy to 16 bits, and a last bit of them
    may round to the other side."""
    return 2e-3 if type(layer_of(model).base_layer).__module__.startswith("gptqmodel.") else 1e-5


def compare(model, x, rtol=None):
    """Assert that the model computes PEFT's values and gradients on the fused path, and leave it fused."""
    rtol = rtol_of(model) if rtol is None else rtol
    want = run(model, x)
    report = lora_kernels.fuse(model, strict=True)
    assert "around" in report.fused["base_model.model.q"]
    same(run(model, x), want, rtol if x.numel() else None)
    layer = layer_of(model)
    assert isinstance(layer, FusedAround) and layer.fused_calls == 1 and not layer.passed_over


@pytest.mark.parametrize("shape", [(7, K), (2, 5, K), (0, K)])
def test_values_and_gradients_are_pefts(make, shape):
    compare(model_of(make(torch.float32)), torch.randn(shape))


def test_fp32_adapters_beside_sixteen_bits_are_served(make):
    model = model_of(make(torch.bfloat16), torch.bfloat16)
    assert layer_of(model).lora_A["default"].weight.dtype == torch.float32
    compare(model, torch.randn(6, K, dtype=torch.bfloat16), rtol=4 * torch.finfo(torch.bfloat16).eps)


def test_autocast_gives_pefts_dtypes(make):
    model, x = model_of(make(torch.float32)), torch.randn(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer_of(model)(x)
        lora_kernels.fuse(model, strict=True)
        got = layer_of(model)(x)
    assert got.dtype == want.dtype and layer_of(model).fused_calls == 1
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_dropout_is_pefts_with_our_mask(make, monkeypatch):
    model, x = model_of(make(torch.float32), lora_dropout=0.3).train(), torch.randn(6, K)
    seeds = map(torch.tensor, itertools.count(100))
    monkeypatch.setattr("lora_kernels.ops.around.draw_seed", lambda device: next(seeds))
    dropouts = layer_of(model).lora_dropout
    own, dropouts["default"] = dropouts["default"], MaskOfSeed(0.3, torch.tensor(100))
    want = run(model, x)
    dropouts["default"] = own
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want, rtol_of(model))
    assert next(seeds) == 101
    layer_of(model).eval()
    torch.testing.assert_close(model(x), model(x))
    assert next(seeds) == 102, "no seed is drawn where nothing is dropped"


def test_several_adapters_switched_and_disabled(make):
    model, x = model_of(make(torch.float32)), torch.randn(6, K)
    before = run(model, x)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q"]))
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        compare(model, x)
        lora_kernels.unfuse(model)
    with model.disable_adapter():
        want = model(x)
        lora_kernels.fuse(model, strict=True)
        torch.testing.assert_close(model(x), want)
    assert layer_of(model).fused_calls == 0 and not layer_of(model).passed_over
    lora_kernels.unfuse(model)
    model.base_model.set_adapter("default")
    same(run(model, x), before)
    assert type(layer_of(model)).__module__.startswith("peft.") and "_backend" not in layer_of(model).__dict__


def test_what_is_saved_has_no_mask_and_no_x_after_dropout(make):
    model = model_of(make(torch.float32), lora_dropout=0.1).train()
    x, layer = torch.randn(50, K, requires_grad=True), layer_of(model)

    def saved():
        known = [*layer.parameters(), *layer.buffers(), x]
        own = {t.untyped_storage().data_ptr() for t in known if type(t) in (torch.Tensor, nn.Parameter)}
        found: dict[int, int] = {}

        def keep(t):
            if type(t) is torch.Tensor and t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        sizes = []
        for enabled in (True, False):
            layer.enable_adapters(enabled)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = layer(x)  # what is saved must live until it is counted: its memory may be given out again
            sizes.append(sum(found.values()))
            found.clear()
            del y
        layer.enable_adapters(True)
        return sizes[0] - sizes[1]

    theirs = saved()
    lora_kernels.fuse(model, strict=True)
    assert saved() <= 4 * 50 * 4 + 64 < 4 * 50 * K <= theirs  # h and the seed


def test_a_variant_and_a_bias_are_left_to_peft_with_the_reason():
    for kwargs, why in (({"use_dora": True}, "is DoRA, which needs more"), ({"lora_bias": True}, "has lora_bias")):
        model, x = model_of(Linear(), **kwargs), torch.randn(4, K)
        want = run(model, x)
        report = lora_kernels.fuse(model)
        assert why in report.not_fused["base_model.model.q"]
        same(run(model, x), want)
        assert layer_of(model).fused_calls == 0 and why in next(iter(layer_of(model).passed_over))


def test_a_recomputation_draws_the_same_masks():
    model, x = model_of(Linear(), lora_dropout=0.3).train(), torch.randn(6, K, requires_grad=True)
    lora_kernels.fuse(model, strict=True)
    runs = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(1)
        y = call(x)
        a, b = (getattr(layer_of(model), name)["default"].weight for name in ("lora_A", "lora_B"))
        runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph():
    model, x = model_of(Linear()), torch.randn(6, K)
    lora_kernels.fuse(model, strict=True)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_further_arguments_are_left_to_peft():
    model, x = model_of(Linear()), torch.randn(4, K)
    lora_kernels.fuse(model, strict=True, verify=x)
    layer = layer_of(model).eval()
    layer(x, adapter_names=["default"] * 4)
    assert dict(layer.passed_over) == {"further arguments: adapter_names": 1} and layer.fused_calls == 0


def test_enable_and_copies_and_pickles():
    import pickle

    lora_kernels.enable()
    try:
        model, x = model_of(Linear()), torch.randn(4, K)
    finally:
        lora_kernels.disable()
    assert isinstance(layer_of(model), FusedAround)
    other = pickle.loads(pickle.dumps(layer_of(model)))
    assert torch.equal(other(x), layer_of(model)(x)) and type(other) is type(layer_of(model))


@pytest.fixture(params=["gptq", "awq", "aqlm", "eetq", "hqq", "inc", "torchao"])
def stand_in(request, monkeypatch):
    """A layer of PEFT's class for each package, over a layer of this file in the place of the package's."""
    name = request.param
    packages = {
        "eetq": {"eetq": {"EetqLinear": StandIn}},
        "hqq": {"hqq.core.quantize": {"HQQLinear": StandIn}, "hqq": {}, "hqq.core": {}},
        "torchao": {"torchao.quantization": {"Int4Tensor": type("Int4Tensor", (), {})}, "torchao": {}},
    }
    for module, attributes in packages.get(name, {}).items():
        made = types.ModuleType(module)
        made.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, module, made)
    found = importlib.import_module(f"peft.tuners.lora.{name}")
    again = name in ("eetq", "hqq", "inc")
    if again:
        before = dict(found.__dict__)
        monkeypatch.setattr(f"peft.import_utils.is_{name}_available", lambda: True)
        importlib.reload(found)
    kind = next(each for key, each in vars(found).items() if key.lower() == f"{name}loralinear")
    base = Linear() if name in ("inc", "torchao") else StandIn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"get_apply_tensor_subclass": None} if name == "torchao" else {}
        yield kind(base, "default", config=LoraConfig(r=4, lora_dropout=0.2), r=4, lora_alpha=6, **more)
    if again:
        found.__dict__.clear()
        found.__dict__.update(before)
        around = importlib.import_module("lora_kernels.peft.around")
        around.__dict__.pop(f"Fused{kind.__name__}", None)


def test_every_class_that_peft_dispatches_to_is_fused_around_its_base(stand_in):
    model, x = nn.Sequential(stand_in), torch.randn(3, 5, K)
    randomise(model)
    want = run(model.eval(), x)
    report = lora_kernels.fuse(model, strict=True)
    assert report.fused["0"].startswith(f"64→128, around {type(stand_in.base_layer).__name__}, default r=4")
    same(run(model, x), want, rtol=1e-5)
    assert stand_in.fused_calls == 1 and isinstance(stand_in, FusedAround)
    y = model.train()(x)
    assert stand_in.fused_calls == 2 and not torch.allclose(y, want["y"])
