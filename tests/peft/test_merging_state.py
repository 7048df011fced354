"""Merged layers of PEFT in use: several adapters, ties, modes, moves, copies, and weights that others write."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402
from support.merge_models import K, Net, is_rounded_once, make, merged_by_peft, randomised  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft import merging  # noqa: E402
from lora_kernels.peft.checksum import checksum  # noqa: E402
from lora_kernels.peft.layer import FusedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*[Aa]lready:UserWarning")


def linear(dtype: torch.dtype = torch.bfloat16, **settings):
    """Return a fused model of one linear layer, the layer, its W and x."""
    model, (x,) = make("linear", dtype, **settings)
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    return model, layer, layer.base_layer.weight, x


def with_another(dtype: torch.dtype = torch.bfloat16):
    """Return what `linear` returns, with another adapter "b"; and the plain model."""
    model, (x,) = make("linear", dtype)
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=8, target_modules=["layer"]))
    randomised(model, 5)
    plain = copy.deepcopy(model)
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    return model, layer, layer.base_layer.weight, x, plain


WEIGHT = "base_model.model.layer.base_layer.weight"


def test_adapters_are_summed_whether_they_are_merged_together_or_one_after_another():
    model, layer, w, _, plain = with_another()
    exact, before = merged_by_peft(plain, "default", "b")[WEIGHT], w.detach().clone()
    model.merge_adapter(["default", "b"])
    together = layer.base_layer.weight.detach().clone()
    assert is_rounded_once(together, exact)
    model.unmerge_adapter()
    model.merge_adapter(["b"])
    model.merge_adapter(["default"])
    assert layer.merged_adapters == ["b", "default"]
    assert torch.allclose(together, layer.base_layer.weight, rtol=0.01) and is_rounded_once(
        layer.base_layer.weight.detach(), exact
    )
    layer.merge(adapter_names=["b"])  # it is merged
    assert is_rounded_once(layer.base_layer.weight.detach(), exact)
    layer.unmerge()
    assert layer.base_layer.weight is w and torch.equal(w, before) and not layer.merged


def test_names_that_a_layer_does_not_have_are_passed_over_and_one_that_is_named_twice_is_refused():
    _model, layer, w, *_ = with_another()
    layer.merge(adapter_names=["unknown"])
    assert not layer.merged and layer.base_layer.weight is w
    with pytest.raises(ValueError, match="named twice"):
        layer.merge(adapter_names=["b", "b"])
    with pytest.raises((TypeError, ValueError), match="list of strings"):
        layer.merge(adapter_names="b")
    assert not layer.merged and layer.base_layer.weight is w


@pytest.mark.parametrize("first", [False, True])
def test_a_merge_that_would_not_be_finite_changes_nothing(first):
    model, layer, w, _, _ = with_another()
    if first:
        layer.merge(adapter_names=["default"])
    now = layer.base_layer.weight
    layer.lora_B["b"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected.*nothing was changed"):
        model.merge_adapter(["b"], safe_merge=True)
    assert layer.base_layer.weight is now and layer.merged_adapters == ["default"] * first
    model.merge_adapter(["b"])  # as PEFT does without safe_merge
    model.unmerge_adapter()
    assert layer.base_layer.weight is w and w.isfinite().all()


def test_a_bias_of_the_adapter_needs_one_of_the_base():
    net = Net(nn.Linear(K, 8, bias=False))
    model = randomised(get_peft_model(net, LoraConfig(r=2, target_modules=["layer"], lora_bias=True)))
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    w = layer.base_layer.weight
    with pytest.raises(RuntimeError, match="has no bias: nothing was changed"):
        model.merge_adapter()
    assert not layer.merged and layer.base_layer.weight is w


@pytest.mark.parametrize("targets", [["head"], ["embed"], ["embed", "head"]])
def test_tied_weights_are_each_their_own_while_merged_and_tied_again(targets):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    ids = torch.tensor([[3, 4, 7]])
    model = get_peft_model(Tied(), LoraConfig(r=3, target_modules=targets))
    randomised(model)
    lora_kernels.fuse(model, strict=True)
    want = model(ids)
    bases = [
        getattr(module, "base_layer", module) for module in (model.base_model.model.embed, model.base_model.model.head)
    ]
    w, bits = bases[0].weight, bases[0].weight.detach().clone()
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(model(ids), want)
        model.unmerge_adapter()
        assert all(base.weight is w for base in bases) and torch.equal(w, bits)


def test_disabled_adapters_unmerge_and_named_ones_are_refused():
    model, layer, w, x = linear()
    bits, base = w.detach().clone(), layer.base_layer(x)
    model.merge_adapter()
    merged = model(x)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        layer(x, adapter_names=["default"] * len(x))
    assert torch.equal(model(x), merged)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert not layer.merged and layer.base_layer.weight is w and torch.equal(w, bits)


WRITES = {
    "load_state_dict": lambda layer: layer.base_layer.load_state_dict(nn.Linear(K, 96).to(torch.bfloat16).state_dict()),
    "load_state_dict with assign": lambda layer: layer.base_layer.load_state_dict(
        nn.Linear(K, 96).to(torch.bfloat16).state_dict(), assign=True
    ),
    "in place under no_grad": lambda layer: layer.base_layer.weight.detach().add_(1),
    "through .data": lambda layer: layer.base_layer.weight.data.mul_(2),
    "one element through .data": lambda layer: layer.base_layer.weight.data[5].fill_(7),
    "another .data": lambda layer: setattr(layer.base_layer.weight, "data", torch.zeros(96, K, dtype=torch.bfloat16)),
    "a conversion of the base alone": lambda layer: layer.base_layer.half(),
    "another Parameter": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.zeros(96, K))),
    "a gradient": lambda layer: setattr(layer.base_layer.weight, "grad", torch.zeros(96, K, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_what_others_write_while_merged_is_not_thrown_away_in_silence(write, keep):
    model, layer, w, _x = linear()
    bits = w.detach().clone()
    model.merge_adapter()
    WRITES[write](layer)
    written = layer.base_layer.weight
    with pytest.raises(ValueError, match=r"weight of this .* was written to.*unmerge_written"):
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="was written to"):
        layer.unmerge()
    assert layer.merged and layer.base_layer.weight is written and torch.equal(w, bits)
    assert lora_kernels.unmerge_written(model, keep=keep) == ["base_model.model.layer"]
    assert not layer.merged and layer.base_layer.weight is (written if keep else w) and torch.equal(w, bits)
    assert lora_kernels.unmerge_written(model, keep=keep) == []
    model.merge_adapter()
    model.unmerge_adapter()


def test_a_load_of_the_values_that_are_there_is_no_write():
    model, layer, w, _ = linear()
    model.merge_adapter()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.unmerge_adapter()
    assert layer.base_layer.weight is w


def test_adapters_may_move_while_they_are_merged():
    model, layer, w, _x = linear()
    bits = w.detach().clone()
    model.merge_adapter()
    merged = layer.base_layer.weight.detach().clone()
    layer.lora_B["default"].weight.data.add_(1)
    layer.scaling["default"] = 7.0
    assert torch.equal(layer.base_layer.weight, merged)
    model.unmerge_adapter()
    assert layer.base_layer.weight is w and torch.equal(w, bits)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.float(), lambda m: m.to("cpu"), lambda m: m.double()])
def test_a_merged_model_that_is_converted_takes_its_base_along(move):
    model, layer, w, _x = linear()
    plain = copy.deepcopy(model)
    model.merge_adapter()
    move(model), move(plain)
    assert layer.base_layer.weight.dtype == plain.base_model.model.layer.base_layer.weight.dtype
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, plain.base_model.model.layer.base_layer.weight)
    assert layer.base_layer.weight is w
    model.merge_adapter()
    layer.base_layer.weight.data.mul_(2)
    move(model)  # does not hide the write
    with pytest.raises(ValueError, match="was written to"):
        model.unmerge_adapter()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("kind", ["linear", "attention", "embedding", "vera", "experts"])
def test_a_copy_of_a_merged_model_unmerges_on_its_own(copied, kind):
    model, given = make(kind, torch.bfloat16)
    lora_kernels.fuse(model)
    want = model(*given)
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    other = copied(model)
    other.unmerge_adapter()
    assert all(torch.equal(p, bits[name]) for name, p in other.named_parameters())
    assert model.base_model.model.layer.merged if kind != "experts" else model.base_model.model.experts.merged
    model.unmerge_adapter()
    for each in (model, other):
        got = each(*given)
        assert torch.equal(got[0], want[0])
    addresses = [{p.data_ptr() for p in each.parameters()} for each in (model, other)]
    assert not addresses[0] & addresses[1]


@pytest.mark.parametrize("step", ["merge", "unmerge", "disabled"])
def test_threads_merge_and_unmerge_a_layer_once(step, monkeypatch):
    model, layer, w, x = linear()
    before, want = w.clone(), model(x)
    if step != "merge":
        model.merge_adapter()
    slow = "_total" if step == "merge" else "_refuse_written"
    whole, failed = getattr(merging, slow), []

    def slowly(*args):
        time.sleep(0.02)  # long enough for every thread to have come as far as the first
        return whole(*args)

    def run():
        try:
            model(x) if step == "disabled" else getattr(layer, step)()
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(merging, slow, slowly)
    if step == "disabled":
        model.base_model.disable_adapter_layers()
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and layer.merged == (step == "merge")
    model.base_model.enable_adapter_layers()
    if layer.merged:
        model.unmerge_adapter()
    assert layer.base_layer.weight is w and torch.equal(w, before) and torch.equal(model(x), want)


def test_unfuse_is_refused_while_merged():
    model, layer, _w, _ = linear()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"1 layers are merged.*unmerge_adapter"):
        lora_kernels.unfuse(model)
    assert isinstance(layer, FusedLayer)
    model.unmerge_adapter()
    lora_kernels.unfuse(model)
    assert "_kept_base" not in layer.__dict__


def test_what_peft_has_merged_before_fuse_is_unmerged_by_peft_and_nothing_is_added_to_it():
    _model, _, _, x, plain = with_another(torch.float32)
    want = plain(x)
    plain.merge_adapter(["default"])
    lora_kernels.fuse(plain)
    with pytest.raises(ValueError, match=r"default of this .* were merged by PEFT before fuse"):
        plain.merge_adapter(["b"])
    plain.unmerge_adapter()
    torch.testing.assert_close(plain(x), want)
    plain.merge_adapter()
    plain.unmerge_adapter()
    lora_kernels.unfuse(plain)


def test_the_report_says_what_is_kept():
    model, (_,) = make("linear", torch.bfloat16)
    report = lora_kernels.fuse(model)
    assert "merged" not in str(report)
    model.merge_adapter()
    assert "1 merged at present: 0.0 MiB" in str(report) and lora_kernels.merged_bytes(model) == 2 * 96 * K
    model.unmerge_adapter()
    assert "merged" not in str(report)


def test_a_merged_adapter_is_not_deleted():
    model, layer, w, _, _ = with_another()
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("b")
    with pytest.raises(ValueError, match="merged"):
        layer.delete_adapter("b")
    layer.delete_adapter("default")
    model.unmerge_adapter()
    assert layer.base_layer.weight is w


def test_adapters_are_saved_as_they_are_while_merged(tmp_path):
    model, _, _, _x = linear()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    names = [tmp_path / each / "adapter_model.safetensors" for each in ("before", "merged")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["linear", "attention", "experts", "embedding dora", "conv2d"])
def test_merge_and_unload_leaves_the_plain_layers_with_the_weights_that_are_rounded_once(kind, before):
    model, _given = make(kind, torch.bfloat16)
    exact = merged_by_peft(model)
    lora_kernels.fuse(model)
    if before:
        model.merge_adapter()
    merged = model.unload() if before else model.merge_and_unload()  # PEFT's unload() leaves a merged base merged
    plain = {name.replace("base_model.model.", "").replace("base_layer.", ""): t for name, t in exact.items()}
    found = dict(merged.named_parameters())
    assert found.keys() == plain.keys()
    assert all(is_rounded_once(p.detach(), plain[name]) for name, p in found.items())
    assert not any(isinstance(module, FusedLayer) for module in merged.modules())


def test_a_parametrised_weight_is_refused():
    model, layer, _w, _ = linear(torch.float32)
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"parametrised or pruned.*nothing was changed"):
        model.merge_adapter()
    assert not layer.merged


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_to_which_nothing_can_be_added_is_refused(dtype):
    model, layer, w, _ = linear(torch.float32)
    layer.base_layer.weight = nn.Parameter(w.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"stored in {dtype}.*nothing was changed"):
        model.merge_adapter()
    assert not layer.merged


def test_a_weight_without_values_or_of_another_shape_is_refused():
    model, layer, _w, _ = linear(torch.float32)
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        model.merge_adapter()
    layer.base_layer.weight = nn.Parameter(torch.zeros(0), requires_grad=False)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="gather them first"):
        model.merge_adapter()
    assert not layer.merged


def test_a_view_in_shared_memory_is_merged_beside_it():
    memory = torch.randn(K, 200, dtype=torch.bfloat16)
    model, layer, _w, x = linear()
    layer.base_layer.weight = nn.Parameter(memory[:, 3:99].t(), requires_grad=False)
    before, want = memory.clone(), model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.05)
    assert torch.equal(memory, before)
    model.unmerge_adapter()
    assert layer.base_layer.weight.data_ptr() == memory[:, 3:].data_ptr() and torch.equal(memory, before)


def test_neither_autocast_nor_inference_mode_nor_tf32_changes_the_sum():
    model, layer, w, x = linear(torch.float32)
    exact = merged_by_peft(model)[WEIGHT]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    assert not layer.base_layer.weight.is_inference() and is_rounded_once(layer.base_layer.weight.detach(), exact)
    model.train()(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        model.unmerge_adapter()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        model.merge_adapter()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(layer.base_layer.weight, exact.float())
    model.unmerge_adapter()
    assert layer.base_layer.weight is w


def test_an_activated_lora_is_refused_and_nothing_beside_it_is_merged():
    net = Net(nn.Linear(K, 8))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"]))
    model.add_adapter(
        "a", LoraConfig(r=2, target_modules=["layer"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    )
    lora_kernels.fuse(model)
    layer = model.base_model.model.layer
    w = layer.base_layer.weight
    with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
        layer.merge(adapter_names=["default", "a"])
    assert not layer.merged and layer.base_layer.weight is w


def test_elements_that_change_places_in_a_merged_weight_are_noticed():
    """As where heads are permuted for another format: a plain sum over the bits would be the same."""
    model, layer, w, _ = linear()
    for order in (lambda t: t.flip(0), lambda t: t.flip(1), lambda t: t.roll(8, 0), lambda t: t.roll(4, 1)):
        model.merge_adapter()
        layer.base_layer.weight.data.copy_(order(layer.base_layer.weight.data.clone()))
        with pytest.raises(ValueError, match="was written to"):
            model.unmerge_adapter()
        lora_kernels.unmerge_written(model, keep=False)
        assert layer.base_layer.weight is w


def test_checksums_of_any_tensor():
    """Of every dtype, size and stride. Equal values have the same one, and one element that differs changes it."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.complex128):
        for size in (0, 1, 3, 8, 4093, 9001):
            t = torch.arange(3 * size).to(dtype).view(-1, 3)[:, 1]
            assert checksum(t) == checksum(t.clone())
            for place in {0, size // 2, size - 1} if size else ():
                other = t.clone()
                other[place] = 5 if t[place] == 3 else 3
                assert checksum(other) != checksum(t)
            if size > 8:
                assert checksum(t.roll(1)) != checksum(t)
