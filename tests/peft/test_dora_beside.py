"""DoRA over a Conv1D, and DoRA beside other active adapters of one layer, on the fused path."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import PeftModel  # noqa: E402
from support.peft_models import (  # noqa: E402
    Conv1DNet,
    MaskOfSeed,
    Net,
    config,
    fused_equals_peft,
    fused_layers,
    make,
    run,
    same,
)

import lora_kernels  # noqa: E402

ORDERS = ["dp", "pd", "ppd", "dpp", "dd", "pdpd"]
"""Active adapters in their order: p for plain LoRA, d for DoRA."""
every_order = pytest.mark.parametrize("order", ORDERS)


def beside(order: str, dtype: torch.dtype = torch.float64, p: float = 0.0, net: type[nn.Module] = Net) -> PeftModel:
    """Return a model with active adapters "0", "1", ..., each of another rank, whose magnitudes are not the norms."""
    torch.manual_seed(0)
    kwargs = {"lora_dropout": p, "fan_in_fan_out": net is Conv1DNet}
    model = make(dtype, net, use_dora=order[0] == "d", r=2, **kwargs)
    for i, kind in enumerate(order[1:]):
        model.add_adapter(str(i + 1), config(use_dora=kind == "d", r=3 + i, **kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
            elif "magnitude" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
    names = ["default", *(str(i) for i in range(1, len(order)))]
    model.base_model.set_adapter(names)
    return model.train()


@every_order
def test_values_and_all_gradients_are_pefts(order: str):
    fused_equals_peft(beside(order), torch.randn(2, 5, 24, dtype=torch.float64))


@every_order
def test_the_result_is_that_of_the_formula_and_of_merged_weights(order: str):
    """The oracle is a weight in fp64, which every DoRA scales with all that came before it."""
    model = beside(order).eval()
    layer, x = model.base_model.model.up, torch.randn(4, 24, dtype=torch.float64)
    w = layer.base_layer.weight.detach()
    total = w.clone()
    for name, kind in zip(layer.active_adapters, order, strict=True):
        update = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        total = total + update
        if kind == "d":
            total = (layer.lora_magnitude_vector[name].weight / (w + update).norm(dim=1))[:, None] * total
    lora_kernels.fuse(model, strict=True)
    torch.testing.assert_close(layer(x), F.linear(x, total, layer.base_layer.bias))
    if not hasattr(type(layer), "_unmerged_base_weight"):
        return  # before PEFT 0.21, merging takes the norm of what was merged before
    want = model(torch.tanh(x))
    model.merge_adapter()
    torch.testing.assert_close(model(torch.tanh(x)), want)


@every_order
def test_dropout_of_every_adapter_is_pefts_with_the_same_masks(order: str, monkeypatch: pytest.MonkeyPatch):
    """In training each adapter has a mask of its own, and DoRA does not scale what the adapters before it added."""
    model, x = beside(order, p=0.3), torch.randn(6, 24, dtype=torch.float64)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True, backend="eager")
    first = [torch.tensor(100), torch.tensor(101)]
    drawn = iter(first)
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: next(drawn))

    monkeypatch.setattr("lora_kernels.ops.around.draw_seed", lambda device: torch.tensor(7))

    class Same(nn.Dropout):
        """The mask of a further DoRA, which is torch's."""

        def forward(self, x: Tensor) -> Tensor:
            return masked(x)

    def masked(x: Tensor, *_: object, **__: object) -> Tensor:
        return x * (torch.arange(x.shape[-1]) % 3 > 0)

    for seed, layer in zip(first, (plain.base_model.model.up, plain.base_model.model.down), strict=True):
        for name, kind in zip(layer.active_adapters, order, strict=True):
            layer.lora_dropout[name] = Same(0.3) if kind == "d" else MaskOfSeed(0.3, torch.tensor(7))
        layer.lora_dropout["default"] = MaskOfSeed(0.3, seed)
    want = run(plain, x)
    monkeypatch.setattr("lora_kernels.peft.several.F.dropout", masked)
    same(run(model, x), want)
    assert all(layer.fused_calls == 1 and not layer.passed_over for layer in fused_layers(model))


@every_order
def test_evaluation_with_dropout_is_pefts(order: str):
    fused_equals_peft(beside(order, p=0.3).eval(), torch.randn(6, 24, dtype=torch.float64))


