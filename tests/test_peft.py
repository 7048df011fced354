"""PEFT's layers on the fused path give what PEFT gives, and stay PEFT's in everything else."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from replicas import replica
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels import random  # noqa: E402
from lora_kernels.peft import FusedLinear  # noqa: E402


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 24, dtype=dtype)
        self.up, self.down = nn.Linear(24, 40, dtype=dtype), nn.Linear(40, 24, bias=False, dtype=dtype)
        self.head = nn.Linear(24, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def config(**kwargs) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]} | kwargs))


def make(dtype: torch.dtype = torch.float32, net: type[nn.Module] = Net, **kwargs) -> PeftModel:
    """A PEFT model whose adapters differ from zero."""
    torch.manual_seed(0)
    model = get_peft_model(net(dtype), config(**kwargs))
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)


def layers(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def run(model: nn.Module, x: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """y and every gradient."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    y.double().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float | None = None) -> None:
    assert got.keys() == want.keys() and len(got) > 2
    for name, value in want.items():
        atol = None if rtol is None else rtol * value.abs().max().item()
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert got[name].dtype == value.dtype


def fused_equals_peft(model: nn.Module, x: torch.Tensor, rtol: float | None = None, **kwargs) -> None:
    """Every layer takes the fused path, and nothing changes beyond rounding."""
    want = run(model, x, **kwargs)
    report = lora_kernels.fuse(model, strict=True)
    assert report.fused and not report.not_fused
    before = [layer.fused_calls for layer in layers(model)]
    same(run(model, x, **kwargs), want, rtol)
    assert [layer.fused_calls for layer in layers(model)] == [count + 1 for count in before]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down": 9}, "alpha_pattern": {"up": 1}},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"target_modules": ["up"], "lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
    ],
    ids=str,
)
def test_values_and_gradients_are_pefts(kwargs):
    fused_equals_peft(make(**kwargs).train(), torch.randn(2, 5, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["fp32", "same"])
def test_sixteen_bit_bases(dtype, adapters):
    model = make(dtype)
    if adapters == "same":
        model.to(dtype)
    assert layers(model) == [] and next(p for n, p in model.named_parameters() if "lora_A" in n).dtype == (
        dtype if adapters == "same" else torch.float32
    )
    fused_equals_peft(model, torch.randn(6, 24, dtype=dtype), rtol=16 * torch.finfo(dtype).eps)


class MaskOfSeed(nn.Module):
    """PEFT's dropout, with the mask that our rule makes of a seed."""

    def __init__(self, p: float, seed: torch.Tensor) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        return random.dropout(x.flatten(0, -2), self.p, self.seed).view_as(x)


def test_dropout_is_pefts_with_our_mask(monkeypatch):
    seeds = iter(torch.arange(100, 200))
    monkeypatch.setattr("lora_kernels.check.draw_seed", lambda device: next(seeds))
    model = make(lora_dropout=0.3).train()
    plain = copy.deepcopy(model)
    for seed, name in ((100, "up"), (101, "down")):
        plain.base_model.model.get_submodule(name).lora_dropout["default"] = MaskOfSeed(0.3, torch.tensor(seed))
    x = torch.randn(3, 7, 24)
    want = run(plain, x)
    lora_kernels.fuse(model, strict=True)
    same(run(model, x), want)
    assert next(seeds) == 102
    model.eval()
    plain.eval().apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, MaskOfSeed) else None)
    same(run(model, x), run(plain, x))
    assert next(seeds) == 103, "no seed is drawn where nothing is dropped"


