"""PEFT's LoRA over nn.MultiheadAttention on the fused path: PEFT's values and gradients, without touching W."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.attention_problems import masks, padding
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import attention as fused_attention  # noqa: E402
from lora_kernels.peft.attention import FusedMultiheadAttention  # noqa: E402

B, L, E, H = 2, 5, 12, 3


class Block(nn.Module):
    """A block as open_clip and torchvision's ViT have it."""

    def __init__(self, dtype=torch.float32, batch_first=True, **kwargs) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(E, dtype=dtype)
        self.attn = nn.MultiheadAttention(E, H, batch_first=batch_first, dtype=dtype, **kwargs)
        self.fc, self.proj = nn.Linear(E, 2 * E, dtype=dtype), nn.Linear(2 * E, E, dtype=dtype)

    def forward(self, x, key=None, **flags):
        normed = self.ln(x)
        key = normed if key is None else key
        y, weights = self.attn(normed, key, key, **flags)
        x = x + y
        x = x + self.proj(nn.functional.gelu(self.fc(x)))
        return x if weights is None else (x, weights)


def make(dtype=torch.float32, *, targets=("attn", "fc"), config=None, **kwargs) -> PeftModel:
    """Return a PEFT model whose adapters differ from zero."""
    model = get_peft_model(
        Block(dtype, **kwargs), LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **(config or {}))
    )
    return randomised(model)


def randomised(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    return model


def run(model, x, **kwargs) -> dict[str, torch.Tensor]:
    """Return y, the attention weights if there are any, and every gradient."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x, **kwargs)
    y, weights = out if isinstance(out, tuple) else (out, None)
    (y.square().sum() + (0 if weights is None else weights.square().sum())).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | ({} if weights is None else {"weights": weights.detach()}) | grads


def test_a_model_that_peft_has_run_in_inference_mode_can_be_trained():
    """PEFT's forward leaves weights of inference mode behind, which autograd cannot save."""
    model, x = make(torch.float64), torch.randn(B, L, E, dtype=torch.float64)
    with torch.inference_mode():
        model(x)
    layer = model.base_model.model.attn
    assert layer.base_layer.in_proj_weight.is_inference()
    want = run(copy.deepcopy(model), x)
    lora_kernels.fuse(model, strict=True)
    with torch.no_grad():
        model(x)
    for _ in range(2):
        got = run(model, x)
        assert got.keys() == want.keys()
        torch.testing.assert_close(got, want)
    assert (layer.fused_calls, sum(layer.passed_over.values())) == (2, 1)


def same(got, want) -> None:
    """Assert that `got` holds what `want` holds."""
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def layer_of(model) -> FusedMultiheadAttention:
    return model.base_model.model.attn


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_values_and_gradients_are_pefts_for_all_flags(kwargs, batch_first):
    model = make(torch.float64, batch_first=batch_first, config={"bias": "all"}, **kwargs).double()
    fused = copy.deepcopy(model)
    report = lora_kernels.fuse(fused, strict=True)
    assert len(report.fused) == 3 and not report.not_fused
    shape = (B, L, E) if batch_first else (L, B, E)
    x, key = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    calls = 0
    for mask, pad, need_weights in (
        ("none", "none", False), ("none", "none", True), ("bool2", "none", True), ("float2", "float", False),
        ("bool3", "bool", False), ("float3", "none", True), ("causal", "none", False), ("causal", "bool", False),
    ):  # fmt: skip
        flags = {
            "attn_mask": masks(mask, B, H, L, L, torch.float64),
            "key_padding_mask": padding(pad, B, L, torch.float64),
            "need_weights": need_weights,
            "is_causal": mask == "causal",
            "average_attn_weights": mask != "bool2",
        }
        for other in (None, key):
            want, got = (run(each, x, key=other, **flags) for each in (model, fused))
            calls += 1
            assert got.keys() == want.keys() and len(got) > 10
            same(got, want)
    assert layer_of(fused).fused_calls == calls and not layer_of(fused).passed_over


def test_the_update_of_out_proj_counts_as_often_as_in_pefts_merged_model():
    """PEFT 0.19 to 0.21 merge it twice, in the forward and in merge_and_unload, and its gradients are of one."""
    model, x = make(), torch.randn(B, L, E)
    lora_kernels.fuse(model, strict=True)
    y, layer = run(model, x)["y"], layer_of(model)
    out = layer.base_layer.out_proj
    once = out.base_layer.weight + out.get_delta_weight("default")
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(plain(x)[0], y)
    factors = fused_attention.counted()
    assert torch.allclose(plain.attn.out_proj.weight, once, atol=1e-6) == (factors.value == 1)
    assert factors.value in (1.0, 2.0) and factors.gradient == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bit_bases_are_nearer_to_the_truth_than_pefts(dtype, adapters):
    model, x = make(dtype), torch.randn(B, L, E, dtype=dtype)
    if adapters == "same":
        model.to(dtype)
    exact = run(copy.deepcopy(model).double(), x.double(), need_weights=False)
    want = run(copy.deepcopy(model), x, need_weights=False)
    lora_kernels.fuse(model, strict=True)
    got = run(model, x, need_weights=False)
    assert got.keys() == want.keys() and layer_of(model).fused_calls == 1
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        error, theirs = ((t.double() - exact[name]).square().mean().sqrt() for t in (got[name], value))
        assert error <= 1.25 * theirs + torch.finfo(dtype).eps * exact[name].abs().mean(), name


def test_the_frozen_weights_have_every_bit_after_a_thousand_forwards_where_pefts_drift():
    model, x = make(torch.bfloat16, targets=["attn"]), torch.randn(1, 2, E, dtype=torch.bfloat16)
    other = copy.deepcopy(model)
    lora_kernels.fuse(model, strict=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for _ in range(1000):
            model(x)
        for _ in range(50):
            other(x)
    assert layer_of(model).fused_calls == 1000
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not all(torch.equal(t, before[name]) for name, t in other.state_dict().items()), "PEFT has mended it"


def test_autocast_gives_pefts_dtypes():
    model, x = make(), torch.randn(B, L, E)
    fused = copy.deepcopy(model)
    lora_kernels.fuse(fused, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (each.base_model.model.attn(x, x, x) for each in (model, fused))
    assert [t.dtype for t in want] == [t.dtype for t in got] and layer_of(fused).fused_calls == 1
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def test_adapters_are_switched_added_merged_and_disabled_as_in_peft():
    model, x = make(torch.float64).double(), torch.randn(B, L, E, dtype=torch.float64)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["attn"]))
    randomised(model.double())
    fused = copy.deepcopy(model)
    lora_kernels.fuse(fused, strict=True)

    def both(change):
        for each in (model, fused):
            change(each)
        want, got = run(model, x), run(fused, x)
        same(got, want)
        assert got.keys() == want.keys() or len(layer_of(model).active_adapters) > 1
        return want["y"]

    first = both(lambda m: m.set_adapter("default"))
    second = both(lambda m: m.set_adapter("other"))
    together = both(lambda m: m.base_model.set_adapter(["default", "other"]))
    assert not torch.allclose(first, second) and not torch.allclose(first, together)
    both(lambda m: layer_of(m).set_scale("default", 3.0))
    calls = layer_of(fused).fused_calls
    both(lambda m: m.base_model.disable_adapter_layers())
    both(lambda m: m.base_model.enable_adapter_layers())
    assert layer_of(fused).fused_calls > calls and not layer_of(fused).passed_over
    both(lambda m: m.base_model.set_adapter("default"))
    both(lambda m: m.delete_adapter("other"))
    both(lambda m: m.merge_adapter())
    both(lambda m: m.unmerge_adapter())


def test_every_active_adapter_has_its_gradient_where_peft_gives_one_to_the_last():
    model, x = make(torch.float64, targets=["attn"]).double(), torch.randn(B, L, E, dtype=torch.float64)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["attn"]))
    randomised(model.double())
    fused = copy.deepcopy(model)
    lora_kernels.fuse(fused, strict=True)
    for names in (["default", "other"], ["other", "default"]):
        for each in (model, fused):
            each.base_model.set_adapter(names)
        want, got = run(model, x), run(fused, x)
        same(got, want)
        assert {name.split(".")[-2] for name in got if "lora_" in name} == {"default", "other"}
        assert {name.split(".")[-2] for name in want if "lora_" in name} == {names[-1]}, "PEFT has mended it"