@pytest.mark.parametrize("order", ["dp", "pd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bits_are_as_near_to_the_truth_as_pefts(order: str, dtype: torch.dtype, adapters: str):
    model = beside(order, dtype)
    if adapters == "same":
        model.to(dtype)
    x, dy = torch.randn(64, 24, dtype=dtype), torch.randn(64, 40, dtype=dtype)
    exact = copy.deepcopy(model).double()
    truth, theirs = layer_run(exact, x.double(), dy.double()), layer_run(model, x, dy)
    lora_kernels.fuse(model, strict=True)
    ours = layer_run(model, x, dy)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, want in truth.items():
        assert ours[name].dtype == theirs[name].dtype
        mine, its = (float((each[name].double() - want).norm()) for each in (ours, theirs))
        assert mine <= 1.5 * its + 0.1 * torch.finfo(dtype).eps * float(want.norm()), (name, mine, its)


def layer_run(model: PeftModel, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return y of the first layer, and every gradient for a dy."""
    layer = model.base_model.model.up
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def test_autocast_gives_pefts_values_and_dtypes():
    model, x = beside("pdp", torch.float32), torch.randn(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, x)
        lora_kernels.fuse(model, strict=True)
        got = run(model, x)
    same(got, want, rtol=0.03)
    assert all(layer.fused_calls == 1 for layer in fused_layers(model))


def test_a_compiled_model_gives_the_same_values_and_gradients():
    model, x = beside("dp", torch.float32), torch.randn(4, 24)
    lora_kernels.fuse(model, strict=True)
    want = run(model, x)
    torch._dynamo.reset()
    same(run(torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True), x, of=model), want)


def test_a_scaling_that_is_a_tensor_is_pefts():
    model, x = beside("pd"), torch.randn(4, 24, dtype=torch.float64)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.scaling["1"] = torch.tensor(0.7, dtype=torch.float64)
    fused_equals_peft(model, x)


def test_nothing_of_the_size_of_w_is_made_for_dora_beside_plain_lora():
    """PEFT forms a unit matrix [K, K] and B A [N, K]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor) and not any(t is each for each in args):
                    own = t.untyped_storage().data_ptr()
                    if own not in known:
                        made.append(t.numel())
            return out

    torch.manual_seed(0)
    model = beside("pd", torch.float32)
    lora_kernels.fuse(model, strict=True)
    layer, x = model.base_model.model.up, torch.randn(3, 24, requires_grad=True)
    known, made = {p.untyped_storage().data_ptr() for p in layer.parameters()}, list[int]()
    with Sizes():
        layer(x).sum().backward()
    assert made and max(made) < 24 * 24


def test_dora_beside_others_whose_dropout_is_off_in_training_is_left_to_peft():
    """PEFT then adds (d - 1) ⊙ x Wᵀ as with dropout, and the fused path would scale the other adapters too."""
    model, x = beside("pd", torch.float32, p=0.3), torch.randn(4, 24)
    lora_kernels.fuse(model)
    for layer in fused_layers(model):
        for dropout in layer.lora_dropout.values():
            dropout.p = 0.0
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))
    why = "a DoRA adapter beside others, whose dropout drops nothing while the layer is in training mode"
    assert all(layer.passed_over == {why: 1} for layer in fused_layers(model))


def test_rows_of_their_own_with_dora_are_left_to_peft():
    model, x = beside("dp", torch.float32).eval(), torch.randn(2, 24)
    lora_kernels.fuse(model)
    with pytest.raises(RuntimeError, match="a DoRA adapter beside others"), lora_kernels.mixed(model, ["default", "1"]):
        model(x)
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        model(x, adapter_names=["default", "1"])


def test_several_dora_adapters_in_16_bits_are_left_to_peft():
    """The second would scale the y of the first, and its gradient would be rounded to 16 bits."""
    model, x = beside("dd", torch.bfloat16), torch.randn(2, 24, dtype=torch.bfloat16)
    lora_kernels.fuse(model)
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))
    assert all(layer.passed_over == {"several DoRA adapters in 16 bits": 1} for layer in fused_layers(model))


def test_biases_of_adapters_before_dora_are_scaled_as_in_peft():
    torch.manual_seed(0)
    model = make(torch.float64, target_modules=["up"], lora_bias=True)
    model.add_adapter("1", config(use_dora=True, target_modules=["up"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.rand_like(parameter))
    model.base_model.set_adapter(["default", "1"])
    fused_equals_peft(model.train(), torch.randn(5, 24, dtype=torch.float64))


def test_a_traced_layer_gives_the_same_values():
    """torch.export records plain torch operations."""
    model, x = beside("pd", torch.float32).eval(), torch.randn(3, 24)
    lora_kernels.fuse(model, strict=True)
    layer = model.base_model.model.up
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=False).module()
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dora_over_a_conv1d_is_pefts(dtype: torch.dtype):
    model, x = make(dtype, Conv1DNet, use_dora=True, fan_in_fan_out=True), torch.randn(5, 24, dtype=dtype)
    with torch.no_grad():
        for layer in (model.base_model.model.up, model.base_model.model.down):
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.mul_(0.5 + torch.rand_like(magnitude))
            layer.base_layer.bias.normal_()
    rtol = {torch.float64: None, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    fused_equals_peft(model, x, rtol=rtol)
    want = model.eval()(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("order", ["pd", "dp"])
def test_dora_beside_others_over_a_conv1d_is_pefts(order: str):
    fused_equals_peft(beside(order, net=Conv1DNet), torch.randn(5, 24, dtype=torch.float64))


def test_nothing_of_the_masks_of_several_adapters_is_saved():
    """The forward saves x once, and for each adapter h and its seed."""
    model, x = beside("ppp", torch.float32, p=0.3), torch.randn(50, 24, requires_grad=True)
    lora_kernels.fuse(model, strict=True, backend="eager")
    layer, kept = model.base_model.model.up, dict[int, Tensor]()
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    sizes = sorted(t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters)
    assert sizes == sorted([8, 8, 8, 50 * 2 * 4, 50 * 3 * 4, 50 * 4 * 4, 50 * 24 * 4])
    del y
