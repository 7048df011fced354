"""What a `FusedLoRAExperts` keeps: merging, state_dict, files of PEFT, copies, conversions, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")
from support.experts import STACKS, E, H, I, K, T, experts_of, inputs

from lora_kernels import FusedLoRAExperts
from lora_kernels.nn.settings import LoRASettings


def layer_of(module: nn.Module, **settings) -> FusedLoRAExperts:
    layer = FusedLoRAExperts.from_experts(module, **({"r": 3} | settings))
    for name in layer.target_parameters:
        nn.init.normal_(layer.pair(name)[1], 0, 0.1)
    return layer.eval()


def call(module: nn.Module) -> Tensor:
    x, ids, weights, _ = inputs(next(module.parameters()).dtype)
    with torch.no_grad():
        return module(x, ids, weights)


def test_parameters_are_shared_and_only_the_adapter_trains():
    module = experts_of("GptOss")
    layer = layer_of(module, r=2, lora_alpha=8, lora_dropout=0.1)
    assert layer.gate_up_proj is module.gate_up_proj and layer.down_proj_bias is module.down_proj_bias
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        f"lora_{which}_{name}" for which in "AB" for name in STACKS
    }
    assert layer.lora_A_gate_up_proj.shape == (E, 2, H) and layer.lora_B_gate_up_proj.shape == (E, 2 * I, 2)
    assert layer.scaling == 4.0 and layer.limit == module.limit and layer.num_experts == E
    assert layer.size == f"{E} × ({H} → {2 * I}, {I} → {H})" and "GptOssExperts" in repr(layer)
    bound = 1 / math.sqrt(H)  # the bound of Kaiming-uniform(√5) for a fan-in of H
    assert 0.8 * bound < layer.lora_A_gate_up_proj.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_merged_stacks_are_the_exact_ones_rounded_once(family, dtype):
    module = experts_of(family, dtype)
    layer = layer_of(module)
    base, before = dict(module.named_parameters()), call(layer)
    exact = {}
    for name in STACKS:
        a, b = (t.detach().double() for t in layer.pair(name))
        delta = layer.scaling * b @ a
        exact[name] = (base[name].double() + (delta.mT if layer.is_transposed else delta)).to(dtype)
    layer.merge()
    layer.merge()  # does nothing
    assert layer.merged and all(torch.equal(getattr(layer, name), exact[name]) for name in STACKS)
    most = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(call(layer), before, rtol=most, atol=most)
    plain = layer.to_plain()
    assert type(plain) is type(module) and torch.equal(call(plain), call(layer))
    layer.unmerge()
    assert not layer.merged and all(getattr(layer, name) is base[name] for name in STACKS)
    assert torch.equal(call(layer), before)
    assert all(torch.equal(getattr(layer.to_plain(), name), exact[name]) for name in STACKS)
    assert plain.training == layer.training and plain.state_dict().keys() == module.state_dict().keys()


def test_merging_makes_nothing_of_the_stacks_size_in_fp64():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for t in made if isinstance(made, (list, tuple)) else (made,):
                if isinstance(t, Tensor) and t.dtype == torch.float64:
                    self.numel = max(self.numel, t.untyped_storage().nbytes() // 8)
            return made

    layer = layer_of(experts_of("Qwen3Moe"))
    with Largest() as seen:
        layer.merge()
    assert 0 < seen.numel <= H * 2 * I  # one expert


def test_merging_is_refused_where_it_would_be_wrong():
    layer = layer_of(experts_of("Qwen3Moe"))
    with torch.no_grad():
        layer.lora_B_down_proj[2, 0, 0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged
    layer.merge(safe=False)
    with pytest.raises(ValueError, match="unmerge"):
        layer.gate_up_proj = nn.Parameter(torch.zeros(1))
    layer.unmerge()
    with pytest.raises(ValueError, match="meta device"):
        layer.to("meta").merge()


def test_a_merged_layer_that_is_to_be_trained_warns():
    layer = layer_of(experts_of("Qwen3Moe")).train()
    layer.merge()
    x, ids, weights, _ = inputs()
    with pytest.warns(UserWarning, match="gets no gradient until unmerge"):
        layer(x, ids, weights)


def test_state_dict_holds_base_and_adapter_merged_or_not():
    layer, other = layer_of(experts_of("GptOss")), layer_of(experts_of("GptOss"))
    want, state = call(layer), layer.state_dict()
    layer.merge()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    nn.init.zeros_(other.down_proj)
    other.merge()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert other.merged
    torch.testing.assert_close(call(other), want)
    other.unmerge()
    torch.testing.assert_close(call(other), want, rtol=0, atol=0)


def test_the_state_dict_of_the_plain_module_leaves_the_adapter():
    module = experts_of("Qwen3Moe")
    layer = layer_of(module)
    b = layer.lora_B_down_proj.clone()
    state = {name: torch.ones_like(p) for name, p in module.named_parameters()}
    layer.load_state_dict(state)
    assert torch.equal(layer.lora_B_down_proj, b) and layer.down_proj.eq(1).all()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"down_proj": layer.down_proj})
    with pytest.raises(ValueError, match=r"lora_A_gate_up_proj is \(5, 2, 12\), here \(5, 3, 12\) with r=3"):
        layer.load_state_dict(layer_of(module, r=2).state_dict())


def test_copies_and_pickles_compute_the_same():
    layer = layer_of(experts_of("GptOss"), lora_dropout=0.2)
    want = call(layer)
    for merged in (False, True):
        if merged:
            layer.merge()
        saved = io.BytesIO()
        torch.save(layer, saved)
        saved.seek(0)
        for other in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(saved, weights_only=False),
        ):
            assert other.merged == merged and other.lora_dropout == 0.2
            other.unmerge()
            assert torch.equal(call(other), want)


def test_moves_and_conversions_take_the_base_along():
    layer = layer_of(experts_of("Qwen3Moe"))
    layer.merge()
    layer.double()
    assert layer.gate_up_proj.dtype == torch.float64
    layer.unmerge()
    assert layer.gate_up_proj.dtype == layer.lora_A_down_proj.dtype == torch.float64
    assert [name for name, _ in layer.named_parameters()][:2] == list(STACKS)


def test_memory_that_nobody_has_written_gets_a_fresh_adapter():
    layer = layer_of(experts_of("Qwen3Moe")).to("meta").to_empty(device="cpu")
    assert layer.lora_B_down_proj.count_nonzero() == 0 and layer.lora_A_down_proj.count_nonzero() > 0
    nn.init.ones_(layer.lora_B_down_proj)
    layer.reset_adapter()
    assert layer.lora_B_down_proj.count_nonzero() == 0


def test_a_module_on_the_meta_device_takes_the_tensors_of_the_plain_module():
    plain = experts_of("Qwen3Moe")
    layer = FusedLoRAExperts.from_experts(copy.deepcopy(plain).to("meta"), r=2)
    with torch.inference_mode():
        layer.load_state_dict(plain.state_dict(), assign=True)
    x, ids, weights = torch.randn(T, H), torch.randint(E, (T, K)), torch.rand(T, K)
    torch.testing.assert_close(layer(x, ids, weights), plain(x, ids, weights))
    layer(x, ids, weights).sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if name.startswith("lora_"))


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_files_have_pefts_layout(family):
    """In A the expert is the slowest dimension, in B the fastest; gate_up_proj is in the inner wrapper."""
    layer = layer_of(experts_of(family), r=3)
    parts = layer.file_parts()
    assert {key: (part.parameter, part.shape) for key, part in parts.items()} == {
        "lora_A.weight": ("lora_A_down_proj", (E * 3, I)),
        "lora_B.weight": ("lora_B_down_proj", (H, 3 * E)),
        "base_layer.lora_A.weight": ("lora_A_gate_up_proj", (E * 3, H)),
        "base_layer.lora_B.weight": ("lora_B_gate_up_proj", (2 * I, 3 * E)),
    }
    for key, part in parts.items():
        own = getattr(layer, part.parameter)
        stored = layer.to_file(key, own)
        assert stored.shape == part.shape and torch.equal(layer.from_file(key, stored), own)
        e, r = 3, 1
        if "lora_A" in key:
            assert torch.equal(stored[e * 3 + r], own[e, r])
        else:
            assert torch.equal(stored[:, r * E + e], own[e, :, r])
    alone = layer_of(experts_of(family), parameters=["gate_up_proj"])
    assert set(alone.file_parts()) == {"lora_A.weight", "lora_B.weight"}
    assert alone.file_parts()["lora_A.weight"].parameter == "lora_A_gate_up_proj"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"quant": "nf4"}, "quantised"),
        ({"init": "pissa"}, "kaiming"),
        ({"r": 0}, "r must be"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_settings_of_other_layers_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        FusedLoRAExperts.from_settings(experts_of("Qwen3Moe"), LoRASettings(**settings))


def test_parameters_must_be_stacks_of_the_module():
    for wrong in (["up_proj"], ["gate_up_proj", "act_fn"], "down_proj"):
        with pytest.raises(ValueError, match="a list of gate_up_proj and down_proj"):
            FusedLoRAExperts.from_experts(experts_of("Qwen3Moe"), parameters=wrong)


def test_modules_that_are_not_of_the_known_form_are_refused_with_the_reason():
    def why(module: nn.Module) -> str:
        with pytest.raises(TypeError) as error:
            FusedLoRAExperts.from_experts(module)
        assert FusedLoRAExperts.why_not(module) == str(error.value)
        return str(error.value)

    assert "a Linear, whose forward is not one" in why(nn.Linear(3, 3))
    assert "a FusedLoRAExperts, whose forward" in why(layer_of(experts_of("Qwen3Moe")))
    module = experts_of("Qwen3Moe")
    module.register_forward_hook(lambda *_: None)
    assert "has hooks" in why(module)
    module = experts_of("Qwen3Moe")
    module.forward = lambda *_: None
    assert "a forward of its own" in why(module)
    module = experts_of("Qwen3Moe")
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    assert "its down_proj is parametrised" in why(module)
    module = experts_of("Qwen3Moe")
    module.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * I, H, dtype=torch.int8), requires_grad=False)
    assert "its gate_up_proj is torch.int8 (5, 16, 12)" in why(module)
    module = experts_of("Qwen3Moe")
    module.config._experts_implementation = "my_own"
    assert "'my_own', which is not one of transformers" in why(module)

    class Own(type(experts_of("Qwen3Moe"))):
        def forward(self, *args):
            return super().forward(*args)

    module = experts_of("Qwen3Moe")
    module.__class__ = Own
    assert "a Own, whose forward is not one" in why(module)

    class Gated(type(experts_of("Qwen3Moe"))):
        def _apply_gate(self, y):
            return self.halves(y)

        def halves(self, y):
            return y.chunk(2, -1)[0]

    module = experts_of("Qwen3Moe")
    module.__class__ = Gated
    assert "its _apply_gate uses halves of its class" in why(module)


def test_a_class_whose_experts_are_quantised_is_refused():
    """transformers gives such classes an interface of their own, whose functions read scales beside the codes."""
    from transformers.integrations import moe

    class Codes(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = config.num_experts
            self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * I, H))
            self.down_proj = nn.Parameter(torch.zeros(E, H, I))

        def forward(self, *args):
            raise AssertionError

    config = experts_of("Qwen3Moe").config
    module = moe.use_experts_implementation(Codes, experts_interface=moe.ExpertsInterface())(config)
    assert FusedLoRAExperts.why_not(module) == (
        "a Codes, whose experts are quantised or computed by functions of its own"
    )


def test_no_warning_is_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(layer_of(experts_of("GptOss")))
