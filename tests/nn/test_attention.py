"""`FusedLoRAMultiheadAttention` computes what nn.MultiheadAttention computes with the merged weights: values and
gradients, for all masks and flags."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.attention_problems import attention, from_merged, gradients, masks, padding
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRAMultiheadAttention
from lora_kernels.core import accuracy, dropout

B, L, S, E, H = 2, 5, 7, 12, 3


def inputs(same: str, batched: bool, batch_first: bool, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """Return query, key and value, where `same` says which of them are one tensor."""

    def draw(length):
        shape = (length, E) if not batched else (B, length, E) if batch_first else (length, B, E)
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    query = draw(L)
    key = query if same == "qkv" else draw(S)
    return query, key, draw(S) if same == "none" else key


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("same", ["qkv", "kv", "none"])
@pytest.mark.parametrize("mask", ["none", "bool2", "float2", "bool3", "float3", "causal"])
def test_values_and_gradients_are_those_of_the_merged_weights(batch_first, same, mask):
    for bias_kv, zero, batched in itertools.product((False, True), repeat=3):
        m = attention(E, H, batch_first=batch_first, add_bias_kv=bias_kv, add_zero_attn=zero, bias=not zero)
        qkv = inputs(same, batched, batch_first)
        long = qkv[1].shape[-2 if batch_first or not batched else 0]
        attn_mask = masks(mask, B if batched else 1, H, L, long, torch.float64)
        kind = "float" if mask.startswith("float") else "bool"
        for need_weights, average, padded in ((False, True, False), (True, True, True), (True, False, False)):
            pad = padding(kind if padded else "none", B if batched else 1, long, torch.float64)
            flags = {
                "key_padding_mask": pad if pad is None or batched else pad[0],
                "need_weights": need_weights,
                "attn_mask": attn_mask,
                "average_attn_weights": average,
                "is_causal": mask == "causal",
            }
            (y, weights), (want, want_weights) = m(*qkv, **flags), from_merged(m, qkv, **flags)
            assert y.is_contiguous() and (weights is None) == (not need_weights)
            torch.testing.assert_close((y, weights), (want, want_weights))
            torch.testing.assert_close(gradients(m, qkv, y, weights), gradients(m, qkv, want, want_weights))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "adapters"), [
    (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16), (torch.float16, None),
])  # fmt: skip
def test_errors_are_those_of_plain_torch_in_the_same_dtypes(dtype, adapters, autocast):
    m = attention(64, 4, r=8, dtype=dtype, adapter_dtype=adapters, batch_first=True)
    x = torch.randn(4, 33, 64, dtype=dtype)
    exact = copy.deepcopy(m).double()
    want, _ = from_merged(exact, (x.double(),) * 3, need_weights=False)

    def linear(x, w, bias, a, b):
        y = F.linear(x, w, bias)
        return (y + F.linear(F.linear(x.to(a.dtype), a), b) * m.scaling).to(y.dtype)

    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        got, _ = m(x, x, x, need_weights=False)
        q, k, v = linear(x, m.in_proj_weight, m.in_proj_bias, m.lora_A, m.lora_B).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        plain = linear(o, m.out_proj.weight, m.out_proj.bias, m.lora_A_out, m.lora_B_out)
    assert got.dtype == (autocast or dtype) and m.lora_A.dtype == (adapters or torch.float32)
    assert accuracy.errors_beside(got.detach(), want.detach(), plain.detach()).fault is None


def test_gradients_pass_gradcheck():
    m = attention(4, 2, r=2)
    x, key = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(4, 2, 4, dtype=torch.float64)

    def function(x, key, *adapter):
        values = dict(zip(("lora_A", "lora_B", "lora_A_out", "lora_B_out"), adapter, strict=True))
        return torch.func.functional_call(m, values, (x, key, key), {"need_weights": False})[0]

    operands = x, key, m.lora_A, m.lora_B, m.lora_A_out, m.lora_B_out
    assert torch.autograd.gradcheck(function, [t.detach().requires_grad_() for t in operands])


def test_dropout_of_lora_follows_its_seeds_and_that_of_the_attention_torchs(monkeypatch):
    seeds = map(torch.tensor, itertools.count(7))
    monkeypatch.setattr("lora_kernels.ops.prepare.draw_seed", lambda device: next(seeds))
    m, x = attention(E, H, lora_dropout=0.3, dropout=0.2, batch_first=True), inputs("qkv", True, True)[0]
    torch.manual_seed(3)
    y, _ = m(x, x, x, need_weights=False)

    def low(x, a, b, seed):
        return m.scaling * dropout.dropout(x.flatten(0, -2), 0.3, torch.tensor(seed)).view_as(x) @ a.mT @ b.mT

    q, k, v = (F.linear(x, m.in_proj_weight, m.in_proj_bias) + low(x, m.lora_A, m.lora_B, 7)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
    torch.manual_seed(3)
    o = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2).transpose(1, 2).flatten(2)
    want = m.out_proj(o) + low(o, m.lora_A_out, m.lora_B_out, 8)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradients(m, (x,), y, None), gradients(m, (x,), want, None))
    m.lora_dropout = 0.0
    for need_weights in (False, True):
        torch.manual_seed(3)
        got = m(x, x, x, need_weights=need_weights)
        torch.manual_seed(3)
        torch.testing.assert_close(got, from_merged(m, (x, x, x), need_weights=need_weights))
    m.eval()
    torch.testing.assert_close(m(x, x, x), from_merged(m, (x, x, x)))


def test_the_frozen_weights_have_every_bit_after_a_thousand_forwards():
    m = attention(8, 2, dtype=torch.bfloat16)
    before = {name: t.clone() for name, t in m.state_dict().items()}
    x = torch.randn(3, 1, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        first = m.eval()(x, x, x, need_weights=False)[0]
        for _ in range(1000):
            last = m(x, x, x, need_weights=False)[0]
    assert all(torch.equal(t, before[name]) for name, t in m.state_dict().items())
    assert torch.equal(last, first)


def test_merged_weights_are_rounded_once_and_the_frozen_ones_stay():
    m, x = attention(E, H, dtype=torch.float16, batch_first=True), torch.randn(B, L, E, dtype=torch.float16)
    w, state = m.in_proj_weight, {name: t.clone() for name, t in m.state_dict().items()}
    y = m.eval()(x, x, x)[0]
    exact = w.double() + m.scaling * m.lora_B.double() @ m.lora_A.double()
    m.merge()
    assert m.merged and torch.equal(m.merged_in, exact.half()) and m.in_proj_weight is w
    torch.testing.assert_close(m(x, x, x)[0], y, rtol=2e-2, atol=2e-2)
    plain = m.to_plain()
    assert (
        type(plain) is nn.MultiheadAttention and not plain.training and torch.equal(plain.in_proj_weight, exact.half())
    )
    torch.testing.assert_close(plain(x, x, x)[0], m(x, x, x)[0], rtol=2e-2, atol=2e-2)
    assert m.state_dict().keys() == state.keys()
    m.unmerge()
    assert torch.equal(m(x, x, x)[0], y) and all(torch.equal(t, state[name]) for name, t in m.state_dict().items())
    unmerged = m.to_plain()
    assert torch.equal(unmerged.out_proj.weight, plain.out_proj.weight) and not m.merged


def test_a_merged_module_warns_where_it_would_be_trained_and_follows_what_it_loads():
    m, other, x = attention(E, H), attention(E, H), torch.randn(L, B, E, dtype=torch.float64)
    m.merge()
    with pytest.warns(UserWarning, match="is merged: its adapter gets no gradient"):
        m(x, x, x)
    m.load_state_dict(other.state_dict())
    assert m.merged
    torch.testing.assert_close(m.eval()(x, x, x), other.eval()(x, x, x))
    assert m.float().merged_in.dtype == torch.float32


def test_a_merge_that_overflows_changes_nothing():
    m = attention(E, H, dtype=torch.float16)
    with torch.no_grad():
        m.lora_A_out.fill_(1.0)
        m.lora_B_out.fill_(1e5)
    with pytest.raises(ValueError, match="not finite"):
        m.merge()
    assert not m.merged and m.merged_in is None


@pytest.mark.parametrize("bias", [False, True])
def test_the_state_of_a_plain_attention_can_be_loaded(bias):
    plain, m = nn.MultiheadAttention(E, H, bias=bias, add_bias_kv=True), attention(E, H, bias=bias, add_bias_kv=True)
    adapter = m.lora_A.clone()
    m.load_state_dict(plain.state_dict())
    assert torch.equal(m.lora_A, adapter) and m.state_dict().keys() > plain.state_dict().keys()
    assert all(torch.equal(m.state_dict()[name], t.double()) for name, t in plain.state_dict().items())
    with pytest.raises(ValueError, match="of rank 2, this module of r=3"):
        m.load_state_dict(attention(E, H, r=2, bias=bias, add_bias_kv=True).state_dict())


def test_copies_and_pickles_compute_the_same():
    m, x = attention(E, H, add_bias_kv=True).eval(), torch.randn(L, B, E, dtype=torch.float64)
    for merged in (False, True):
        if merged:
            m.merge()
        for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert torch.equal(other(x, x, x)[0], m(x, x, x)[0]) and other.merged == merged
            assert other.in_proj_weight.data_ptr() != m.in_proj_weight.data_ptr()


def test_from_attention_shares_and_freezes_the_weights():
    base = nn.MultiheadAttention(E, H, add_bias_kv=True, dtype=torch.bfloat16).eval()
    m = FusedLoRAMultiheadAttention.from_attention(base, r=4, lora_alpha=8, use_rslora=True)
    assert m.in_proj_weight is base.in_proj_weight and m.out_proj.weight is base.out_proj.weight and m.scaling == 4
    assert {name for name, p in m.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "lora_A_out", "lora_B_out",
    }  # fmt: skip
    assert m.lora_A.dtype == torch.float32 and not m.training and m.size == "12 → 36, 12 → 12"
    x = torch.randn(L, B, E, dtype=torch.bfloat16)
    torch.testing.assert_close(m(x, x, x)[0], base(x, x, x)[0], rtol=2e-2, atol=2e-2)
    parts = {key: (part.parameter, part.shape) for key, part in m.file_parts().items()}
    assert parts["base_layer.out_proj.lora_B.weight"] == ("lora_B_out", (E, 4))
    assert parts["lora_B.weight"] == ("lora_B", (3 * E, 4)) and len(parts) == 4
    for key, (name, _) in parts.items():
        value = m.get_parameter(name)
        assert torch.equal(m.from_file(key, m.to_file(key, value)), value)


class Sub(nn.MultiheadAttention):
    pass


class Other(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return None


def with_hook(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(4, 4), "a Linear, not an nn.MultiheadAttention"),
        (lambda: nn.MultiheadAttention(E, H, kdim=5), "kdim=5 and vdim=12"),
        (lambda: Other(E, H), "a Other: a subclass"),
        (lambda: with_hook(nn.MultiheadAttention(E, H)), "has hooks"),
        (lambda: prune.identity(nn.MultiheadAttention(E, H), "in_proj_weight"), "parametrised"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(make, reason):
    module = make()
    assert reason in FusedLoRAMultiheadAttention.why_not(module)
    with pytest.raises(TypeError, match=reason):
        FusedLoRAMultiheadAttention.from_attention(module)


def test_a_subclass_is_taken_alone_and_not_in_place():
    assert "a Sub: a subclass" in FusedLoRAMultiheadAttention.why_not(Sub(E, H))
    assert FusedLoRAMultiheadAttention.from_attention(Sub(E, H)).r == 8
    assert FusedLoRAMultiheadAttention.why_not(nn.MultiheadAttention(E, H)) == ""


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"r": 0}, "r must be"), ({"lora_dropout": 1.0}, "lora_dropout must"), ({"lora_alpha": float("nan")}, "finite")],
)
def test_settings_out_of_range_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        FusedLoRAMultiheadAttention.from_attention(nn.MultiheadAttention(E, H), **settings)


def test_calls_that_torch_refuses_are_refused_with_the_values():
    m, x = attention(E, H), torch.randn(L, B, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs attn_mask"):
        m(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"must have 12 features .*query \(5, 2, 11\)"):
        m(x[..., :11], x, x)
    with pytest.raises(RuntimeError, match=r"attn_mask must be \(5, 5\) or \(6, 5, 5\), got \(5, 4\)"):
        m(x, x, x, attn_mask=torch.zeros(5, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"key_padding_mask must be \(2, 5\), got \(5, 2\)"):
        m(x, x, x, key_padding_mask=torch.zeros(5, 2, dtype=torch.bool))
    nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(ValueError, match="use_nested_tensor to False"):
        m.float()(nested, nested, nested)


def test_the_inference_path_of_an_encoder_layer_does_not_pass_over_the_adapter():
    layer = nn.TransformerEncoderLayer(E, 4, 16, batch_first=True).eval()
    layer.self_attn, x = FusedLoRAMultiheadAttention.from_attention(layer.self_attn), torch.randn(B, L, E)
    with torch.no_grad():
        layer.self_attn.lora_B.normal_()
        y = layer(x)
        layer.self_attn.scaling = 0.0
        assert not torch.allclose(layer(x), y)
        layer.self_attn.scaling = 2.0
    with_grad = layer(x)
    torch.testing.assert_close(with_grad, y)
    decoder = nn.TransformerDecoderLayer(E, 4, 16, batch_first=True)
    decoder.multihead_attn = FusedLoRAMultiheadAttention.from_attention(decoder.multihead_attn)
    decoder(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(L), tgt_is_causal=True).sum().backward()
    assert decoder.multihead_attn.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, B, E), (L, 0, E), (1, 1, E)])
def test_empty_and_single_inputs_are_computed(shape):
    m, x = attention(E, H), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, _ = m(x, x, x, need_weights=False)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and torch.isfinite(m.lora_A.grad).all()


def test_strided_inputs_give_what_contiguous_ones_give():
    m, x = attention(E, H, batch_first=True), torch.randn(L, 2 * E, B, dtype=torch.float64).permute(2, 0, 1)[..., ::2]
    torch.testing.assert_close(m(x, x, x), m(*(x.contiguous(),) * 3))


def test_gradients_have_the_same_bits_in_every_run():
    m, x = attention(32, 4, dtype=torch.float32, lora_dropout=0.2), torch.randn(40, 3, 32, requires_grad=True)
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        y, _ = m(x, x, x, need_weights=False)
        runs.append([y.detach(), *gradients(m, (x,), y, None)])
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_draws_the_same_masks(reentrant):
    m, x = attention(E, H, lora_dropout=0.3, dropout=0.2), torch.randn(L, B, E, dtype=torch.float64, requires_grad=True)
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = checkpoint(lambda x: m(x, x, x)[0], x, use_reentrant=reentrant) if checkpointed else m(x, x, x)[0]
        m.zero_grad()
        x.grad = None
        y.square().sum().backward()
        runs.append([y, x.grad, m.lora_A.grad, m.lora_B.grad, m.lora_A_out.grad])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_autocast_serves_masks_weights_and_gradients():
    m, x = attention(32, 4, dtype=torch.float32, batch_first=True), torch.randn(2, 9, 32)
    mask = padding("bool", 2, 9, torch.float32)
    want, want_weights = m(x, x, x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got, weights = m(x, x, x, mask)
        plain, plain_weights = m.to_plain()(x, x, x, mask)
    assert (got.dtype, weights.dtype) == (plain.dtype, plain_weights.dtype)
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
    torch.testing.assert_close(weights.float(), want_weights, rtol=0.1, atol=0.05)
    got.float().sum().backward()
    assert m.lora_A.grad.dtype == torch.float32


def test_modes_without_gradients_give_the_same_values():
    m, x = attention(E, H).eval(), torch.randn(L, B, E, dtype=torch.float64)
    want = m(x, x, x)[0]
    with torch.no_grad():
        torch.testing.assert_close(m(x, x, x)[0], want.detach())
    base = nn.MultiheadAttention(E, H)
    with torch.inference_mode():
        torch.testing.assert_close(m(x, x, x)[0], want.detach())
        made = FusedLoRAMultiheadAttention.from_attention(base)
    made(*(x.float().requires_grad_(),) * 3)[0].sum().backward()
    assert made.lora_B.grad is not None


def test_memory_that_nobody_wrote_gives_a_new_adapter():
    with torch.device("meta"):
        m = FusedLoRAMultiheadAttention.from_attention(nn.MultiheadAttention(E, H))
    with pytest.raises(ValueError, match="meta device"):
        m.merge()
    m.to_empty(device="cpu")
    assert m.lora_B.count_nonzero() == m.lora_B_out.count_nonzero() == 0 and 0 < m.lora_A.abs().max() < 1
    m.load_state_dict(nn.MultiheadAttention(E, H).state_dict())
    with torch.device("meta"):
        m = FusedLoRAMultiheadAttention.from_attention(nn.MultiheadAttention(E, H))
    m.load_state_dict(nn.MultiheadAttention(E, H).state_dict(), assign=True)
    assert not m.lora_A_out.is_meta and m.lora_B.count_nonzero() == 0 and m.lora_A.requires_grad


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operator returns in memory of its own."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes = known, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.sizes.add(t.numel())
        return out


def test_no_tensor_of_the_size_of_a_weight_is_saved_or_made():
    m, x = attention(20, 4, r=3, lora_dropout=0.1, batch_first=True), torch.randn(1, 7, 20, dtype=torch.float64)
    x.requires_grad_()
    known = {p.untyped_storage().data_ptr() for p in m.parameters()}
    saved = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Sizes(known) as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y, _ = m(x, x, x, need_weights=False)
        y.sum().backward()
    assert not seen.sizes & {3 * 20 * 20, 20 * 20, 2 * 20 * 20}
    M, wide = 7, 8
    of_lora = M * 20 + 2 * M * 3  # x and both h
    of_attention = 3 * M * 20 + M * 20 + 4 * M * M + 4 * M  # q k v, o, and the scores or their logsumexp
    assert sum(saved.values()) <= wide * (of_lora + of_attention + 16)


@pytest.mark.slow
def test_a_compiled_attention_is_one_graph():
    m, x = attention(E, 4, dtype=torch.float32, batch_first=True), torch.randn(B, L, E, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for flags in ({"need_weights": False, "attn_mask": mask, "is_causal": True}, {"attn_mask": mask}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, weights = compiled(x, x, x, **flags)
        want, want_weights = m(x, x, x, **flags)
        torch.testing.assert_close((y, weights), (want, want_weights))
        got, exact = (gradients(m, (x,), each, None) for each in (y, want))
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
