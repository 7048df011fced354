"""DoRA works under torch.compile, checkpointing and autocast, names bad input, and is a setting of the module."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch._inductor.config
from support import judging
from support.dora_problems import magnitude, trained
from support.judging import layer_results
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear
from lora_kernels.ops import dora
from lora_kernels.ops.dora import dora_linear

# --- compile, checkpointing, autocast ---


@pytest.mark.parametrize(("compiler", "p"), [("aot_eager", 0.0), ("aot_eager", 0.5), ("inductor", 0.5)])
@torch._inductor.config.patch(fallback_random=True)  # draws the seed from torch's generator, as without compiling
def test_a_compiled_layer_is_one_graph_and_follows_the_weight(p, compiler):
    layer, x = trained(16, 24, r=4, lora_dropout=p), torch.randn(6, 16)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=True)
    plain = layer_results(layer, x)
    assert len(plain) == 5
    torch.testing.assert_close(layer_results(layer, x, compiled), plain)
    with torch.no_grad():  # the compiled layer follows the weight too
        layer.weight.mul_(2)
    if compiler == "aot_eager":
        x = torch.randn(9, 16)
        torch.testing.assert_close(layer_results(layer, x, compiled), layer_results(layer, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    layer, x = trained(32, 24, r=4, lora_dropout=0.5), torch.randn(16, 32)
    plain = layer_results(layer, x)
    replayed = layer_results(layer, x, lambda t: checkpoint(layer, t, use_reentrant=use_reentrant))
    assert len(plain) == 5 and all(torch.equal(u, v) for u, v in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_and_fp32_gradients(dtype, p):
    layer, x = trained(32, 24, r=4, lora_dropout=p), torch.randn(16, 32, requires_grad=True)
    results = []
    for inside in (False, True):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
            if inside:
                y.float().square().sum().backward()
        if not inside:
            y.float().square().sum().backward()
        assert y.dtype == dtype and {t.grad.dtype for t in (x, layer.lora_A, layer.lora_magnitude_vector)} == {
            torch.float32
        }
        results.append([y.detach(), x.grad, layer.lora_A.grad.clone(), layer.lora_magnitude_vector.grad.clone()])
    assert all(torch.equal(u, v) for u, v in zip(*results, strict=True))
    torch.manual_seed(3)
    torch.testing.assert_close(results[0][0].float(), layer(x), rtol=0.03, atol=0.05)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_output_is_the_same_with_and_without_gradients(p):
    layer, x = trained(32, 24, r=4, lora_dropout=p), torch.randn(2, 3, 32)
    outputs = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with context():
            outputs.append(layer(x))
    assert all(torch.equal(y.detach(), outputs[0].detach()) for y in outputs)
    assert outputs[0].requires_grad and not outputs[1].requires_grad
    layer = trained(32, 24, r=4)
    with torch.inference_mode():  # fills the cache of ‖W‖²
        layer(x)
    layer(x).sum().backward()


def test_double_backward_is_refused():
    q = judging.problem(4, 5, 6, 2)
    x, m = q.x.requires_grad_(), magnitude(q).requires_grad_()
    y = dora_linear(x, q.w, q.a, q.b, m, scale=1.0)
    (dx,) = torch.autograd.grad(y, (x,), q.dy, create_graph=True)
    with pytest.raises(RuntimeError, match="dora_linear has no double backward"):
        dx.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="dora_linear has no double backward"):
        torch.autograd.grad(dx.sum(), m, allow_unused=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"magnitude": torch.ones(4)}, ValueError, r"magnitude must be \[N\].*\(5, 8\).*\(4,\)"),
        ({"magnitude": torch.ones(5, 1)}, ValueError, r"\(5, 1\)"),
        ({"magnitude": torch.ones(5, device="meta")}, ValueError, "on meta"),
        ({"magnitude": torch.ones(5).double()}, TypeError, "fp32; got torch.float64"),
        ({"magnitude": torch.ones(5).half()}, TypeError, "torch.float16"),
        ({"scale": math.inf}, ValueError, "finite"),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot serve"),
        ({"dropout_p": 1.0}, ValueError, "got 1.0"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    given = {"magnitude": torch.ones(5), "scale": 1.0} | changes
    with pytest.raises(error, match=f"(?s){message}"):
        dora_linear(torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), **given)


# --- the module ---


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_a_fresh_module_computes_its_base(dtypes):
    """d is exactly 1, so merging changes no bit of W."""
    base, x = nn.Linear(70, 1100, dtype=dtypes[0]), torch.randn(4, 70, dtype=dtypes[0])
    layer = FusedLoRALinear.from_linear(base, r=3, use_dora=True, adapter_dtype=dtypes[1])
    lora = FusedLoRALinear.from_linear(base, r=3, adapter_dtype=dtypes[1])
    torch.testing.assert_close(layer(x), lora(x))
    norm = dora.weight_norm(layer.weight, layer.lora_A, layer.lora_B, 2.0, layer.lora_magnitude_vector)
    assert torch.equal(norm, layer.lora_magnitude_vector) and norm.dtype == dtypes[1]
    before = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, before)


def test_the_adapter_and_its_magnitude_train_and_repr_shows_dora():
    layer = FusedLoRALinear(8, 5, r=3, use_dora=True)
    trains = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trains == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert "use_dora=True" in repr(layer) and "use_dora" not in repr(FusedLoRALinear(8, 5))
    assert set(layer.state_dict()) == {"weight", "bias", *trains}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    layer, x = trained(70, 600, r=4, dtype=dtype), torch.randn(3, 70, dtype=dtype)
    before, y = layer.weight.clone(), layer(x)
    v = before.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    norm = dora.weight_norm(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.lora_magnitude_vector)
    exact = torch.linalg.vector_norm(v, dim=1)
    torch.testing.assert_close(norm.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    d = layer.lora_magnitude_vector.float() / norm.float()
    layer.merge()
    assert layer.merged and torch.equal(layer.weight, (d.double()[:, None] * v).to(dtype))
    torch.testing.assert_close(layer(x), y, rtol=0.05, atol=0.2 if dtype != torch.float32 else 1e-4)
    assert torch.equal(layer.to_linear().weight, layer.weight)
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), y)


def test_reset_adapter_unmerges_and_makes_the_magnitude_the_norm():
    layer = trained(8, 5, r=2)
    layer.merge()
    layer.reset_adapter()
    assert not layer.merged and layer.lora_B.count_nonzero() == 0
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), torch.linalg.vector_norm(layer.weight, dim=1))


def test_state_dict_deepcopy_and_pickle_give_the_same_layer():
    layer, x = trained(6, 5, r=2).eval(), torch.randn(3, 6)
    y = layer(x)
    other = FusedLoRALinear(6, 5, r=2, use_dora=True)
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for same in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(same(x), y)
    incomplete = {key: t for key, t in layer.state_dict().items() if key != "lora_magnitude_vector"}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_magnitude_vector"):
        other.load_state_dict(incomplete)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_magnitude_vector"):
        FusedLoRALinear(6, 5, r=2).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_a_new_magnitude_follows_a_loaded_linear_and_a_trained_one_stays(merged):
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer = FusedLoRALinear(6, 5, r=2, use_dora=True)
    if merged:
        layer.merge()
    layer.load_state_dict(base.state_dict())
    torch.testing.assert_close(layer(x), base(x))
    layer = trained(6, 5, r=2)
    m = layer.lora_magnitude_vector.clone()
    layer.load_state_dict(base.state_dict())
    assert torch.equal(layer.lora_magnitude_vector, m)


def test_a_layer_from_the_meta_device_can_be_filled():
    layer = FusedLoRALinear(6, 5, r=2, use_dora=True, device="meta")
    assert layer(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 5)
    layer.load_state_dict(trained(6, 5, r=2).state_dict(), assign=True)
    assert torch.isfinite(layer(torch.randn(2, 6))).all()
    layer = FusedLoRALinear(6, 5, r=2, use_dora=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(2, 6))).all()


def test_a_layer_learns_another_layer_of_its_rank():
    torch.manual_seed(1)
    layer, x = FusedLoRALinear(12, 10, r=2, lora_alpha=2, use_dora=True), torch.randn(256, 12)
    target = trained(12, 10, r=2, lora_alpha=2)
    target.load_state_dict({**target.state_dict(), "weight": layer.weight, "bias": layer.bias})
    target = target(x).detach()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    first = None
    for _ in range(300):
        loss = nn.functional.mse_loss(layer(x), target)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * first
