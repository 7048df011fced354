"""Adapters of loralib, LyCORIS and kohya's sd-scripts load as what these tools compute."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.adapter_models import assert_unchanged, state
from torch import Tensor, nn

from lora_kernels import apply_lora, load_adapter, load_loralib, load_lycoris, merge_and_unload, save_adapter
from lora_kernels.models.kinds import lora_layers

st = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 24)
        self.conv_in, self.conv_out = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.to_q = nn.Linear(48, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).view(-1, 2, 3, 4)
        return self.to_q(self.conv_out(torch.tanh(self.conv_in(x))).flatten(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"unet": Net()}).eval()


def run(m: nn.Module) -> Tensor:
    return m["unet"](torch.arange(6))


def merged(m: nn.Module, deltas: dict[str, Tensor]) -> nn.Module:
    """Return the model with ΔW added to its weights."""
    for name, delta in deltas.items():
        m["unet"].get_submodule(name).weight.data += delta
    return m


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) / 3


# --- loralib ---


def loralib_net(r: int, alpha: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a checkpoint of loralib, and ΔW of each layer as loralib computes it."""
    torch.manual_seed(1)
    a = {"table": random(r, 10), "conv_in": random(3 * r, 6), "conv_out": random(r, 5), "to_q": random(r, 48)}
    b = {"table": random(24, r), "conv_in": random(15, 3 * r), "conv_out": random(4, r), "to_q": random(4, r)}
    s = alpha / r
    deltas = {name: s * (b[name] @ a[name]) for name in a}
    deltas["table"] = deltas["table"].t()
    deltas["conv_in"], deltas["conv_out"] = deltas["conv_in"].view(5, 2, 3, 3), deltas["conv_out"].view(4, 5, 1, 1)
    tensors = {f"unet.{n}.lora_A": t for n, t in a.items()} | {f"unet.{n}.lora_B": t for n, t in b.items()}
    return tensors, deltas


def test_a_checkpoint_of_loralib_with_every_kind_of_layer_computes_what_loralib_does(tmp_path):
    tensors, deltas = loralib_net(1, 3.0)
    m = model()
    report = load_loralib(m, tensors, lora_alpha=3.0)
    want = run(merged(model(), deltas))
    torch.testing.assert_close(run(m), want)
    assert {layer.name: layer.r for layer in report.layers} == {
        "unet.table": 1, "unet.conv_in": 5, "unet.conv_out": 1, "unet.to_q": 1
    }  # fmt: skip
    assert max(report.converted.values()) < 1e-6 and "factored anew" in str(report)
    save_adapter(m, tmp_path)  # in PEFT's format
    other = model()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(run(other), want)
    torch.testing.assert_close(run(merge_and_unload(m)), want)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("plain", [True, False])
def test_a_convolution_of_loralib_at_a_lower_rank_has_the_error_that_is_told(rank, plain):
    tensors, deltas = loralib_net(2, 3.0)
    tensors = {key: value for key, value in tensors.items() if "conv_in" in key}
    m = model()
    if plain:
        report = load_loralib(m, tensors, lora_alpha=3.0, conv_rank=rank)
    else:
        apply_lora(m, r=rank, lora_alpha=1.5 * rank, target_modules=["conv_in"])
        report = load_loralib(m, tensors)
    layer = lora_layers(m)["unet.conv_in"]
    made = layer.scaling * (layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)).view(5, 2, 3, 3)
    delta = deltas["conv_in"]
    error = (made - delta).norm() / delta.norm()
    torch.testing.assert_close(torch.tensor(report.converted["unet.conv_in"]), error.detach(), rtol=1e-3, atol=1e-6)
    s = torch.linalg.svdvals(delta.flatten(1).double())
    assert math.isclose(error, s[rank:].norm() / s.norm(), rel_tol=1e-3)  # no other A and B are nearer


def test_the_bias_of_a_convolution_of_loralib_has_its_own_name():
    tensors, _ = loralib_net(1, 1.0)
    m = model()
    load_loralib(m, tensors | {"unet.conv_in.conv.bias": torch.ones(5)}, lora_alpha=1.0)
    assert torch.equal(m["unet"].conv_in.bias, torch.ones(5))


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv1d(4, 4, 3), "square kernel"),
        (nn.Conv2d(4, 4, (3, 1)), "square kernel"),
        (nn.Conv2d(3, 4, 3), r"should be \(r·3, 9\)"),
    ],
)
def test_a_convolution_that_loralib_cannot_have_made_is_refused(conv, words):
    m = nn.ModuleDict({"conv": conv})
    before = state(m)
    with pytest.raises(ValueError, match=words):
        load_loralib(m, {"conv.lora_A": random(3, 12), "conv.lora_B": random(12, 3)}, lora_alpha=1)
    assert_unchanged(m, before)


# --- LyCORIS and kohya ---