def test_saved_adapters_are_pefts_and_load_in_both_directions(tmp_path):
    model, x = make(), torch.randn(B, L, E)
    base, want = copy.deepcopy(model).unload(), model(x)[0]
    lora_kernels.fuse(model, strict=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x)[0], want)
    lora_kernels.fuse(loaded, strict=True)
    torch.testing.assert_close(loaded(x)[0], want)
    assert layer_of(loaded).fused_calls == 1


def test_files_of_plain_models_compute_the_same_in_peft_and_back(tmp_path):
    torch.manual_seed(3)
    plain, x = Block().eval(), torch.randn(B, L, E)
    own = copy.deepcopy(plain)
    report = lora_kernels.apply_lora(own, r=4, lora_alpha=6, target_modules=["attn", "fc"])
    assert "12 → 36, 12 → 12" in str(report)
    randomised(own)
    want = own.eval()(x)[0]
    lora_kernels.save_adapter(own, tmp_path / "own")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "own").eval()
    torch.testing.assert_close(loaded(x)[0], want)
    lora_kernels.fuse(loaded, strict=True)
    torch.testing.assert_close(loaded(x)[0], want)
    loaded.save_pretrained(tmp_path / "peft")
    again = copy.deepcopy(plain)
    lora_kernels.load_adapter(again, tmp_path / "peft")
    assert torch.equal(again.eval()(x)[0], want)
    merged = lora_kernels.merge_and_unload(again)
    assert type(merged.attn) is nn.MultiheadAttention
    torch.testing.assert_close(merged(x)[0], want)


