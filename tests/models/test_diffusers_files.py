"""Adapter files of diffusers and of other trainers load, by `load_diffusers` and by `load_adapter`, as what these tools
compute."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.adapter_models import assert_unchanged, state
from torch import Tensor, nn

from lora_kernels import apply_lora, load_adapter, load_diffusers, load_lycoris, save_adapter

st = pytest.importorskip("safetensors.torch")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(6, 5)])
        self.conv = nn.Conv1d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(x)).sum() * self.to_k(x).sum() + self.conv(x.view(-1, 2, 6)).sum()


def model() -> nn.Module:
    torch.manual_seed(0)
    m = nn.Module()
    m.blocks = nn.ModuleList([Attention()])
    m.forward = lambda x: m.blocks[0](x)
    return m.eval()


X = torch.linspace(-1, 1, 24).view(4, 6)


def factors(seed: int = 0, r: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"to_q": (6, 6), "to_k": (6, 4), "to_out.0": (6, 5)}
    return {n: (torch.randn(r, k, generator=g), torch.randn(out, r, generator=g)) for n, (k, out) in shapes.items()}


def merged(updates: dict[str, tuple[Tensor, Tensor]], s: dict[str, float] | float) -> Tensor:
    """Return the output of the plain model whose weights are W + s·B A."""
    m = model()
    for name, (a, b) in updates.items():
        weight = m.get_submodule(f"blocks.0.{name}").weight
        scale = s[name] if isinstance(s, dict) else s
        weight.data += (scale * (b.flatten(1) @ a.flatten(1))).view_as(weight)
    return m(X)


NAMES = {
    "lora_A and lora_B": ("lora_A.weight", "lora_B.weight"),
    "lora_down and lora_up": ("lora_down.weight", "lora_up.weight"),
    "lora.down and lora.up": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("prefix", ["", "transformer", "text_encoder_2"])
def test_every_form_of_the_keys_gives_the_update_of_the_file(names, prefix):
    start = f"{prefix}." if prefix else ""
    tensors = {}
    for name, pair in factors().items():
        tensors |= {f"{start}blocks.0.{name}.{key}": t for key, t in zip(names, pair, strict=True)}
    m = model()
    report = load_diffusers(m, tensors)
    torch.testing.assert_close(m(X), merged(factors(), 1.0))
    assert len(report.layers) == 3


def test_adapters_of_attention_processors_go_into_the_layers_they_stand_for():
    tensors = {}
    for name, (a, b) in factors().items():
        where = f"unet.blocks.0.processor.{name.removesuffix('.0')}_lora"
        tensors |= {f"{where}.down.weight": a, f"{where}.up.weight": b}
    m = model()
    load_diffusers(m, tensors)
    torch.testing.assert_close(m(X), merged(factors(), 1.0))


def keys(updates: dict[str, tuple[Tensor, Tensor]], start: str = "transformer.blocks.0.") -> dict[str, Tensor]:
    both = {f"{start}{n}.lora_A.weight": a for n, (a, _) in updates.items()}
    return both | {f"{start}{n}.lora_B.weight": b for n, (_, b) in updates.items()}


def test_a_number_alpha_of_a_layer_gives_its_scale():
    alphas = {"to_q": 1.0, "to_k": 4.0, "to_out.0": 3.0}
    tensors = keys(factors()) | {f"transformer.blocks.0.{n}.alpha": torch.tensor(v) for n, v in alphas.items()}
    m = model()
    load_diffusers(m, tensors)
    torch.testing.assert_close(m(X), merged(factors(), {n: v / 2 for n, v in alphas.items()}))
    rs = model()  # into layers that are of rsLoRA: s is that of the file all the same
    apply_lora(rs, r=2, use_rslora=True, target_modules=["to_q", "to_k", "to_out.0"])
    load_diffusers(rs, tensors)
    torch.testing.assert_close(rs(X), m(X))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_notes_of_the_file_give_the_scale_and_the_dropout(tmp_path, rslora, packed):
    fields = {
        "r": 2, "lora_alpha": 6, "alpha_pattern": {"to_k": 5}, "lora_dropout": 0.25, "use_rslora": rslora,
        "target_modules": ["to_q", "to_k", "to_out.0"], "lora_bias": False, "peft_version": "0.21.2",
    }  # fmt: skip
    if packed:
        fields = {f"transformer.{key}": value for key, value in fields.items()} | {"text_encoder.r": 9}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    st.save_file(keys(factors()), path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    m = model()
    load_adapter(m, tmp_path)
    over = math.sqrt(2) if rslora else 2
    torch.testing.assert_close(m(X), merged(factors(), {"to_q": 6 / over, "to_k": 5 / over, "to_out.0": 6 / over}))
    assert {layer.lora_dropout for layer in m.modules() if hasattr(layer, "lora_dropout")} == {0.25}
    save_adapter(m, tmp_path / "peft")
    again = model()
    load_adapter(again, tmp_path / "peft")
    torch.testing.assert_close(again(X), m(X))


def test_convolutions_and_products_written_as_convolutions_of_one_element_load():
    a, b = torch.randn(2, 2, 3), torch.randn(3, 2, 1)
    q = tuple(t[:, :, None, None] for t in factors()["to_q"])
    m = model()
    load_diffusers(m, keys({"conv": (a, b), "to_q": q}))
    torch.testing.assert_close(m(X), merged({"conv": (a, b), "to_q": q}, 1.0))


def test_dora_of_all_layers_loads_and_that_of_some_is_refused():
    updates = factors()
    m = model()
    magnitudes = {n: torch.rand(b.shape[0]) + 0.5 for n, (_, b) in updates.items()}
    tensors = keys(updates) | {f"transformer.blocks.0.{n}.lora_magnitude_vector": v for n, v in magnitudes.items()}
    load_diffusers(m, tensors)
    layer = m.blocks[0].to_q
    a, b = updates["to_q"]
    total = model().blocks[0].to_q.weight.double() + b.double() @ a.double()
    scaled = magnitudes["to_q"].double()[:, None] * total / total.norm(dim=1, keepdim=True)
    want = X.double() @ scaled.t() + layer.bias.double()
    torch.testing.assert_close(layer(X), want.float())
    tensors.pop("transformer.blocks.0.to_q.lora_magnitude_vector")
    plain = model()
    before = state(plain)
    with pytest.raises(ValueError, match="DoRA for some layers only"):
        load_diffusers(plain, tensors)
    assert_unchanged(plain, before)


def test_a_file_of_several_models_needs_a_prefix_and_tells_what_it_left_out():
    tensors = keys(factors()) | keys({"encoder.q": factors()["to_q"]}, "text_encoder.")
    m = model()
    before = state(m)
    with pytest.raises(ValueError, match=r"several models, text_encoder, transformer.*prefix="):
        load_diffusers(m, tensors)
    with pytest.raises(ValueError, match=r"begins with 'vae\.'"):
        load_diffusers(m, tensors, prefix="vae")
    assert_unchanged(m, before)
    report = load_diffusers(m, tensors, prefix="transformer")
    assert report.passed_over["text_encoder.encoder.q"] == "its prefix is not 'transformer'"
    torch.testing.assert_close(m(X), merged(factors(), 1.0))


REFUSED = {
    "no adapter of diffusers: transformer.blocks.0.to_q.lora_B.bias": {"transformer.blocks.0.to_q.lora_B.bias": X[0]},
    "lacks transformer.blocks.0.to_q2.lora_B.weight": {"transformer.blocks.0.to_q2.lora_A.weight": X},
    "two values for transformer.blocks.0.to_q.lora_A.weight": {"transformer.blocks.0.to_q.lora_down.weight": X},
    "no place for double_blocks.0.*lora_state_dict of the pipeline": keys({"proj": factors()["to_q"]}, "transformer.double_blocks.0."),  # noqa: E501
    "alpha of blocks.0.to_q is inf, not one finite number": {"transformer.blocks.0.to_q.alpha": torch.tensor(math.inf)},
    "no floating type": {"transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 6, dtype=torch.int64)},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused_and_changes_nothing(message):
    m = model()
    before = state(m)
    with pytest.raises(ValueError, match=message):
        load_diffusers(m, keys(factors()) | REFUSED[message])
    assert_unchanged(m, before)


@pytest.mark.parametrize("notes", ["{", "[]", '{"r": 2, "lora_bias": true, "target_modules": ["to_q"]}'])
def test_notes_that_are_broken_or_ask_for_more_are_refused(tmp_path, notes):
    st.save_file(keys(factors()), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": notes})
    m = model()
    before = state(m)
    with pytest.raises(ValueError, match=r"lora_adapter_metadata of .*(not JSON|no object|not supported)"):
        load_adapter(m, tmp_path / "a.safetensors")
    assert_unchanged(m, before)


def test_notes_that_ask_for_dora_without_its_magnitudes_are_refused(tmp_path):
    notes = json.dumps({"r": 2, "use_dora": True, "target_modules": ["to_q", "to_k", "to_out.0"]})
    st.save_file(keys(factors()), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": notes})
    m = model()
    before = state(m)
    with pytest.raises(ValueError, match="lacks the magnitudes of DoRA, and use_dora"):
        load_adapter(m, tmp_path / "a.safetensors")
    assert_unchanged(m, before)


KOHYA = {
    f"lora_unet_blocks_0_{n.replace('.', '_')}.{key}": t
    for n, (a, b) in factors().items()
    for key, t in (("lora_down.weight", a), ("lora_up.weight", b), ("alpha", torch.tensor(3.0)))
}


@pytest.mark.parametrize("name", ["some_style.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("as_file", [False, True])
def test_load_adapter_takes_a_file_of_kohya_and_its_directory(tmp_path, name, as_file):
    st.save_file(KOHYA, tmp_path / name)
    m = model()
    load_adapter(m, tmp_path / name if as_file else tmp_path)
    torch.testing.assert_close(m(X), merged(factors(), 1.5))


def test_a_kohya_file_into_layers_of_rslora_has_the_scale_of_the_file():
    m = model()
    apply_lora(m, r=2, use_rslora=True, target_modules=["to_q", "to_k", "to_out.0"])
    load_lycoris(m, KOHYA)
    torch.testing.assert_close(m(X), merged(factors(), 1.5))


def test_load_adapter_says_which_file_it_wants(tmp_path):
    m = model()
    before = state(m)
    st.save_file(KOHYA, tmp_path / "one.safetensors")
    st.save_file(KOHYA, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"several safetensors files: .*one\.safetensors"):
        load_adapter(m, tmp_path)
    of_peft = {f"base_model.model.{key}": t for key, t in keys(factors(), "blocks.0.").items()}
    st.save_file(of_peft, tmp_path / "three.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json beside it"):
        load_adapter(m, tmp_path / "three.safetensors")
    st.save_file({"blocks.0.to_q.weight": X}, tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match="of no tool known here"):
        load_adapter(m, tmp_path / "four.safetensors")
    loha = {"lora_unet_blocks_0_to_q.hada_w1_a": X, "lora_unet_blocks_0_to_q.alpha": torch.tensor(1.0)}
    st.save_file(loha, tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match="another method than LoRA"):
        load_adapter(m, tmp_path / "five.safetensors")
    assert_unchanged(m, before)
    apply_lora(m, r=2, target_modules=["to_q"])
    save_adapter(m, tmp_path / "ours")
    load_adapter(m, tmp_path / "ours" / "adapter_model.safetensors")  # the file of PEFT's two
    with pytest.raises(ValueError, match="prefix='unet' is for files of diffusers"):
        load_adapter(m, tmp_path / "ours", prefix="unet")


def test_a_file_that_diffusers_has_saved_loads_with_its_values(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    flux = diffusers.FluxTransformer2DModel(**sizes).eval()
    plain = {key: value.clone() for key, value in flux.state_dict().items()}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, target_modules=["to_q", "to_k"]
    )
    flux.add_adapter(config)
    flux.save_lora_adapter(tmp_path)
    x = {
        "hidden_states": torch.randn(1, 9, 4), "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]),
        "img_ids": torch.randint(0, 4, (9, 3)), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    other = diffusers.FluxTransformer2DModel(**sizes).eval()
    other.load_state_dict(plain)
    load_adapter(other, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(**x).sample, flux(**x).sample)


class Config:
    is_encoder_decoder = False


@pytest.mark.parametrize(
    ("name", "decoder", "takes", "task"),
    [
        ("LlamaForCausalLM", True, "input_ids", "CAUSAL_LM"),
        ("GPT2LMHeadModel", True, "input_ids", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", False, "input_ids", "SEQ_2_SEQ_LM"),
        ("Qwen2VLForConditionalGeneration", True, "input_ids", "CAUSAL_LM"),
        ("WhisperForConditionalGeneration", False, "input_features", None),
        ("LlamaForSequenceClassification", True, "input_ids", None),
    ],
)
def test_a_saved_adapter_names_its_base_and_its_task(tmp_path, name, decoder, takes, task):
    kind = type(name, (Attention,), {"main_input_name": takes, "name_or_path": "some/base"})
    m = kind()
    m.config = Config()
    m.config.is_encoder_decoder = not decoder
    apply_lora(m, r=2, target_modules=["to_q"])
    save_adapter(m, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", task)
