"""Layers over 4 bits whose x is not in compute_dtype, as after `prepare_model_for_kbit_training` without autocast: the
base has x rounded to compute_dtype, and the adapter has all bits of x."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft", reason="PEFT is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from support.bnb_models import Net, make  # noqa: E402
from support.old_torch import compiles_whole_models  # noqa: E402
from support.peft_models import MaskOfSeed, config, fused_layers, randomise, run, same  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.ops.apart import lora_linear_apart  # noqa: E402
from lora_kernels.quant.bnb import from_bnb  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FP32, BF16), (FP32, FP16), (BF16, FP16), (FP16, BF16)]


class One(nn.Module):
    """One layer of 4 bits."""

    def __init__(self, dtype: torch.dtype, **kwargs) -> None:
        super().__init__()
        self.up = Net(compute_dtype=dtype, **kwargs).up
        self.is_loaded_in_4bit = True

    def forward(self, x, **kwargs):
        return self.up(x, **kwargs)


def one(dtype: torch.dtype = BF16, quant_type: str = "nf4", double: bool = False, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    net = One(dtype, quant_type=quant_type, compress_statistics=double)
    net.up.compute_type_is_set = (
        True  # as after a first call; bitsandbytes makes the dtype of the first x compute_dtype
    )
    return make(net, target_modules=["up"], **kwargs)


def closed_form(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return y and the gradients of `run` in fp64, with x rounded to compute_dtype for the base alone."""
    layer = copy.deepcopy(model.base_model.model.up)
    base, c = layer.base_layer, x.to(layer.base_layer.compute_dtype).double().requires_grad_()
    w, x = from_bnb(base).dequantize(torch.float64), x.double().requires_grad_()
    layer.lora_A.double(), layer.lora_B.double()
    y = c @ w.t() + (0 if base.bias is None else base.bias.double())
    for name in layer.active_adapters:
        y = y + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
    y.square().sum().backward()
    prefix = "base_model.model.up."
    grads = {prefix + name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad + c.grad} | grads


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((got[name].double() - t).norm() / t.norm()).item() for name, t in want.items()}


def served(model: nn.Module, calls: int = 1) -> None:
    for layer in fused_layers(model):
        assert layer.fused_calls == calls and not layer.passed_over, layer.passed_over


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize(("given", "dtype"), PAIRS)
def test_errors_are_no_larger_than_pefts(given, dtype, quant_type, double):
    model, x = one(dtype, quant_type, double), torch.randn(5, 7, 64).to(given)
    want = closed_form(model, x)
    plain, got = run(copy.deepcopy(model), x), None
    lora_kernels.fuse(model, strict=True)
    got = run(model, x)
    served(model)
    assert got.keys() == plain.keys() == want.keys() and len(want) == 4
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in plain.items()}
    theirs = errors(plain, want)
    for name, error in errors(got, want).items():
        assert error <= 1.25 * theirs[name] + 1e-6, (name, error, theirs[name])


@pytest.mark.parametrize("grad", [False, True])
def test_the_adapter_has_all_bits_of_x(grad):
    """Over W = 0 only the adapter is left, and fp32 has an error far below what a bf16 x would give."""
    model, x = one(), torch.randn(9, 64)
    base = model.base_model.model.up.base_layer
    base.weight.quant_state.absmax.zero_(), base.bias.data.zero_()
    lora_kernels.fuse(model, strict=True)
    with torch.set_grad_enabled(grad):
        y = model(x)
    served(model)
    layer = model.base_model.model.up
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = x.double() @ a.t() @ b.t() * layer.scaling["default"]
    assert (y - exact).norm() < 1e-6 * exact.norm()
    assert (x.bfloat16().double() @ a.t() @ b.t() * layer.scaling["default"] - exact).norm() > 1e-4 * exact.norm()


def test_without_gradients_y_is_that_with_them():
    model, x = one(lora_dropout=0.3), torch.randn(2, 3, 64)
    lora_kernels.fuse(model, strict=True)
    ys = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with mode():
            ys.append(model(x).clone())
    served(model, 3)
    assert all(torch.equal(y, ys[0]) for y in ys) and not torch.equal(model(x), ys[0])
    model.eval()
    torch.testing.assert_close(model(x.transpose(0, 1)), model(x).transpose(0, 1), rtol=1e-2, atol=1e-2)
    assert model(torch.randn(0, 64)).shape == (0, 128)


def test_dropout_is_pefts_with_our_mask(monkeypatch):
    model, x = one(lora_dropout=0.4), torch.randn(3, 5, 64)
    seeds = map(torch.tensor, itertools.count(7))
    monkeypatch.setattr("lora_kernels.ops.around.draw_seed", lambda device: next(seeds))
    plain = copy.deepcopy(model)
    plain.base_model.model.up.lora_dropout["default"] = MaskOfSeed(0.4, torch.tensor(7))
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), run(plain, x), 1e-2)
    served(model)