def test_the_report_tells_what_computes_out_proj_and_verify_agrees():
    model, x = make(config={"lora_dropout": 0.1}), torch.randn(B, L, E)
    report = lora_kernels.fuse(model, strict=True, verify=x)
    name = "base_model.model.attn"
    assert report.fused[f"{name}.base_layer.out_proj"] == f"computed by {name}"
    assert "lora_dropout has no effect, as with PEFT" in report.fused[name] and "12→36" in report.fused[name]
    assert type(layer_of(model).base_layer.out_proj) is peft.tuners.lora.Linear
    assert layer_of(model).fused_calls == 0 and "fused by lora_kernels" in repr(layer_of(model))
    model(x)
    assert "not called" not in str(report).splitlines()[1]


def test_an_attention_that_is_left_to_peft_takes_its_out_proj_with_it():
    model, x = make(), torch.randn(B, L, E)
    out = layer_of(model).base_layer.out_proj
    out.base_layer.register_forward_hook(lambda *_: None)
    report = lora_kernels.fuse(model)
    name = "base_model.model.attn"
    assert "hooks" in report.not_fused[name] and "not fused" in report.not_fused[f"{name}.base_layer.out_proj"]
    assert set(report.fused) == {"base_model.model.fc"}
    with pytest.raises(RuntimeError, match="out_proj"):
        lora_kernels.fuse(model, strict=True)
    model(x)


def test_calls_that_cannot_be_fused_are_counted_and_pefts():
    model, x = make(), torch.randn(B, L, E)
    want = run(model, x)
    lora_kernels.fuse(model, strict=True)
    layer = layer_of(model)
    layer.lora_B["default"].register_forward_hook(lambda *_: None)
    got = run(model, x)
    assert (
        layer.fused_calls == 0 and list(layer.passed_over.values()) == [1] and "hooks" in next(iter(layer.passed_over))
    )
    torch.testing.assert_close(got["y"], want["y"])
    with pytest.raises(TypeError, match="mixed adapter batches"):
        layer(x, x, x, adapter_names=["default"] * B)
    layer.lora_B["default"]._forward_hooks.clear()
    out = layer.base_layer.out_proj
    out.set_adapter([])
    with pytest.raises(ValueError, match="out_proj"):
        model(x)
    assert "its out_proj has other adapters active, merged or disabled" in layer.passed_over


def test_unfuse_and_enable_and_a_second_fuse():
    model, x = make(), torch.randn(B, L, E)
    lora_kernels.fuse(model)
    lora_kernels.fuse(model, strict=True)
    lora_kernels.unfuse(model)
    layer = layer_of(model)
    assert type(layer) is peft.tuners.lora.layer.MultiheadAttention and "_counted" not in layer.__dict__
    want = run(model, x)["y"]
    lora_kernels.enable()
    try:
        other = make()
    finally:
        lora_kernels.disable()
    assert isinstance(layer_of(other), FusedMultiheadAttention)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(other, x)["y"], want)


def test_the_inference_path_of_an_encoder_layer_does_not_pass_over_the_adapter():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 4, 16, batch_first=True), 2)
    model = randomised(get_peft_model(encoder, LoraConfig(r=2, target_modules=["self_attn"])))
    x, pad = torch.randn(B, L, E), padding("bool", B, L, torch.float32)
    left = model.eval()(x, src_key_padding_mask=pad)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, src_key_padding_mask=pad), left, msg="PEFT has mended it")
    lora_kernels.fuse(model, strict=True)
    want = model(x, src_key_padding_mask=pad)
    assert not torch.allclose(want, left, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=pad), want)
    assert all(m.fused_calls == 2 for m in model.modules() if isinstance(m, FusedMultiheadAttention))


@pytest.mark.slow
def test_a_compiled_model_is_one_graph():
    model, x = make(), torch.randn(B, L, E)
    lora_kernels.fuse(model, strict=True)
    want = run(model, x, need_weights=False)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, need_weights=False), want["y"])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_an_out_proj_whose_update_peft_transposes_is_left_to_peft():
    model, x = make(torch.float64, config={"fan_in_fan_out": True}), torch.randn(B, L, E, dtype=torch.float64)
    want = run(copy.deepcopy(model), x)
    report = lora_kernels.fuse(model)
    assert "fan_in_fan_out" in report.not_fused["base_model.model.attn"]
    torch.testing.assert_close(run(model, x), want)


def test_a_file_with_a_conv1d_beside_an_attention_warns_that_peft_transposes_an_update(tmp_path):
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    plain = nn.ModuleDict({"gpt": conv1d(E, E), "attn": nn.MultiheadAttention(E, H)})
    model = copy.deepcopy(plain)
    lora_kernels.apply_lora(model, r=2, target_modules=["gpt", "attn"])
    with pytest.warns(UserWarning, match="PEFT transposes the update"):
        lora_kernels.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_kernels.load_adapter(copy.deepcopy(plain), tmp_path)  # what we have written means the same to us
