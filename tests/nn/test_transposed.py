"""`FusedLoRAConv1D` takes the place of GPT-2's Conv1D: values, merging, state_dict, ties, copies and refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.pytorch_utils import Conv1D

from lora_kernels import FusedLoRAConv1D, FusedLoRALinear
from lora_kernels.nn.parallel import ColwiseLoRA
from lora_kernels.nn.settings import LoRASettings

every_kind = pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}], ids=["lora", "dora"])


def conv(out: int = 40, into: int = 24, dtype: torch.dtype = torch.float32) -> Conv1D:
    made = Conv1D(out, into).to(dtype)
    nn.init.normal_(made.bias)
    nn.init.normal_(made.weight, std=0.3)
    return made


def trained(base: nn.Module | None = None, **kwargs: Any) -> FusedLoRAConv1D:
    """Return a layer whose adapter is not zero, and whose magnitude is not the norm."""
    layer = FusedLoRAConv1D.from_conv1d(conv() if base is None else base, **{"r": 3, **kwargs})
    nn.init.normal_(layer.lora_B, std=0.3)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(0.5 + torch.rand_like(layer.lora_magnitude_vector))
    return layer


def whole(layer: FusedLoRAConv1D) -> Tensor:
    """Return the [in, out] weight of the layer and its adapter in fp64, as the papers define it."""
    w = layer.weight.detach().double().T + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()
    if layer.use_dora:
        w *= (layer.lora_magnitude_vector.detach().double() / w.norm(dim=1))[:, None]
    return w.T


@every_kind
def test_a_fresh_layer_computes_what_its_conv1d_does_and_shares_its_parameters(kwargs):
    base, x = conv(), torch.randn(2, 5, 24)
    weight, want = base.weight, base(x).detach()
    layer = FusedLoRAConv1D.from_conv1d(base, r=3, **kwargs)
    assert layer.weight is weight and layer.bias is base.bias and not weight.requires_grad
    assert (layer.in_features, layer.out_features, layer.nx, layer.nf) == (24, 40, 24, 40)
    assert layer.lora_A.shape == (3, 24) and layer.lora_B.shape == (40, 3)
    torch.testing.assert_close(layer(x), want)


@every_kind
@pytest.mark.parametrize("rows", [(7, 24), (2, 3, 24), (0, 24), (24,)], ids=str)
def test_values_and_all_gradients_are_those_of_the_equation_in_fp64(kwargs, rows):
    layer = trained(conv(dtype=torch.float64), **kwargs)
    x, dy = torch.randn(rows, dtype=torch.float64, requires_grad=True), torch.randn(*rows[:-1], 40, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    leaves = {name: getattr(layer, name).detach().clone().requires_grad_() for name in names}
    x_leaf, w = x.detach().clone().requires_grad_(), layer.weight.detach()
    update = layer.scaling * (leaves["lora_B"] @ leaves["lora_A"]).T
    total = w + update
    if layer.use_dora:  # the norm is a constant for autograd
        total = total * (leaves["lora_magnitude_vector"] / total.detach().norm(dim=0))
    want = x_leaf @ total + layer.bias.detach()
    want.backward(dy)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(x.grad, x_leaf.grad)
    for name in names:
        torch.testing.assert_close(getattr(layer, name).grad, leaves[name].grad, msg=lambda t, name=name: f"{name} {t}")


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_near_the_equation_and_adapters_are_fp32(kwargs, dtype):
    layer, x = trained(conv(dtype=dtype), **kwargs), torch.randn(9, 24, dtype=dtype)
    want = x.double() @ whole(layer) + layer.bias.double()
    y = layer(x)
    assert layer.lora_A.dtype == torch.float32 and y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_values_are_those_of_a_fused_linear_over_the_transposed_weight(monkeypatch):
    """With dropout too: the mask is of x, and depends on the seed alone."""
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: torch.tensor(7))
    layer = trained(lora_dropout=0.4)
    linear = nn.Linear(24, 40)
    linear.weight.data, linear.bias.data = layer.weight.t().contiguous(), layer.bias.data
    other = FusedLoRALinear.from_linear(linear, r=3, lora_dropout=0.4)
    other.lora_A.data, other.lora_B.data = layer.lora_A.data, layer.lora_B.data
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), other(x))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_keeps_the_layout_and_unmerge_restores_the_parameter(kwargs, dtype):
    layer, x = trained(conv(dtype=dtype), **kwargs), torch.randn(5, 24, dtype=dtype)
    base, y, exact = layer.weight, layer(x), whole(layer)
    layer.eval().merge()
    assert layer.merged and layer.weight.shape == (24, 40) and layer.weight.is_contiguous()
    if not layer.use_dora:
        assert torch.equal(layer.weight, exact.to(dtype))
    torch.testing.assert_close(layer.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer(x), y, **tolerance)
    assert torch.equal(layer.state_dict()["weight"], base), "a state_dict holds the base"
    layer.unmerge()
    assert layer.weight is base and torch.equal(layer(x), y)


def test_a_merged_square_layer_runs_again_and_again_without_taking_its_transpose_for_w():
    layer, x = trained(conv(24, 24)), torch.randn(5, 24)
    layer.eval().merge()
    y = layer(x)
    assert torch.equal(layer(x), y)
    torch.testing.assert_close(y, (x.double() @ layer.weight.double() + layer.bias.double()).float())
    assert layer._merged_as is layer.weight
    layer._parameters["weight"] = layer._base  # as other code does that loads the weights of a state_dict
    with pytest.raises(ValueError, match="its weight is W without the adapter"):
        layer(x)


@every_kind
def test_to_plain_is_a_conv1d_and_to_linear_an_nn_linear_with_the_same_values(kwargs):
    layer, x = trained(**kwargs).eval(), torch.randn(5, 24)
    for merged in (False, True):
        if merged:
            layer.merge()
        plain, linear = layer.to_plain(), layer.to_linear()
        assert type(plain) is Conv1D and type(linear) is nn.Linear and not plain.training
        assert plain.weight.shape == (24, 40) and plain.nf == 40 and plain.nx == 24
        assert plain.bias is not layer.bias and plain.weight.untyped_storage().data_ptr() != layer.weight.data_ptr()
        for each in (plain, linear):
            torch.testing.assert_close(each(x), layer(x))


def test_a_layer_without_bias_becomes_a_conv1d_whose_bias_is_zero():
    layer = FusedLoRAConv1D(6, 5, bias=False, r=2)
    assert layer.bias is None and layer.weight.shape == (6, 5)
    plain, x = layer.to_plain(), torch.randn(3, 6)
    assert not plain.bias.any()
    torch.testing.assert_close(plain(x), x @ layer.weight)


def test_a_new_layer_starts_as_a_conv1d_does():
    torch.manual_seed(0)
    layer = FusedLoRAConv1D(200, 300, r=2)
    assert layer.weight.shape == (200, 300) and not layer.bias.any() and not layer.lora_B.any()
    assert abs(layer.weight.std().item() - 0.02) < 1e-3 and not layer.weight.requires_grad


@every_kind
def test_the_state_dict_of_a_conv1d_loads_and_ours_has_its_shapes(kwargs):
    layer, base, x = FusedLoRAConv1D.from_conv1d(conv(), r=3, **kwargs), conv(), torch.randn(5, 24)
    layer.load_state_dict(base.state_dict())
    torch.testing.assert_close(layer(x), base(x))
    state = layer.state_dict()
    assert all(state[name].shape == value.shape for name, value in base.state_dict().items())
    other = trained(**kwargs)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Linear(24, 40).state_dict())


def test_a_tied_weight_stays_tied():
    table, base = nn.Embedding(24, 40), Conv1D(40, 24)
    base.weight = table.weight
    layer = trained(base)
    assert layer.weight is table.weight
    before = table.weight.clone()
    layer.merge()
    assert torch.equal(table.weight, before) and layer.weight is not table.weight
    layer.unmerge()
    assert layer.weight is table.weight


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_splits_w_keeps_the_function_and_the_layout(init):
    base, x = conv(), torch.randn(5, 24)
    want = base(x)
    layer = FusedLoRAConv1D.from_conv1d(base, r=3, init=init)
    assert layer.weight.shape == (24, 40) and layer.weight.is_contiguous() and layer.lora_B.any()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@every_kind
def test_copies_pickles_and_conversions_compute_the_same(kwargs):
    layer, x = trained(**kwargs), torch.randn(5, 24)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
        assert torch.equal(other(x), want)


@every_kind
def test_a_compiled_layer_is_one_graph_with_the_same_gradients(kwargs):
    layer, x = trained(**kwargs), torch.randn(5, 24)
    results = []
    torch._dynamo.reset()
    for each in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        each(x).square().sum().backward()
        results.append([p.grad for p in layer.parameters() if p.grad is not None])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_mask(reentrant):
    layer, x = trained(lora_dropout=0.5), torch.randn(5, 24, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        layer.zero_grad()
        call(x).square().sum().backward()
        grads.append(layer.lora_A.grad)
    torch.testing.assert_close(*grads)


def test_no_copy_of_w_is_saved_and_none_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    made = list[int]()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != own:
                made.append(out.numel())
            return out

    layer, x = trained(), torch.randn(2, 24, requires_grad=True)
    own = layer.weight.untyped_storage().data_ptr()
    with Sizes():
        layer(x).sum().backward()
    assert made and max(made) < 24 * 40


def test_reset_parameters_and_the_meta_device_give_first_values():
    with torch.device("meta"):
        layer = FusedLoRAConv1D(24, 40, r=3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.weight.shape == (24, 40) and torch.isfinite(layer(torch.randn(2, 24))).all() and not layer.lora_B.any()


class OwnForward(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked() -> Conv1D:
    base = conv()
    base.register_forward_hook(lambda *_: None)
    return base


def parametrised() -> Conv1D:
    base = conv()
    nn.utils.parametrizations.weight_norm(base)
    return base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 3), "must be a Conv1D of transformers, and is a torch.nn.modules.linear.Linear"),
        (lambda: OwnForward(3, 3), "must be a Conv1D of transformers, and is a .*OwnForward"),
        (lambda: nn.Conv1d(3, 3, 1), "must be a Conv1D of transformers"),
        (hooked, "this Conv1D has hooks"),
        (parametrised, "must be a Conv1D of transformers|not a plain Parameter"),
    ],
)
def test_other_modules_are_refused_with_the_reason(make, message):
    base = make()
    with pytest.raises(TypeError, match=message):
        FusedLoRAConv1D.from_conv1d(base)
    assert FusedLoRAConv1D.why_not(base)


def test_what_is_not_for_a_conv1d_is_refused():
    with pytest.raises(ValueError, match="quant='nf4' is not for a Conv1D"):
        FusedLoRAConv1D.from_settings(conv(), LoRASettings(quant="nf4"))
    with pytest.raises(ValueError, match="r must be an integer"):
        FusedLoRAConv1D.from_conv1d(conv(), r=0)
    with pytest.raises(TypeError, match="Conv1D with a forward of its own"):
        FusedLoRALinear.from_linear(conv())
    assert "FusedLoRAConv1D takes its place" in FusedLoRALinear.why_not(conv())
    assert not FusedLoRAConv1D.why_not(conv())


def test_a_tensor_parallel_plan_refuses_it():
    with pytest.raises(TypeError, match="a FusedLoRAConv1D stores its weight"):
        ColwiseLoRA()._partition_linear_fn("", trained(), None)


def test_the_parts_of_a_file_are_those_of_a_linear_layer():
    layer = trained(use_dora=True)
    parts = layer.file_parts()
    assert {key: part.shape for key, part in parts.items()} == {
        "lora_A.weight": (3, 24),
        "lora_B.weight": (40, 3),
        "lora_magnitude_vector": (40,),
    }
    assert layer.size == "24 → 40"