@pytest.mark.parametrize("kwargs", [{"lora_bias": True}, {"use_rslora": True}, {"bias": "all"}, {"use_dora": True}],
                         ids=str)  # fmt: skip
def test_settings_of_peft_are_honoured(kwargs):
    model, x = one(**kwargs), torch.randn(4, 3, 64)
    want = run(copy.deepcopy(model), x)
    if "bias" in kwargs:  # bitsandbytes makes the parameter itself bf16, which a fused forward leaves as it is
        name = "base_model.model.up.base_layer.bias"
        want[name] = want[name].float()
    lora_kernels.fuse(model)
    same(run(model, x), want, 1e-2)  # PEFT's base is rounded to bf16
    served(model)


def test_several_adapters_and_adapters_by_sample():
    model, x = one(), torch.randn(5, 3, 64)
    model.add_adapter("second", config(r=7, target_modules=["up"]))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    want = closed_form(model, x)
    theirs = errors(run(copy.deepcopy(model), x), want)
    model.eval(), model.base_model.model.up.base_layer.train()  # so that bitsandbytes does not pack the weight anew
    names = ["second", "__base__", "default", "second", "__base__"]
    with torch.no_grad():
        by_sample = model(x, adapter_names=names)
    model.train()
    lora_kernels.fuse(model, strict=True)
    got = run(model, x)
    assert len(got) == 6 and all(error <= 1.25 * theirs[name] + 1e-6 for name, error in errors(got, want).items())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=names), by_sample, rtol=1e-2, atol=1e-2)
    served(model, 2)


def test_a_checkpointed_forward_gives_the_same_gradients():
    model, x = one(lora_dropout=0.2), torch.randn(4, 64)
    lora_kernels.fuse(model, strict=True)
    torch.manual_seed(3)
    want = run(model, x)
    torch.manual_seed(3)
    got = run(lambda x: checkpoint(model, x, use_reentrant=False), x, of=model)
    assert all(torch.equal(got[name], t) for name, t in want.items())


class Pair(nn.Module):
    """Two layers that read the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(compute_dtype=BF16).up, Net(compute_dtype=BF16).up
        self.left.compute_type_is_set = self.right.compute_type_is_set = True
        self.is_loaded_in_4bit = True

    def forward(self, x):
        return self.left(x) + self.right(x)


def test_layers_of_a_group_compute_alone():
    model, x = make(Pair(), target_modules=["left", "right"]), torch.randn(3, 64)
    want = run(copy.deepcopy(model), x)
    report = lora_kernels.fuse(model, group=[("left", "right")])
    same(run(model, x), want, 1e-2)
    served(model)
    (shared,) = report.groups.values()
    assert shared.calls == 0 and any("in another dtype than its adapter" in why for why in shared.passed_over)


def test_another_autocast_is_left_to_peft_with_the_way_out():
    model, x = one(), torch.randn(3, 64)
    lora_kernels.fuse(model, strict=True)
    with torch.autocast("cpu", FP16):
        model(x)
    (why,) = model.base_model.model.up.passed_over
    assert "compute_dtype is torch.bfloat16, autocast asks for torch.float16" in why and "bnb_4bit_compute_dtype" in why


def test_a_vmapped_and_a_recorded_call_have_its_values():
    layer = one().base_model.model.up
    w = from_bnb(layer.base_layer)
    x, a, b = torch.randn(4, 3, 64), torch.randn(5, 64), torch.randn(128, 5)

    def call(x: Tensor) -> Tensor:
        return lora_linear_apart(x, w, a, b, dtype=BF16, scale=0.5)

    want = call(x)
    torch.testing.assert_close(torch.func.vmap(call)(x), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.jit.trace(call, x, check_trace=False)(x), want, rtol=1e-2, atol=1e-2)


@compiles_whole_models
@pytest.mark.slow
def test_a_model_compiles_into_one_graph():
    model, x = one(), torch.randn(3, 64)
    lora_kernels.fuse(model, strict=True)
    want = run(model, x)
    same(run(torch.compile(model, fullgraph=True), x, of=model), want, 1e-2)


def test_a_model_generates_after_prepare_model_for_kbit_training():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, **sizes)
    )
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            K, N = linear.in_features, linear.out_features
            made = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=BF16, quant_type="nf4")
            made.load_state_dict({"weight": linear.weight.data})
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.to("cpu"))
            made.compute_type_is_set = True
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, config(target_modules="all-linear"))
    randomise(model, 0.05)
    model.eval()
    fused, ids = copy.deepcopy(model), torch.randint(3, 60, (2, 6))
    lora_kernels.fuse(fused, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)
        tokens = fused.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 11) and len(fused_layers(fused)) == 7
    served(fused, 6)
