"""`FusedLoRAEmbedding`: it computes what its base computes and LoRA, merges exactly, and keeps what it is given."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support.embedding_problems import plain
from torch import nn
from torch.nn.utils import parametrize

import lora_kernels
from lora_kernels import FusedLoRAEmbedding, FusedLoRALinear, apply_lora, load_adapter, save_adapter
from lora_kernels.nn import embedding_fit
from lora_kernels.nn.settings import LoRASettings

V, D, R = 40, 24, 4
IDS = torch.tensor([[0, 5, 39, 5], [7, 1, 2, 3]])


def scaled(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return Gemma's embedding, which multiplies its output by a buffer."""
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    return gemma3.Gemma3TextScaledWordEmbedding(V, D, 0, embed_scale=50.596).to(dtype)


BASES = {
    "plain": lambda dtype=torch.float32: nn.Embedding(V, D, dtype=dtype),
    "padding": lambda dtype=torch.float32: nn.Embedding(V, D, padding_idx=5, dtype=dtype),
    "scaled": scaled,
}


def trained(base: nn.Module | None = None, **settings) -> FusedLoRAEmbedding:
    """Return a layer whose adapter is not zero and whose magnitude is not the norm."""
    layer = FusedLoRAEmbedding.from_embedding(nn.Embedding(V, D) if base is None else base, r=R, **settings)
    nn.init.normal_(layer.lora_embedding_A)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(0.5 + torch.rand(D))
    return layer


def equation(layer: FusedLoRAEmbedding, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    m, e = getattr(layer, "lora_magnitude_vector", None), layer.embed_scale
    if isinstance(e, torch.Tensor):
        e = e.to(layer.weight.dtype).to(dtype)
    operands = (t.detach().to(dtype) for t in (layer.weight, layer.lora_embedding_A, layer.lora_embedding_B))
    magnitude = None if m is None else m.detach().to(dtype)
    rest = {"embed_scale": e, "padding_idx": layer.padding_idx, "magnitude": magnitude}
    return plain(IDS, *operands, scale=layer.scaling, **rest)


# --- values ---


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_fresh_layer_has_the_bits_of_its_base(base, dtype, dora):
    module = BASES[base](dtype)
    layer = FusedLoRAEmbedding.from_embedding(module, r=R, use_dora=dora)
    assert layer.weight is module.weight
    assert not layer.weight.requires_grad
    assert layer.lora_embedding_A.count_nonzero() == 0
    assert layer.lora_embedding_A.dtype == torch.float32
    assert torch.equal(layer(IDS), module(IDS))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_trained_layer_computes_the_equation(base, dora):
    layer = trained(BASES[base](torch.float64), use_dora=dora, use_rslora=True, lora_alpha=3)
    assert layer.scaling == 3 / R**0.5
    torch.testing.assert_close(layer(IDS), equation(layer))
    torch.testing.assert_close(layer.float()(IDS).double(), equation(layer), rtol=1e-5, atol=1e-4)


def test_the_first_steps_are_those_of_pefts_layer():
    """A starts zero and B normal, so the first gradient of B is zero and that of A is not."""
    layer = FusedLoRAEmbedding.from_embedding(nn.Embedding(V, D), r=R)
    assert 0.8 < layer.lora_embedding_B.std() < 1.2
    layer(IDS).sum().backward()
    assert layer.lora_embedding_B.grad.count_nonzero() == 0
    rows = layer.lora_embedding_A.grad.abs().sum(1).nonzero().flatten()
    assert rows.tolist() == IDS.unique().tolist()


def test_dropout_has_no_effect():
    layer = trained(lora_dropout=0.9)
    assert layer.train().lora_dropout == 0.9
    assert torch.equal(layer(IDS), layer.eval()(IDS))


def test_an_embedding_in_bf16_trains_an_adapter_in_bf16_or_fp32():
    for adapter_dtype in (None, torch.bfloat16):
        layer = trained(nn.Embedding(V, D, dtype=torch.bfloat16), adapter_dtype=adapter_dtype)
        y = layer(IDS)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert layer.lora_embedding_A.grad.dtype == (adapter_dtype or torch.float32)
    with pytest.raises(TypeError, match="adapter_dtype must be the weight's"):
        FusedLoRAEmbedding(V, D, adapter_dtype=torch.float16)


def test_a_layer_that_is_made_in_inference_mode_can_be_trained():
    base = nn.Embedding(V, D)
    with torch.inference_mode():
        layer = FusedLoRAEmbedding.from_embedding(base, r=R, use_dora=True)
    layer(IDS).sum().backward()
    assert layer.lora_embedding_A.grad is not None
    with torch.inference_mode():
        layer.merge()
    layer.unmerge()
    layer(IDS).sum().backward()


def test_threads_compute_the_same_layer_at_once():
    layer, found = trained(use_dora=True), {}
    want = layer(IDS).detach()

    def run(i: int) -> None:
        found[i] = layer(IDS + i - i).detach()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], want) for i in range(4))


