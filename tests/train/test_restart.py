"""A restart adds the update to its weight in place, leaves the function as it is, and begins anew."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.kind_models import KIND_MODELS
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRALinear, apply_lora
from lora_kernels.models.pairs import pairs
from lora_kernels.train import freeze_a, restart

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
DTYPES += [(torch.float16, torch.float32), (torch.float64, torch.float64)]


def randomise(model: nn.Module, std: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.normal_(0, std)
    return model


def layer(dtype: torch.dtype = torch.float32, n: int = 37, k: int = 53, r: int = 5, **settings: Any) -> FusedLoRALinear:
    linear = nn.Linear(k, n, dtype=dtype)
    made = FusedLoRALinear.from_linear(linear, r=r, lora_alpha=2, **settings)
    return randomise(made)  # type: ignore[return-value]


def exact(one: FusedLoRALinear) -> Tensor:
    """Return W + s·B A in fp64."""
    w, a, b = (t.detach().double() for t in (one.weight, one.lora_A, one.lora_B))
    return w + one.scaling * b @ a


@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_the_weight_becomes_the_exact_sum_rounded_once(dtype: torch.dtype, adapter: torch.dtype) -> None:
    one = layer(dtype, adapter_dtype=adapter)
    want, before = exact(one), one.weight.detach().to(torch.float64, copy=True)
    change = want - before
    weight, address, version = one.weight, one.weight.data_ptr(), one.weight._version
    report = restart(one)
    assert one.weight is weight and weight.data_ptr() == address and weight._version > version
    info = torch.finfo(dtype)  # fp16 has no finer steps below its smallest normal number
    # Half a unit in the last place, and what fp32 sums may add to it.
    bound = (
        0.51 * info.eps * want.abs().clamp(min=info.tiny)
        + (1e-6 if dtype != torch.float64 else 1e-15) * change.abs().max()
    )
    assert (weight.double() - want).abs().le(bound).all()
    (done,) = report.layers
    assert done.update == pytest.approx(change.norm().item(), rel=1e-5)
    lost = ((weight.double() - before - change).norm() / change.norm()).item()
    assert done.lost == pytest.approx(lost, rel=0.02, abs=1e-7)  # products in fp32 have an error of their own
    assert not one.lora_B.any() and one.lora_A.abs().max() <= 1 / 53**0.5 and one.lora_A.abs().max() > 0.8 / 53**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_of_an_update_whose_squares_are_too_small_for_fp32_is_lost(dtype: torch.dtype) -> None:
    one = layer(dtype, adapter_dtype=torch.float32)
    with torch.no_grad():
        one.lora_B *= 1e-23
        one.weight.abs_().add_(0.1)
    change = one.scaling * one.lora_B.detach().double() @ one.lora_A.detach().double()
    (done,) = restart(one).layers
    assert done.update == pytest.approx(change.norm().item(), rel=1e-5)
    assert done.lost == pytest.approx(1, rel=1e-5)


def test_blocks_of_a_large_weight_are_all_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kernels.train.base_weights._BLOCK", 4 * 53)
    one = layer()
    want = exact(one)
    restart(one)
    torch.testing.assert_close(one.weight.double(), want, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precision_of_products_does_not_reach_the_weight(precision: str) -> None:
    one = layer(n=200, k=300, r=64)
    want = exact(one)
    torch.set_float32_matmul_precision(precision)
    try:
        restart(one)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(one.weight, want.float())


def cases() -> list[Any]:
    who = ("ours", "PEFT", "PEFT, fused")
    return [pytest.param(kind, each, id=f"{kind}, {each}") for kind in KIND_MODELS for each in who]


@pytest.mark.parametrize(("kind", "who"), cases())
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_layer_computes_what_it_did_and_starts_as_at_first(kind: str, who: str) -> None:
    case = KIND_MODELS[kind]
    model = case.plain()
    if who == "ours":
        apply_lora(model, r=4, lora_alpha=6, **case.rules)
    else:
        peft = pytest.importorskip("peft")
        rules = {"target_modules": []} | dict(case.rules) | dict(case.peft)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **rules))
        if who == "PEFT, fused":
            lora_kernels.fuse(model)
    randomise(model.eval())
    y = case.run(model)
    found = pairs(model)
    weights = {id(p): (p, p.clone()) for p in model.parameters() if not p.requires_grad}
    report = restart(model)
    assert len(report.layers) == len(found)
    torch.testing.assert_close(case.run(model), y, rtol=1e-4, atol=1e-5)
    for pair in found:
        assert not pair.zero_at_start.any() and pair.random_at_start.all()
    changed = [p for p, before in weights.values() if not torch.equal(p, before)]
    assert len(changed) == len(found)  # and every other frozen parameter is what it was
    # A first step trains the matrix that is zero.
    case.run(model).square().sum().backward()
    assert all(pair.zero_at_start.grad.abs().sum() > 0 for pair in pairs(model) if pair.kind != "experts")


@pytest.mark.parametrize("who", ["ours", "PEFT"])
@pytest.mark.filterwarnings("ignore")
def test_dora_keeps_its_magnitude_and_its_function(who: str) -> None:
    model = nn.Sequential(nn.Embedding(11, 24), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 7))
    if who == "ours":
        apply_lora(model, r=4, use_dora=True, target_modules=["0", "1", "3"])
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, use_dora=True, target_modules=["0", "1", "3"]))
    randomise(model)
    found = pairs(model)
    with torch.no_grad():
        for pair in found:
            pair.magnitude.mul_(1 + 0.1 * torch.rand_like(pair.magnitude))
    magnitudes = [pair.magnitude.clone() for pair in found]
    ids = torch.arange(11)
    y = model(ids)
    restart(model)
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(pair.magnitude, m) for pair, m in zip(found, magnitudes, strict=True))
    assert not any(pair.zero_at_start.any() for pair in found)


def test_the_rank_of_the_sum_grows_by_r_at_every_restart() -> None:
    one = layer(torch.float64, n=40, k=50, r=3)
    first = one.weight.detach().clone()
    for n in range(1, 5):
        restart(one)
        assert torch.linalg.matrix_rank(one.weight - first, rtol=1e-9) == 3 * n
        randomise(one)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_added_to_as_it_lies_in_memory(memory: torch.memory_format) -> None:
    conv = nn.Conv2d(6, 9, 3).to(memory_format=memory)
    model = nn.Sequential(conv)
    apply_lora(model, r=2, target_modules=["0"])
    randomise(model)
    one = model[0]
    a, b = one.lora_A.detach().double(), one.lora_B.detach().double()
    want = one.weight.double() + one.scaling * torch.einsum("nr,rckl->nckl", b.flatten(1), a)
    stride = one.weight.stride()
    restart(model)
    torch.testing.assert_close(one.weight.double(), want, rtol=1e-6, atol=1e-6)
    assert one.weight.stride() == stride


def test_groups_of_a_convolution_are_served_where_a_has_groups_and_refused_where_not() -> None:
    from lora_kernels import FusedLoRAConv2d

    x = torch.randn(2, 8, 5, 5)
    one = randomise(FusedLoRAConv2d.from_conv(nn.Conv2d(8, 12, 3, groups=4), r=4, grouped=True))
    y = one(x)
    restart(one)
    torch.testing.assert_close(one(x), y, rtol=1e-4, atol=1e-5)
    other = randomise(FusedLoRAConv2d.from_conv(nn.Conv2d(8, 12, 3, groups=4), r=4, grouped=False))
    with pytest.raises(ValueError, match="A sees the channels of all groups"):
        restart(other)


def test_a_is_drawn_from_the_generator_alone_and_differs_between_layers_and_restarts() -> None:
    def run(seed: int, noise: int) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(layer(), layer(n=53, k=37), layer())
        torch.manual_seed(noise)
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for _ in range(2):
            restart(model, generator=generator)
            drawn += [model[0].lora_A.clone(), model[2].lora_A.clone()]
        return drawn

    first = run(3, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, run(3, 7), strict=True))
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert not torch.equal(first[0], run(4, 0)[0])
    torch.manual_seed(5)
    one = layer()
    torch.manual_seed(6)
    other = copy.deepcopy(one)
    restart(one)
    torch.manual_seed(6)
    restart(other)
    assert torch.equal(one.lora_A, other.lora_A)  # torch.manual_seed makes it reproducible


def test_a_master_keeps_what_16_bits_would_lose() -> None:
    torch.manual_seed(0)
    with_master = layer(torch.bfloat16)
    without = copy.deepcopy(with_master)
    want = with_master.weight.detach().double()
    master: dict[str, Tensor] = {}
    for n in range(12):
        for one in (with_master, without):
            torch.manual_seed(n)
            nn.init.normal_(one.lora_A)
            nn.init.normal_(one.lora_B, std=1e-4)
        want += exact(without) - without.weight.detach().double()
        restart(with_master, master=master)
        lost = restart(without).layers[0].lost
        assert lost > 0.5  # the updates are far below a unit in the last place of W
    assert torch.equal(with_master.weight, want.bfloat16())
    assert master["the layer"].dtype == torch.float32
    torch.testing.assert_close(master["the layer"][0].double(), want, rtol=1e-6, atol=1e-7)
    assert (without.weight.double() - want).norm() > 1.5 * (with_master.weight.double() - want).norm()


def test_a_master_of_other_weights_is_refused() -> None:
    one = layer(torch.bfloat16)
    master: dict[str, Tensor] = {}
    restart(one, master=master)
    randomise(one)
    with torch.no_grad():
        one.weight[3, 4] += 1
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match="master\\['the layer'\\] does not round to the weight"):
        restart(one, master=master)
    with pytest.raises(ValueError, match=r"is \(37, 53\) in torch.float64, and must be \(1, 37, 53\)"):
        restart(one, master={"the layer": torch.zeros(37, 53, dtype=torch.float64)})
    assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    unneeded: dict[str, Tensor] = {}
    restart(layer(), master=unneeded)
    assert not unneeded  # W in fp32 is its own


def test_an_embedding_and_its_tied_head_change_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(13, 8), nn.Linear(8, 13, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(ids)))

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    ids = torch.arange(13)
    model = Tied()
    apply_lora(model, r=3, target_modules=["table", "head"], ensure_weight_tying=True)
    randomise(model)
    y = model(ids)
    assert len(restart(model).layers) == 1
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)
    assert model.head.weight is model.table.weight
    half = Tied()
    apply_lora(half, r=3, target_modules=["table"])
    with pytest.raises(ValueError, match="the weight of table is that of head too"):
        restart(half)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_pefts_tied_head_changes_with_its_embedding(fused: bool) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes))
    settings = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = peft.get_peft_model(plain, peft.LoraConfig(**settings)).eval()
    if fused:
        lora_kernels.fuse(model)
    randomise(model)
    ids = torch.arange(32)[None]
    y = model(ids).logits
    assert len(restart(model).layers) == 1
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_the_padding_row_of_an_embedding_does_not_change() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=2))
    apply_lora(model, r=2, target_modules=["0"])
    randomise(model)
    y, before = model(torch.arange(9)), model[0].weight.detach().clone()
    (done,) = restart(model).layers
    torch.testing.assert_close(model(torch.arange(9)), y)
    assert not model[0].weight[2].any()
    assert done.update == pytest.approx((model[0].weight - before).norm().item(), rel=1e-5)


def test_frozen_adapters_stay_and_a_frozen_a_is_drawn_anew() -> None:
    model = nn.Sequential(layer(), layer(n=53, k=37))
    model[0].lora_A.requires_grad_(False)
    for p in model[1].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model[1].state_dict())
    old, version = model[0].lora_A.clone(), model[0].lora_A._version
    report = restart(model)
    assert report.left == ("1",) and [done.name for done in report.layers] == ["0"]
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())
    assert not torch.equal(model[0].lora_A, old) and model[0].lora_A._version > version
    model[0].lora_B.requires_grad_(False)
    model[0].lora_A.requires_grad_(True)
    with pytest.raises(ValueError, match="restart makes zero is frozen"):
        restart(model)


def test_lora_fa_projects_with_the_new_a() -> None:
    one, x = layer(), torch.randn(6, 53)
    freeze_a(one)
    for _ in range(2):
        one(x).square().sum().backward()
        got = one.lora_B.grad.clone()
        a = one.lora_A.double()
        dy = 2 * one(x).detach().double()
        raw = one.scaling * dy.T @ (x.double() @ a.T)
        want = torch.linalg.solve(a @ a.T, raw.T).T / one.scaling**2
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
        restart(one)
        one.lora_B.grad = None


def _merged() -> nn.Module:
    one = layer()
    one.merge()
    return one


def _parametrised() -> nn.Module:
    one = layer()
    nn.utils.parametrizations.weight_norm(one, "weight")
    return one


def _switched_off() -> nn.Module:
    one = layer()
    one.scaling = 0.0
    return one


def _overflowing() -> nn.Module:
    one = layer(torch.float16)
    with torch.no_grad():
        one.lora_A.fill_(300)
        one.lora_B.fill_(300)
    return one


def _nan() -> nn.Module:
    one = layer()
    with torch.no_grad():
        one.lora_B[2, 1] = torch.nan
    return one


class _OtherLinear(FusedLoRALinear):
    """A layer of this package that reads the A and B of others too."""

    __module__ = "lora_kernels.nn.other"


def _other_kind() -> nn.Module:
    one = layer()
    one.__class__ = _OtherLinear
    return one


def _shared() -> nn.Module:
    linear = nn.Linear(6, 6)
    return nn.ModuleDict({name: FusedLoRALinear.from_linear(linear, r=2) for name in ("first", "second")})


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "merged": (_merged, r"it is merged: unmerge\(\)"),
    "quantised": (lambda: layer(k=64, quant="nf4"), "its weight is in nf4: to quantise .* again loses part"),
    "parametrised": (_parametrised, "its weight is no parameter of its own"),
    "switched off": (_switched_off, "its scaling is 0"),
    "too large for fp16": (_overflowing, "of the layer is not finite in torch.float16"),
    "NaN": (_nan, "of the layer is not finite"),
    "another kind": (_other_kind, "a _OtherLinear, whose update is not made of an A and a B of its own alone"),
    "a shared weight": (_shared, "the weight of first is that of second too"),
    "on the meta device": (lambda: layer().to("meta"), "it has no values here"),
    "no adapter": (lambda: nn.Linear(3, 4), "no trained adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused_and_nothing_changes(case: str) -> None:
    make, said = REFUSED[case]
    bad = make()
    good = layer()
    model = nn.ModuleDict({"bad": bad, "good": good}) if case not in ("no adapter", "a shared weight") else bad
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=said.replace("the layer", "bad")):
        restart(model)
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value.double().nan_to_num(9), before[key].double().nan_to_num(9)), key


@pytest.mark.parametrize("case", ["two adapters", "inactive", "disabled", "merged", "activated LoRA", "4 bits"])
def test_pefts_layers_that_cannot_be_restarted_are_refused(case: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    if case == "4 bits":
        bnb = pytest.importorskip("bitsandbytes")
        plain[0] = bnb.nn.Linear4bit(64, 64)
        plain.to("cpu")
    if case == "activated LoRA":
        config = peft.LoraConfig(r=2, target_modules=["0"], task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    model = peft.LoraModel(plain, config, "default")
    one = model.model[0]
    said = "its scaling"
    if case == "two adapters":
        one.update_layer("other", 2, 2, config)
        said = "it has the adapters other too"
    elif case == "inactive":
        one._active_adapter = []
        said = "'default' is not active"
    elif case == "disabled":
        one._disable_adapters = True
        said = "its adapters are disabled"
    elif case == "merged":
        one.merge()
        said = "it is merged"
    elif case == "activated LoRA":
        said = "an activated LoRA"
    else:
        said = "its weight is a Params4bit in torch.uint8"
    before = copy.deepcopy(one.get_base_layer().weight.data)
    with pytest.raises(ValueError, match=said):
        restart(model)
    assert torch.equal(one.get_base_layer().weight.data, before)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fsdp1_is_refused(tmp_path: Any) -> None:
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(nn.Sequential(layer()), use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"wrapped by FSDP1.*Use FSDP2"):
            restart(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"optimizer": nn.Linear(2, 2)}, TypeError, "optimizer must be a torch.optim.Optimizer .*got a Linear"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, .*got 3"),
        ({"master": []}, TypeError, "master must be a dictionary, got a list"),
        ({"master": {"up": torch.zeros(2)}}, ValueError, "master has copies of up, and none of .* such as the layer"),
        ({"prune": "0.9"}, ValueError, "prune is a fraction from 0 to 1, got '0.9'"),
    ],
)
def test_arguments_of_another_kind_are_refused_and_nothing_changes(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = layer()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=said):
        restart(model, **given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trained adapter"):
        restart(nn.Sequential())


def test_the_bias_of_pefts_b_stays_and_goes_on_counting() -> None:
    peft = pytest.importorskip("peft")
    model = peft.LoraModel(
        nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True), "default"
    )
    randomise(model)
    x = torch.randn(4, 6)
    y = model(x)
    with pytest.warns(UserWarning, match="the base weights have changed"):
        restart(model)
    torch.testing.assert_close(model(x), y)
    assert model.model[0].lora_B["default"].bias.all()


def test_old_gradients_become_zero_and_the_rest_keeps_theirs() -> None:
    model = nn.Sequential(layer(), nn.Linear(37, 3))
    model(torch.randn(4, 53)).sum().backward()
    grads = [model[0].lora_A.grad, model[0].lora_B.grad]
    restart(model)
    assert [model[0].lora_A.grad, model[0].lora_B.grad] == grads and not any(g.any() for g in grads)
    assert model[1].weight.grad.any()


def test_a_compiled_model_computes_with_the_new_weight() -> None:
    model = nn.Sequential(layer())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 53)
    y = compiled(x).detach()
    restart(compiled)
    torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-4)
    randomise(model)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_graph_of_before_the_restart_does_not_run_backward_with_the_new_weight() -> None:
    one = layer()
    x = torch.randn(4, 53, requires_grad=True)
    y = one(x).sum()
    restart(one)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_adapter_file_is_refused_afterwards(tmp_path: Any) -> None:
    model = nn.Sequential(layer())
    restart(model)
    with pytest.raises(ValueError, match="restarted"):
        lora_kernels.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="restarted"):
        lora_kernels.save_adapter(copy.deepcopy(model), tmp_path)


def test_what_peft_saves_does_not_load_alone(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(6, 5))
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="saves the adapter default without them: save the state_dict"):
        restart(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restart(randomise(model))  # once is enough
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relora"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    with pytest.raises(ValueError, match=r"'relora'.*load the state_dict of the whole model"):
        lora_kernels.load_adapter(copy.deepcopy(plain), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_weight_is_allocated(dtype: torch.dtype) -> None:
    one = layer(dtype, n=3000, k=2048, r=8)
    with torch.profiler.profile(profile_memory=True) as seen:
        restart(one)
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    blocks, factors = 3 * 4 * 2**19, 6 * 4 * 8 * (3000 + 2048)
    assert blocks <= most < blocks + factors < one.weight.numel() * dtype.itemsize


def test_the_report_is_a_table() -> None:
    model = nn.Sequential(layer(), nn.Tanh(), layer(n=53, k=37))
    text = str(restart(model))
    assert text.splitlines()[0].split() == ["layer", "‖s·B", "A‖", "lost", "to", "rounding"]
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["0", "2"]
