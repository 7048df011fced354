"""PEFT's embeddings are fused: the values and gradients of PEFT, and the right ones where PEFT's are not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft", reason="PEFT is not installed")
from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Embedding as PeftEmbedding  # noqa: E402

import lora_kernels  # noqa: E402
from lora_kernels.peft.embedding import FusedEmbedding  # noqa: E402

V, D = 40, 24
IDS = torch.tensor([[0, 5, 39, 5], [7, 1, 2, 3]])


class Net(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.up = table, nn.Linear(D, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.table(ids).to(self.up.weight.dtype))


def make(table: nn.Module | None = None, **settings) -> nn.Module:
    """Return a PEFT model whose adapter is not zero, but in the row of padding_idx."""
    table = nn.Embedding(V, D) if table is None else table
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["table"], "init_lora_weights": False} | settings
    model = get_peft_model(Net(table), LoraConfig(**settings))
    layer = table_of(model)
    with torch.no_grad():
        if table.padding_idx is not None:
            layer.lora_embedding_A["default"][:, table.padding_idx] = 0
        for m in layer.lora_magnitude_vector.values():
            m.weight.mul_(0.5 + torch.rand(D))
    return model


def table_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.table


def fused(model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    report = lora_kernels.fuse(own, strict=True)
    assert report.fused["base_model.model.table"].startswith(f"{V}×{D}, default r=")
    return own


def run(model: nn.Module, ids: Tensor = IDS) -> list[Tensor]:
    """Return y and the gradients of the adapter. The gradient of y is the same in every run."""
    y = model(ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, trained, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))]


def scaled(dtype: torch.dtype = torch.float32) -> nn.Module:
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    return gemma3.Gemma3TextScaledWordEmbedding(V, D, 0, embed_scale=50.596).to(dtype)


# --- as PEFT computes it ---


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("table", ["plain", "padding", "scaled"])
def test_values_and_gradients_are_pefts(table, dora):
    base = {"plain": lambda: nn.Embedding(V, D), "padding": lambda: nn.Embedding(V, D, 5), "scaled": scaled}[table]()
    model = make(base, use_dora=dora, use_rslora=True).double()
    own = fused(model)
    torch.testing.assert_close(run(own), run(model))
    assert table_of(own).fused_calls == 1
    assert not table_of(own).passed_over
    got, peers, exact = run(own.float()), run(model.float()), run(model.double())
    for mine, theirs, want in zip(got, peers, exact, strict=True):
        assert (mine - want).abs().max() <= 2 * (theirs - want).abs().max() + 2**-22 * want.abs().max()


def test_fp32_adapters_beside_a_table_in_bf16():
    model = make(nn.Embedding(V, D, dtype=torch.bfloat16))
    assert table_of(model).lora_embedding_A.default.dtype == torch.float32
    own = fused(model)
    exact = run(copy.deepcopy(model).double())
    for mine, theirs, want in zip(run(own), run(model), exact, strict=True):
        assert (mine - want).abs().max() <= 2 * (theirs - want).abs().max() + 2**-22 * want.abs().max()


def test_several_active_adapters_are_added_up():
    model = make().double()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["table"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.double()
    own = fused(model)
    torch.testing.assert_close(run(own), run(model))
    assert table_of(own).fused_calls == 1


def test_lora_dropout_has_no_effect_as_in_peft():
    model = make(lora_dropout=0.9).train()
    torch.testing.assert_close(run(fused(model)), run(model))


def test_adapters_are_disabled_merged_switched_and_deleted_as_in_peft():
    model = fused(make()).eval()
    layer, y = table_of(model), model(IDS)
    with model.disable_adapter():
        assert torch.equal(layer(IDS), layer.base_layer(IDS))
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS), y)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["table"]))
    model.set_adapter("other")
    assert torch.equal(layer(IDS), layer.base_layer(IDS)), "a new adapter is zero"
    model.set_adapter("default")
    torch.testing.assert_close(model(IDS), y)
    assert not layer.passed_over
    lora_kernels.unfuse(model)
    assert type(layer) is PeftEmbedding
    torch.testing.assert_close(model(IDS), y)


def test_a_copy_and_a_compiled_model_are_fused():
    model = fused(make(use_dora=True))
    y = model(IDS)
    assert isinstance(table_of(copy.deepcopy(model)), FusedEmbedding)
    compiled = torch.compile(table_of(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(model.base_model.model.up(compiled(IDS)), y)


def test_enable_fuses_the_embeddings_that_peft_makes():
    lora_kernels.enable()
    try:
        model = make()
    finally:
        lora_kernels.disable()
    assert isinstance(table_of(model), FusedEmbedding)


def test_verify_finds_the_fused_forward():
    model = make()
    report = lora_kernels.fuse(model, verify=(IDS,))
    assert not report.not_fused
    assert len(report.fused) == 1


# --- tied heads, trained rows ---


def llama(**settings) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(transformers.LlamaForCausalLM(config).double(), LoraConfig(r=4, **settings))


def test_a_tied_head_has_the_values_and_gradients_of_its_shared_adapter():
    model = llama(target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    want = _of_llama(model)
    assert len(lora_kernels.fuse(model, strict=True).fused) == 2
    torch.testing.assert_close(_of_llama(model), want)
    layer, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert layer.fused_calls == head.fused_calls == 1
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert head.lora_A["default"].weight.data_ptr() == b.data_ptr()
    x, s = torch.randn(3, D, dtype=torch.float64), layer.scaling["default"]
    torch.testing.assert_close(head(x), x @ (layer.base_layer.weight + s * (b @ a).t()).t())


def _of_llama(model: nn.Module) -> list[Tensor]:
    logits = model(IDS).logits
    grads = torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return [logits.detach(), *grads]


def test_trained_rows_of_a_table_stay_beside_fused_linears():
    """PEFT refuses trainable_token_indices for a table that has LoRA too."""
    model = llama(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    own = copy.deepcopy(model)
    assert len(lora_kernels.fuse(own, strict=True).fused) == 1
    torch.testing.assert_close(_of_llama(own), _of_llama(model))
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied"):
        llama(target_modules=["embed_tokens"], trainable_token_indices={"embed_tokens": [1, 2]})


# --- the right values where PEFT's are wrong ---


@pytest.mark.parametrize("dora", [False, True])
def test_the_padding_row_gets_no_delta(dora):
    model = make(nn.Embedding(V, D, padding_idx=5), use_dora=dora)
    own = fused(model)
    with torch.no_grad():
        for each in (model, own):
            nn.init.ones_(table_of(each).lora_embedding_A["default"])
    own, model = table_of(own), table_of(model)
    ids = torch.tensor([5])
    if not dora:
        assert torch.equal(own(ids), own.base_layer(ids))
        assert not torch.allclose(model(ids), own.base_layer(ids)), "PEFT's has one"
    (grad,) = torch.autograd.grad(own(IDS).sum(), [own.lora_embedding_A["default"]])
    assert grad[:, 5].count_nonzero() == 0
    assert grad.count_nonzero() > 0


def test_a_sparse_table_gets_a_dense_gradient():
    model = make(nn.Embedding(V, D, sparse=True))
    want = run(make_like(model, nn.Embedding(V, D)))
    with pytest.raises(RuntimeError):
        run(model)
    torch.testing.assert_close(run(fused(model)), want)


def make_like(model: nn.Module, table: nn.Module) -> nn.Module:
    other = make(table)
    other.load_state_dict(model.state_dict())
    return other


def test_a_table_with_max_norm_is_left_to_peft_with_the_reason():
    """PEFT renormalises the columns of A in place, in every forward."""
    model = make(nn.Embedding(V, D, max_norm=1.0))
    report = lora_kernels.fuse(model)
    assert "max_norm=1, which rewrites rows of the table" in report.not_fused["base_model.model.table"]
    assert type(table_of(model)) is PeftEmbedding
    before = table_of(model).lora_embedding_A["default"].detach().clone()
    model(IDS)
    assert not torch.equal(table_of(model).lora_embedding_A["default"], before)


class _Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returns. An operator of ours counts as one:
    tests/ops/test_embedding.py looks inside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not t._is_view():
                self.largest = max(self.largest, t.numel())
        return out


def test_dora_allocates_nothing_of_the_size_of_the_table():
    model = make(use_dora=True)
    own = fused(model)
    found = []
    for each in (model, own):
        with _Largest() as seen:
            table_of(each)(IDS)
        found.append(seen.largest)
    assert found[0] >= V * D, "PEFT forms E + ΔE"
    assert found[1] == IDS.numel() * D, "y"


# --- what is left to PEFT ---


class Shifted(nn.Embedding):
    def forward(self, input):
        return super().forward((input + 1) % V)


def test_whole_layers_are_left_to_peft_with_a_reason():
    def hooked() -> nn.Module:
        table = nn.Embedding(V, D)
        table.register_forward_hook(lambda *_: None)
        return table

    for table, reason in (
        (Shifted(V, D), "its base is a Shifted with a forward of its own"),
        (nn.Embedding(V, D, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (hooked(), "its base layer has hooks"),
    ):
        model = make(table)
        want = run(model)
        assert reason in lora_kernels.fuse(model).not_fused["base_model.model.table"]
        torch.testing.assert_close(run(model), want)
        with pytest.raises(RuntimeError, match=reason):
            lora_kernels.fuse(model, strict=True)


def test_single_calls_are_left_to_peft_and_counted():
    model = make().eval()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["table"], init_lora_weights=False))
    own = fused(model)
    names = ["default", "other"]
    torch.testing.assert_close(own(IDS, adapter_names=names), model(IDS, adapter_names=names))
    assert table_of(own).passed_over == {"adapter_names, with an adapter of its own for each sample": 1}
    table_of(own).base_layer.weight.requires_grad_(True)
    own(IDS)
    assert table_of(own).passed_over["its base weight is trained"] == 1
    assert table_of(own).fused_calls == 0


def test_dora_beside_another_adapter_is_left_to_peft():
    model = make(use_dora=True)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["table"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    own = fused(model)
    torch.testing.assert_close(own(IDS), model(IDS))
    assert table_of(own).passed_over == {"a DoRA adapter beside others": 1}


def test_mixed_refuses_a_model_with_an_adapted_embedding():
    model = make(target_modules=["table", "up"]).eval()
    lora_kernels.fuse(model, strict=True)
    with pytest.raises(RuntimeError, match=r"table: a FusedEmbedding, which computes the same adapters for all rows"):
        lora_kernels.mixed(model, ["default", None])


def test_a_forward_that_another_package_has_put_in_place_is_kept(monkeypatch):
    def forward(self, x):
        return F.embedding(x, self.base_layer.weight) * 2

    monkeypatch.setattr(PeftEmbedding, "forward", forward)
    model = make()
    assert "has been replaced by a function of" in lora_kernels.fuse(model).not_fused["base_model.model.table"]