def lycoris_net(tucker: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file of LyCORIS for `Net`, and ΔW of its layers."""
    torch.manual_seed(2)
    r, alpha = 3, 6.0
    conv = {"lora_down.weight": random(r, 2, 3, 3), "lora_up.weight": random(5, r, 1, 1)}
    delta = torch.einsum("nr,rcij->ncij", conv["lora_up.weight"].flatten(1), conv["lora_down.weight"])
    if tucker:
        conv["lora_down.weight"], conv["lora_mid.weight"] = random(r, 2, 1, 1), random(r, r, 3, 3)
        down, mid, up = (conv[f"lora_{part}.weight"] for part in ("down", "mid", "up"))
        eye = torch.eye(2 * 9).view(18, 2, 3, 3)  # the three convolutions, one after the other, on every unit input
        out = F.conv2d(F.conv2d(F.conv2d(eye, down), mid), up)
        delta = out.view(2, 3, 3, 5).permute(3, 0, 1, 2)
    point = {"lora_down.weight": random(r, 5, 1, 1), "lora_up.weight": random(4, r, 1, 1)}
    q = {"lora_down.weight": random(r, 48), "lora_up.weight": random(4, r)}
    layers = {"conv_in": conv, "conv_out": point, "to_q": q}
    tensors = {f"lora_unet_{name}.{part}": t for name, parts in layers.items() for part, t in parts.items()}
    tensors |= {f"lora_unet_{name}.alpha": torch.tensor(alpha) for name in layers if name != "to_q"}  # to_q: s = 1
    deltas = {
        "conv_in": alpha / r * delta,
        "conv_out": alpha
        / r
        * (point["lora_up.weight"].flatten(1) @ point["lora_down.weight"].flatten(1))[..., None, None],
        "to_q": q["lora_up.weight"] @ q["lora_down.weight"],
    }
    return tensors, deltas


@pytest.mark.parametrize("tucker", [False, True])
def test_a_locon_file_computes_what_its_convolutions_do(tmp_path, tucker):
    tensors, deltas = lycoris_net(tucker)
    st.save_file(tensors, tmp_path / "locon.safetensors")
    m = model()
    report = load_lycoris(m["unet"], tmp_path / "locon.safetensors")
    want = run(merged(model(), deltas))
    torch.testing.assert_close(run(m), want)
    assert [layer.name for layer in report.layers] == ["conv_in", "conv_out", "to_q"] and not report.converted
    again = model()
    apply_lora(again["unet"], r=3, target_modules=["conv_in", "conv_out", "to_q"])
    load_lycoris(again["unet"], tensors)
    torch.testing.assert_close(run(again), want)
    save_adapter(m["unet"], tmp_path)
    other = model()
    load_adapter(other["unet"], tmp_path)
    torch.testing.assert_close(run(other), want)


def test_the_layers_of_another_prefix_are_left_and_told():
    tensors, deltas = lycoris_net(False)
    more = {"lora_te_encoder.lora_down.weight": random(2, 4), "lora_te_encoder.lora_up.weight": random(4, 2)}
    m = model()
    with pytest.raises(ValueError, match=r"'lora_te_', 'lora_unet_'.*prefix="):
        load_lycoris(m["unet"], tensors | more)
    report = load_lycoris(m["unet"], tensors | more, prefix="lora_unet_")
    assert report.passed_over["lora_te_encoder"] == "its prefix is not 'lora_unet_'"
    torch.testing.assert_close(run(m), run(merged(model(), deltas)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_unet_to_q.hada_w1_a": random(4, 2)}, r"another method.*hada_w1_a"),
        ({"lora_unet_to_q.dora_scale": random(4, 1)}, r"another method.*dora_scale"),
        ({f"lora_unet_gone.lora_{part}.weight": random(4, 4) for part in ("down", "up")}, "no place for gone"),
        ({"lora_unet_to_q.lora_down.weight": random(3, 47)}, r"to_q\.lora_A \(3, 47\) should be \(3, 48\)"),
        ({"lora_unet_to_q.lora_up.weight": random(4, 2)}, r"\(3, 48\) and lora_B \(4, 2\)"),
        ({"lora_unet_to_q.alpha": random(2)}, r"alpha of to_q is \(2,\)"),
        ({"lora_unet_to_q.alpha": torch.tensor(math.inf)}, "inf"),
        ({"lora_unet_to_q.lora_mid.weight": random(3, 3, 3)}, r"lora_mid \(3, 3, 3\)"),
        ({"lora_unet_to_q.lora_down.weight": torch.ones(3, 48, dtype=torch.int8)}, "no floating type"),
    ],
)  # fmt: skip
def test_a_locon_file_that_does_not_fit_changes_nothing(change, words):
    tensors = lycoris_net(True)[0] | change
    m = model()["unet"]
    before = state(m)
    with pytest.raises(ValueError, match=words):
        load_lycoris(m, tensors)
    assert_unchanged(m, before)


def test_a_name_that_two_modules_have_is_refused():
    m = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"two modules each: a_b \(a_b, a\.b\)"):
        load_lycoris(m, {"a_b.lora_down.weight": random(2, 4), "a_b.lora_up.weight": random(4, 2)})


def test_without_an_adapter_there_is_nothing_to_load():
    for tensors in ({}, {"lora_te_x.lora_down.weight": random(2, 4), "lora_te_x.lora_up.weight": random(4, 2)}):
        with pytest.raises(ValueError, match="no adapter whose name begins with"):
            load_lycoris(model()["unet"], tensors, prefix="lora_unet_")
    with pytest.raises(ValueError, match=r"lacks x\.lora_up"):
        load_lycoris(model()["unet"], {"lora_unet_x.lora_down.weight": random(2, 4)})