# --- merging ---


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_merge_is_rounded_once_and_unmerge_gives_the_parameter_back(base, dtype, dora):
    layer = trained(BASES[base](dtype), use_dora=dora).eval()
    before, y = layer.weight, layer(IDS)
    table = copy.deepcopy(layer).double()
    if isinstance(table.embed_scale, torch.Tensor):
        table.embed_scale.fill_(1)
    exact = table(torch.arange(V))
    layer.merge()
    assert layer.merged
    layer.merge()
    tolerance = 1.01 * torch.finfo(dtype).eps / 2 + (2**-20 if dora else 0)
    assert ((layer.weight.double() - exact).abs() <= tolerance * exact.abs() + 1e-30).all()
    torch.testing.assert_close(layer(IDS), y)
    assert torch.equal(layer.to_plain()(IDS), layer(IDS))
    assert torch.equal(layer.state_dict()["weight"], before)
    layer.unmerge()
    assert layer.weight is before
    assert torch.equal(layer(IDS), y)
    plain_layer = layer.to_plain()
    assert type(plain_layer) is type(BASES[base]())
    assert plain_layer.padding_idx == layer.padding_idx
    torch.testing.assert_close(plain_layer(IDS), y)


def test_a_merge_leaves_a_tied_head_as_it_is():
    """PEFT merges into the table in place, which changes the head too."""
    head = nn.Linear(D, V, bias=False)
    base = nn.Embedding(V, D)
    base.weight = head.weight
    layer = trained(base)
    x, delta = torch.randn(3, D), layer.scaling * layer.lora_embedding_A @ layer.lora_embedding_B.t()
    want = head(x)
    layer.merge()
    assert torch.equal(head(x), want)
    torch.testing.assert_close(layer.weight, head.weight + delta)
    layer.unmerge()
    assert layer.weight is head.weight


def test_a_merge_that_would_be_wrong_changes_nothing():
    layer = trained()
    before = layer.weight
    with torch.no_grad():
        layer.lora_embedding_B[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert layer.weight is before
    layer.merge(safe=False)
    layer.unmerge()
    with torch.device("meta"):
        absent = FusedLoRAEmbedding(V, D, r=R)
    with pytest.raises(ValueError, match="meta device"):
        absent.merge()
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrised"):
        layer.merge()


def test_a_merged_layer_warns_in_training_and_takes_no_other_table():
    layer = trained()
    layer.merge()
    with pytest.warns(UserWarning, match="gets no gradient until unmerge"):
        layer.train()(IDS)
    with pytest.raises(ValueError, match="unmerge"):
        layer.weight = nn.Parameter(torch.zeros(V, D))


def test_a_merged_layer_that_accelerate_offloads_is_refused():
    accelerate = pytest.importorskip("accelerate")
    layer = trained().eval()
    y = layer(IDS)
    accelerate.cpu_offload(layer, torch.device("cpu"))
    torch.testing.assert_close(layer(IDS), y)
    with pytest.raises(ValueError, match="meta device"):
        layer.merge()
    accelerate.hooks.remove_hook_from_module(layer)
    layer.merge()
    accelerate.cpu_offload(layer, torch.device("cpu"))
    with pytest.raises(ValueError, match="was merged when accelerate offloaded it"):
        layer(IDS)


# --- state ---


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_layers_of_their_own(merged):
    layer = trained(use_dora=True).eval()
    if merged:
        layer.merge()
    y = layer(IDS)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(IDS), y)
        other.unmerge()
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(layer(IDS), y)