def test_scaling_may_be_a_tensor_or_change():
    model, x = make(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    for scaling in (torch.tensor(0.7), 0.2, torch.tensor([1.5])):
        for layer in layers(model):
            layer.scaling["default"] = scaling
        plain = copy.deepcopy(model)
        lora_kernels.unfuse(plain)
        same(run(model, x), run(plain, x))
    assert all(layer.fused_calls == 3 for layer in layers(model))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_active_adapters(p, monkeypatch):
    """Without dropout they run as one; with it each has a mask of its own."""
    model = make(lora_bias=True, target_modules=["up"], lora_dropout=p)
    model.add_adapter("second", config(r=7, target_modules=["up"], lora_dropout=p))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    model.train(p == 0)
    fused_equals_peft(model, torch.randn(5, 24))
    model.train()
    calls = []
    original = lora_kernels.peft_linear.lora_linear
    monkeypatch.setattr("lora_kernels.peft_linear.lora_linear", lambda *a, **k: calls.append(k) or original(*a, **k))
    model(torch.randn(5, 24))
    assert [call["dropout_p"] for call in calls] == [p]


def test_adapters_by_sample():
    model = make(lora_dropout=0.1)
    model.add_adapter("second", config(r=2))
    randomise(model)
    names = ["second", "__base__", "default", "second", "__base__"]
    fused_equals_peft(model.eval(), torch.randn(5, 3, 24), adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names"):
        model(torch.randn(4, 3, 24), adapter_names=names)


class Conv1DNet(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up, self.down = Conv1D(40, 24).to(dtype), Conv1D(24, 40).to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def test_conv1d():
    pytest.importorskip("transformers")
    fused_equals_peft(make(net=Conv1DNet, fan_in_fan_out=True), torch.randn(5, 24))


def test_disabled_and_merged_adapters_are_pefts():
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(base, model.get_base_model().head(plain_base(model, x))) and not torch.allclose(base, y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)
    assert all(layer.fused_calls == 2 and not layer.passed_over for layer in layers(model))


def plain_base(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model()
    return base.down.base_layer(torch.tanh(base.up.base_layer(x)))


def test_set_and_delete_adapters():
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    first = model(x)
    model.add_adapter("other", config(r=5))
    randomise(model)
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.delete_adapter("default")
    lora_kernels.unfuse(other := copy.deepcopy(model))
    torch.testing.assert_close(model(x), other(x))
    assert [layer.fused_calls for layer in layers(model)] == [3, 3]


def test_unfuse_gives_back_what_was():
    model = make()
    before = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    lora_kernels.fuse(model)
    assert list(model.state_dict()) == keys and len(layers(model)) == 2
    lora_kernels.fuse(model)
    lora_kernels.unfuse(model)
    assert {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()} == before


def test_copies_and_pickles(tmp_path):
    model, x = make().eval(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y) and len(layers(other)) == 2
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    loaded.get_base_model().load_state_dict(model.get_base_model().state_dict())
    lora_kernels.fuse(loaded, strict=True)
    torch.testing.assert_close(loaded(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_what_cannot_be_fused_is_pefts_and_is_told():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Mixed(Net):
        def __init__(self, dtype):
            super().__init__(dtype)
            self.down = Odd(40, 24)

    model, x = make(net=Mixed, target_modules=["up", "down", "emb"]), torch.randn(4, 24)
    want = run(model, x)
    with pytest.raises(RuntimeError, match=r"(?s)nothing was changed.*1 of 3 LoRA layers fused.*Embedding"):
        lora_kernels.fuse(model, strict=True)
    assert not layers(model)
    report = lora_kernels.fuse(model)
    assert list(report.fused) == ["base_model.model.up"]
    assert report.not_fused == {
        "base_model.model.emb": "a lora.layer.Embedding, not a plain linear",
        "base_model.model.down": "its base is a Odd with a forward of its own",
    }
    text = str(report)
    assert text.startswith("1 of 3 LoRA layers fused") and "24→40, default r=4" in text and "not fused" in text
    same(run(model, x), want)


def test_single_calls_are_left_to_peft_with_a_reason():
    model, x = make(), torch.randn(4, 24)
    lora_kernels.fuse(model)
    up, down = layers(model)
    want = model(x)
    hook = up.lora_A["default"].register_forward_hook(lambda module, args, y: y * 0)
    assert not torch.allclose(model(x), want)
    hook.remove()
    up.base_layer.weight.requires_grad_(True)
    assert run(model, x)["base_model.model.up.base_layer.weight"].abs().sum() > 0
    up.base_layer.weight.requires_grad_(False)
    up.lora_dropout["default"] = nn.Dropout(1.0)
    model(x)
    assert up.passed_over == {
        "adapter 'default' has hooks, which the fused path would pass over": 1,
        "its base weight is trained": 1,
        "adapter 'default' drops everything: p = 1.0": 1,
    }
    assert (up.fused_calls, down.fused_calls) == (1, 4)


def test_dora_with_dropout_is_pefts_with_our_mask(monkeypatch):
    seeds = iter(torch.arange(100, 200))
    monkeypatch.setattr("lora_kernels.check.draw_seed", lambda device: next(seeds))
    model = make(use_dora=True, lora_dropout=0.3).train()
    plain = copy.deepcopy(model)
    for seed, name in ((100, "up"), (101, "down")):
        plain.base_model.model.get_submodule(name).lora_dropout["default"] = MaskOfSeed(0.3, torch.tensor(seed))
    x = torch.randn(3, 7, 24)
    want = run(plain, x)
    assert lora_kernels.fuse(model, strict=True).fused
    same(run(model, x), want, rtol=1e-5)
    model.eval().merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(
        model(x), plain.eval().apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, MaskOfSeed) else None)(x)
    )
    assert all(layer.fused_calls == 2 for layer in layers(model))


def test_dora_beside_another_adapter_is_left_to_peft():
    model, x = make(use_dora=True), torch.randn(4, 24)
    model.add_adapter("second", config())
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    lora_kernels.fuse(model)
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))
    assert all(layer.passed_over == {"a DoRA adapter beside others": 1} for layer in layers(model))


def test_variants_are_left_to_peft():
    model, x = make(init_lora_weights=False, alora_invocation_tokens=[1]), torch.randn(4, 24)
    report = lora_kernels.fuse(model)
    assert not report.fused and all("ALoraLinearVariant" in why for why in report.not_fused.values())
    other = copy.deepcopy(model)
    lora_kernels.unfuse(other)
    assert torch.equal(model(x), other(x)) and all(layer.fused_calls == 0 for layer in layers(model))


def test_a_named_backend_is_used_and_never_replaced():
    model, x = make(), torch.randn(4, 24)
    with pytest.raises(ValueError, match="no back-end 'cublas'"):
        lora_kernels.fuse(model, backend="cublas")
    lora_kernels.fuse(model, backend="cuda")
    with pytest.raises(ValueError, match="cuda"):
        model(x)
    lora_kernels.fuse(model, backend="eager")
    model(x)


def test_enable_fuses_what_peft_makes():
    created = peft.tuners.lora.LoraModel.__dict__["_create_new_module"]
    lora_kernels.enable()
    lora_kernels.enable()
    try:
        model = make().eval()
        model.add_adapter("second", config())
    finally:
        lora_kernels.disable()
    assert peft.tuners.lora.LoraModel.__dict__["_create_new_module"] is created
    assert len(layers(model)) == 2 and not layers(make())
    x = torch.randn(4, 24)
    lora_kernels.unfuse(plain := copy.deepcopy(model))
    torch.testing.assert_close(model(x), plain(x))
    assert all(layer.fused_calls == 1 for layer in layers(model))


def test_autocast():
    """Under autocast PEFT runs base and adapter in 16 bits, and so do we; fp32 adapters stay what they are."""
    model, x = make().train(), torch.randn(8, 24)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, x)
        lora_kernels.fuse(model)
        got = run(model, x)
    same(got, want, rtol=0.03)
    assert all(layer.fused_calls == 1 for layer in layers(model))


def test_repr_is_pefts_and_says_that_it_is_fused():
    model = make()
    plain = repr(model.base_model.model.up)
    lora_kernels.fuse(model)
    assert repr(model.base_model.model.up) == plain.replace("(\n", "(\n  fused by lora_kernels\n", 1)


def test_a_model_without_peft_layers():
    report = lora_kernels.fuse(Net(), strict=True)
    assert str(report) == "0 of 0 LoRA layers fused: the model has none"


def test_five_hundred_layers_take_less_than_a_second():
    import time

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.ModuleDict({f"up{i}": nn.Linear(8, 8) for i in range(500)})
        model = get_peft_model(net, LoraConfig(target_modules=r"up\d+"))
    start = time.perf_counter()
    report = lora_kernels.fuse(model)
    assert time.perf_counter() - start < 1 and len(report.fused) == 500


def test_all_linear_still_finds_fused_layers():
    """PEFT matches layers of other adapters by the word Linear in their class's name."""
    assert "Linear" in FusedLinear.__name__ and issubclass(FusedLinear, PeftLinear)


def test_replicas_of_data_parallel_take_the_fused_path():
    model = make()
    lora_kernels.fuse(model, strict=True)
    layer = layers(model)[0]
    x = torch.randn(4, layer.in_features)
    y = layer(x)
    y.sum().backward()
    wanted, layer.lora_A["default"].weight.grad = layer.lora_A["default"].weight.grad, None
    other = replica(layer)
    assert other.why_not_now(x) is None
    again = other(x)
    again.sum().backward()
    assert torch.equal(again, y) and torch.equal(layer.lora_A["default"].weight.grad, wanted)