@pytest.mark.parametrize("merged", [False, True])
def test_a_state_dict_makes_the_round_trip(merged):
    layer, other = trained(use_dora=True), FusedLoRAEmbedding(V, D, r=R, use_dora=True)
    y = layer(IDS)
    if merged:
        layer.merge()
        other.merge()
    state = layer.state_dict()
    assert set(state) == {"weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    other.load_state_dict(state)
    assert other.merged is merged
    other.unmerge()
    assert torch.equal(other(IDS), y)
    with pytest.raises(ValueError, match=r"lora_embedding_A \(40, 4\) is of rank 4, this module of r=2"):
        FusedLoRAEmbedding(V, D, r=2).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_dict_of_a_plain_embedding_is_a_new_base(assign):
    base = nn.Embedding(V, D)
    with torch.device("meta" if assign else "cpu"):
        layer = FusedLoRAEmbedding(V, D, r=R, use_dora=True)
    layer.load_state_dict(base.state_dict(), assign=assign)
    assert torch.equal(layer(IDS), base(IDS))


def test_a_layer_on_the_meta_device_is_filled_by_to_empty_and_its_checkpoint():
    base = scaled()
    layer = FusedLoRAEmbedding.from_embedding(copy.deepcopy(base).to("meta"), r=R, use_dora=True)
    layer.to_empty(device="cpu").load_state_dict(base.state_dict())
    assert layer.embed_scale == base.embed_scale
    assert torch.equal(layer(IDS), base(IDS))
    layer.reset_parameters()
    assert layer.weight[0].count_nonzero() == 0
    assert torch.isfinite(layer(IDS)).all()


def test_a_merged_layer_moves_with_its_base():
    layer = trained()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert not [name for name, _ in layer.named_parameters() if name.startswith("_")]


def test_a_compiled_layer_is_one_graph_and_gives_the_same_bits():
    layer = trained(scaled(), use_dora=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(IDS)
    assert torch.equal(y, layer(IDS))


def test_symbolic_trace_records_one_node():
    layer = trained()
    graph = torch.fx.symbolic_trace(layer)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [lora_kernels.lora_embedding]
    assert torch.equal(graph(IDS), layer(IDS))


# --- what is refused ---


class Shifted(nn.Embedding):
    def forward(self, input):
        return super().forward(input + 1)


def hooked() -> nn.Embedding:
    base = nn.Embedding(V, D)
    base.register_forward_hook(lambda *_: None)
    return base


REFUSED = {
    "max_norm=1.5, which rewrites rows of the table": lambda: nn.Embedding(V, D, max_norm=1.5),
    "sparse=True, and the gradient of A is dense": lambda: nn.Embedding(V, D, sparse=True),
    "scale_grad_by_freq": lambda: nn.Embedding(V, D, scale_grad_by_freq=True),
    "it has hooks": hooked,
    "a Shifted: a subclass of nn.Embedding may compute something else": lambda: Shifted(V, D),
    "a Linear, not an nn.Embedding": lambda: nn.Linear(V, D),
    "a EmbeddingBag, not an nn.Embedding": lambda: nn.EmbeddingBag(V, D),
    "a FusedLoRAEmbedding, not an nn.Embedding": lambda: FusedLoRAEmbedding(V, D),
    "a ParametrizedEmbedding: a subclass": lambda: parametrize.register_parametrization(
        nn.Embedding(V, D), "weight", nn.Identity()
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_base_that_it_cannot_stand_in_for_is_refused(reason):
    with pytest.raises(TypeError, match=reason):
        FusedLoRAEmbedding.from_embedding(REFUSED[reason]())


def test_settings_that_an_embedding_cannot_have_are_refused():
    base = nn.Embedding(V, D)
    for settings, text in (
        (LoRASettings(quant="nf4"), "the table of an embedding is not quantised"),
        (LoRASettings(init="pissa"), "init='pissa' is for linear layers"),
        (LoRASettings(r=0), "r must be an integer of at least 1"),
        (LoRASettings(backend="none"), "there is no back-end 'none'"),
    ):
        with pytest.raises(ValueError, match=text):
            FusedLoRAEmbedding.from_settings(base, settings)
    assert base.weight.requires_grad, "nothing was changed"


def test_the_scaled_embeddings_of_transformers_are_known_by_what_they_compute():
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    for base in (scaled(), bart.BartScaledWordEmbedding(V, D, 1, embed_scale=3.0)):
        assert embedding_fit.is_scaled(base)
        layer = trained(base)
        torch.testing.assert_close(layer(IDS), equation(layer, torch.float32))
        assert type(layer.to_plain()) is type(base)
    with pytest.raises(TypeError, match="BartLearnedPositionalEmbedding: a subclass"):
        FusedLoRAEmbedding.from_embedding(bart.BartLearnedPositionalEmbedding(V, D))


def test_resizing_the_table_of_a_model_with_an_adapter_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    apply_lora(model, r=R, target_modules=["wte"])
    with pytest.raises(TypeError, match="FusedLoRAEmbedding"):
        model.resize_token_embeddings(V + 3)


# --- models and files ---


@pytest.mark.parametrize("dora", [False, True])
def test_pefts_files_are_read_and_written(tmp_path, dora):
    peft = pytest.importorskip("peft")
    pytest.importorskip("safetensors")

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(V, D, padding_idx=5), nn.Linear(D, 6))

    ours = model()
    apply_lora(ours, r=R, lora_alpha=6, lora_dropout=0.1, target_modules=["0", "1"], use_dora=dora)
    for p in ours.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    with torch.no_grad():
        ours[0].lora_embedding_A[5] = 0
    ours.eval()
    want = ours(IDS)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS), want, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = model()
    load_adapter(again, tmp_path / "theirs")
    assert isinstance(again[0], FusedLoRAEmbedding)
    assert isinstance(again[1], FusedLoRALinear)
    assert torch.equal(again.eval()(IDS), want)
