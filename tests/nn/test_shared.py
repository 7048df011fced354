"""Layers that share A and B: their values and gradients, the B' that evaluation keeps, and where A and B are held."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nn import shared as shared_layers
from lora_kernels.nn.parallel import ColwiseLoRA
from lora_kernels.nn.shared import SharedLoRAConv1D, SharedLoRALinear, SharedQuantizedLoRALinear
from lora_kernels.nn.shared_factors import SharedFactors, placed

R, WIDE, TALL = 5, 48, 40
SIZES = {"one": (32, 24), "two": (WIDE, 16), "three": (16, TALL)}


class Net(nn.Module):
    """Three linear layers side by side, of different shapes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, (K, N) in SIZES.items():
            setattr(self, name, nn.Linear(K, N, bias=name != "two", dtype=dtype))

    def forward(self, x):
        return torch.cat([getattr(self, name)(x[..., :K]) for name, (K, _) in SIZES.items()], -1)


def shared(dtype=torch.float32, adapters=None, kind=SharedLoRALinear, net=None, train=(True, True), **settings):
    """Return a net whose layers share factors, with values that are not those of the start."""
    net = Net(dtype) if net is None else net
    adapters = adapters or dtype
    factors = SharedFactors(R, WIDE, TALL, train_a=train[0], train_b=train[1], dtype=adapters)
    for name in SIZES:
        more = {"adapter_dtype": adapters, "lora_alpha": 3.0, **settings}
        setattr(net, name, kind.from_linear(getattr(net, name), factors, **more))
    placed(net, factors, net.one)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.5)
    return net


def formula(net, x):
    """Return y in fp64 by the formula, from leaves in fp64 under the names of the net's parameters, and the leaves."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters() if "lora_" in name}
    leaves["x"] = x.detach().double().requires_grad_()
    parts = []
    for name, (K, N) in SIZES.items():
        layer = getattr(net, name)
        w = layer.frozen_weight()
        w = w.double() if isinstance(w, torch.Tensor) else w.dequantize(torch.float32).double()
        bias = None if layer.bias is None else layer.bias.double()
        delta = torch.diag(leaves[f"{name}.lora_v"]) @ leaves["lora_shared.lora_B"][:N]
        delta = delta @ torch.diag(leaves[f"{name}.lora_u"]) @ leaves["lora_shared.lora_A"][:, :K]
        parts.append(F.linear(leaves["x"][..., :K], w + 3.0 / R * delta, bias))
    return torch.cat(parts, -1), leaves


def check(net, x, tolerance):
    x = x.requires_grad_()
    y, (want, leaves) = net(x), formula(net, x)
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    y.backward(dy.to(y.dtype))
    want.backward(dy)
    own = {**dict(net.named_parameters()), "x": x}
    for name, leaf in leaves.items():
        if own[name].requires_grad:
            scale = float(leaf.grad.abs().max()) or 1.0
            got = own[name].grad.double() / scale
            torch.testing.assert_close(got, leaf.grad / scale, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("dtypes", "tolerance"), [
    ((torch.float64, torch.float64), 1e-12), ((torch.float32, torch.float32), 1e-5),
    ((torch.bfloat16, torch.float32), 4e-2), ((torch.bfloat16, torch.bfloat16), 6e-2),
])  # fmt: skip
def test_layers_compute_the_formula_and_shared_gradients_are_sums_over_layers(dtypes, tolerance):
    check(shared(*dtypes), torch.randn(9, WIDE).to(dtypes[0]), tolerance)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantised_layers_compute_the_formula(quant):
    net = shared(quant=quant)
    assert all(type(getattr(net, name)) is SharedQuantizedLoRALinear for name in SIZES)
    check(net, torch.randn(9, WIDE), 1e-5)


def conv1d(net):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for name, (K, N) in SIZES.items():
        setattr(net, name, Conv1D(N, K))
    return net


class _OverConv1D(SharedLoRAConv1D):
    from_linear = classmethod(SharedLoRALinear.from_linear.__func__)


def test_conv1d_layers_compute_the_formula():
    check(shared(kind=_OverConv1D, net=conv1d(Net())), torch.randn(9, WIDE), 1e-5)


def test_frozen_vectors_and_matrices_get_no_gradient():
    net = shared(train=(False, True), train_u=False)
    net(torch.randn(3, WIDE)).sum().backward()
    with_grad = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_grad == {f"{name}.lora_v" for name in SIZES} | {"lora_shared.lora_B"}


def test_dropout_is_on_x_in_the_update_alone_while_training():
    net, x = shared(lora_dropout=0.5), torch.randn(4, WIDE)
    with torch.no_grad():
        one, other = net(x), net(x)
        assert not torch.equal(one, other)
        net.eval()
        assert torch.equal(net(x), net(x))
        for name in SIZES:
            getattr(net, name).lora_v.zero_()
        assert torch.equal(net.train()(x), net.eval()(x))


def test_a_fresh_layer_computes_what_its_base_does_and_has_the_first_values_of_vera():
    linear, factors = nn.Linear(32, 24), SharedFactors(R, WIDE, TALL, key=3)
    layer, x = SharedLoRALinear.from_linear(linear, factors), torch.randn(3, 32)
    assert layer.scaling == 1.0 and layer.weight is linear.weight
    assert torch.equal(layer.lora_u, torch.full((R,), 0.1)) and not layer.lora_v.any()
    torch.testing.assert_close(layer(x), linear(x))
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(R, WIDE, generator=generator)
    b = torch.rand(TALL, R, generator=generator)
    torch.testing.assert_close(factors.lora_A, (2 * a - 1) * math.sqrt(6 / WIDE))
    torch.testing.assert_close(factors.lora_B, (2 * b - 1) * math.sqrt(6 / R))


# --- the B' that evaluation keeps ---


def evaluated(**settings):
    """Return a net that has kept B' in each layer, and an x."""
    net, x = shared(train=(False, False), **settings).eval(), torch.randn(3, WIDE)
    with torch.no_grad():
        net(x)
    assert all(getattr(net, name)._kept is not None for name in SIZES)
    return net, x


def agrees(net, x):
    with torch.no_grad():
        torch.testing.assert_close(net(x).double(), formula(net, x)[0], rtol=1e-4, atol=1e-4)


def _replace_b(net):
    net.lora_shared.lora_B = nn.Parameter(torch.randn(TALL, R), requires_grad=False)


def _remake_b(net):
    """Free B and make a new one that was written to as often, at the old address if the allocator gives it."""
    address, version = net.lora_shared.lora_B.data_ptr(), net.lora_shared.lora_B._version
    del net.lora_shared.lora_B
    made = [torch.empty(TALL, R) for _ in range(200)]
    new = next((t for t in made if t.data_ptr() == address), made[0])
    net.lora_shared.lora_B = nn.Parameter(new, requires_grad=False)
    for _ in range(version):
        net.lora_shared.lora_B.normal_()
    assert net.lora_shared.lora_B._version == version


CHANGES = {
    "v in place": lambda net: net.one.lora_v.mul_(2),
    "v through .data": lambda net: net.one.lora_v.data.mul_(2),
    "u in place": lambda net: net.two.lora_u.mul_(2),
    "u through a view": lambda net: net.two.lora_u.detach().numpy().__imul__(2),
    "B in place": lambda net: net.lora_shared.lora_B.mul_(2),
    "B replaced": _replace_b,
    "B made anew": _remake_b,
    "B given other memory": lambda net: setattr(net.lora_shared.lora_B, "data", torch.randn(TALL, R)),
    "v replaced": lambda net: setattr(net.one, "lora_v", nn.Parameter(torch.randn(24))),
    "loaded": lambda net: net.load_state_dict({name: 2 * t for name, t in net.state_dict().items()}),
    "moved": lambda net: net.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_kept_fold_is_stale_when_anything_of_it_has_changed(change, quant):
    if quant and change == "loaded":
        pytest.skip("twice a quantised weight is no weight")
    net, x = evaluated(quant=quant)
    with torch.no_grad():
        CHANGES[change](net)
    agrees(net, x)
    agrees(net, x)


def test_a_kept_fold_is_used_while_nothing_changes(monkeypatch):
    net, x = evaluated()
    before = [getattr(net, name)._kept for name in SIZES]
    with torch.no_grad():
        one = net(x)
        assert [getattr(net, name)._kept for name in SIZES] == before
        monkeypatch.setattr(shared_layers, "kept_fold", lambda *_: None)
        torch.testing.assert_close(one, net(x))


def test_nothing_is_kept_in_training_with_gradients_or_beside_a_trained_b():
    net, x = shared(train=(False, False)), torch.randn(3, WIDE)
    with torch.no_grad():
        net(x)  # in training mode
    net.eval()(x)  # with gradients
    assert net.one._kept is None
    net, x = evaluated()
    net.train()(x)
    assert net.one._kept is None
    net = shared(train=(False, True)).eval()
    with torch.no_grad():
        net(x)
    assert net.one._kept is None


def test_what_inference_mode_keeps_serves_every_later_mode():
    net, x = shared(train=(False, False)).eval(), torch.randn(3, WIDE)
    with torch.inference_mode():
        one = net(x)
    assert not net.one._kept.folded.is_inference()
    with torch.no_grad():
        assert torch.equal(net(x), one)
    net(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_a_trace_holds_no_kept_fold():
    net, x = evaluated()
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
        net.one.lora_v.mul_(3)
        torch.testing.assert_close(traced(x), net(x))


def test_torch_fx_records_the_whole_parameters():
    for net in (evaluated()[0], shared()):
        x = torch.randn(3, WIDE)
        with torch.no_grad():
            traced = torch.fx.symbolic_trace(net)
        net.one.lora_v.data.mul_(3)
        net.lora_shared.lora_A.data.mul_(2)
        torch.testing.assert_close(traced(x), net(x))
        assert "lora_shared.lora_A" in dict(traced.named_parameters())


def test_copies_and_pickles_have_factors_of_their_own_and_no_kept_fold():
    net, x = evaluated()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert {id(getattr(other, name).factors) for name in SIZES} == {id(other.lora_shared)}
        assert other.lora_shared is not net.lora_shared and other.one._kept is None
        with torch.no_grad():
            assert torch.equal(other(x), net(x))
            other.lora_shared.lora_A.zero_()
        agrees(net, x)


def test_threads_that_evaluate_while_folds_are_dropped_compute_the_same():
    net, x = evaluated()
    wrong = []

    def run():
        with torch.no_grad():
            for _ in range(50):
                y = net.one(x[:, :32])
                if not torch.allclose(y, want, rtol=1e-4, atol=1e-5):
                    wrong.append(y)

    with torch.no_grad():
        want = net.one(x[:, :32])
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        net.one.__dict__["_kept"] = None
    for thread in threads:
        thread.join()
    assert not wrong


# --- where A and B are held ---


def test_a_and_b_are_parameters_of_the_model_once():
    net = shared()
    names = [name for name in net.state_dict() if "lora_A" in name or "lora_B" in name]
    assert names == ["lora_shared.lora_A", "lora_shared.lora_B"]
    assert (
        sum(p.numel() for name, p in net.named_parameters() if "lora_" in name)
        == R * (WIDE + TALL + 3) + 24 + 16 + TALL
    )
    sequential = nn.Sequential(nn.Linear(8, 8))
    factors = SharedFactors(2, 8, 8)
    sequential[0] = SharedLoRALinear.from_linear(sequential[0], factors)
    placed(sequential, factors, sequential[0])
    assert len(sequential) == 1 and "0.lora_shared.lora_A" in sequential.state_dict()
    with pytest.raises(TypeError, match="no step of a model"):
        factors(torch.ones(1))


def test_safetensors_writes_a_state_with_a_and_b_once(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    net, x = shared(), torch.randn(3, WIDE)
    st.save_model(net, tmp_path / "model.safetensors")
    st.save_file(net.state_dict(), tmp_path / "state.safetensors")
    assert sum("lora_A" in name for name in st.load_file(tmp_path / "state.safetensors")) == 1
    other = shared()
    st.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(x), net(x))


def test_the_state_of_the_plain_model_loads_and_keeps_the_adapters():
    net, x = shared(), torch.randn(3, WIDE)
    before = {name: p.clone() for name, p in net.named_parameters() if "lora_" in name}
    assert not net.load_state_dict(Net().state_dict()).missing_keys
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if "lora_" in name)
    check(net, x, 1e-5)


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_model_on_the_meta_device_is_filled(assign, plain, quant):
    full = shared(quant=quant)
    with torch.device("meta"):
        empty = shared(quant=quant)
    if not assign:
        empty.to_empty(device="cpu")
        assert torch.equal(empty.lora_shared.lora_A, SharedFactors(R, WIDE, TALL).lora_A)
        assert torch.equal(empty.one.lora_u, torch.full((R,), 0.1)) and not empty.one.lora_v.any()
    state = Net().state_dict() if plain else full.state_dict()
    empty.load_state_dict(state, assign=assign)
    x = torch.randn(3, WIDE)
    assert {p.device.type for p in empty.parameters()} == {"cpu"}
    if plain:
        assert torch.equal(empty.lora_shared.lora_B, SharedFactors(R, WIDE, TALL).lora_B)
        assert torch.equal(empty.one.lora_u, torch.full((R,), 0.1))
    else:
        assert torch.equal(empty(x), full(x))
    check(empty, x, 1e-5)


def test_another_rank_is_refused_by_name():
    net, factors = shared(), SharedFactors(R + 1, WIDE, TALL)
    with pytest.raises(ValueError, match=r"lora_A \(6, 48\) is of rank 6, this module of r=5"):
        net.lora_shared.load_state_dict(factors.state_dict())
    with pytest.raises(ValueError, match=r"one.lora_u \(6,\) is of rank 6"):
        net.load_state_dict({**net.state_dict(), "one.lora_u": torch.ones(6)})


def test_conversions_move_the_layers_and_the_factors_together():
    net, x = shared().double(), torch.randn(3, WIDE, dtype=torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    check(net, x, 1e-12)


def test_a_layer_that_is_moved_without_the_model_is_refused_with_the_way_out():
    net = shared()
    net.one.to("meta")
    with pytest.raises(ValueError, match="move the whole model"):
        net.one(torch.randn(3, 32, device="meta"))


def test_an_offloaded_model_says_how_to_keep_its_factors():
    accelerate = pytest.importorskip("accelerate")
    net, x = shared(train=(False, False)), torch.randn(3, WIDE)
    want = net(x)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"remove_hook_from_module\(model.lora_shared\)"):
        net(x)
    accelerate.hooks.remove_hook_from_module(net.lora_shared)
    assert torch.equal(net(x), want)


# --- merging ---


@pytest.mark.parametrize("conv", [False, True])
def test_merge_and_unmerge_are_exact(conv):
    net = shared(kind=_OverConv1D, net=conv1d(Net())) if conv else shared()
    x = torch.randn(5, WIDE)
    weights = [getattr(net, name).weight for name in SIZES]
    want = formula(net, x)[0]
    with pytest.warns(UserWarning, match="is merged: its adapter gets no gradient"):
        for name in SIZES:
            getattr(net, name).merge()
        torch.testing.assert_close(net(x).double(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="unmerge\\(\\) before loading"):
        net.load_state_dict(net.state_dict())
    for name in SIZES:
        getattr(net, name).unmerge()
    assert all(getattr(net, name).weight is w for name, w in zip(SIZES, weights, strict=True))
    plain = nn.ModuleDict({name: getattr(net, name).to_plain() for name in SIZES})
    assert all("lora" not in name for name, _ in plain.named_parameters())
    parts = [plain[name](x[..., :K]) for name, (K, _) in SIZES.items()]
    torch.testing.assert_close(torch.cat(parts, -1).double(), want, rtol=1e-5, atol=1e-5)


def test_a_quantised_layer_merges_with_its_loss_reported_and_gives_an_exact_linear():
    net, x = shared(quant="int8").eval(), torch.randn(3, 32)
    want = net.one(x)
    torch.testing.assert_close(net.one.to_linear()(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="lossy=True"):
        net.one.merge()
    report = net.one.merge(lossy=True)
    assert 0 < report.error < report.update
    net.one.unmerge()
    assert torch.equal(net.one(x), want)


# --- errors ---


@pytest.mark.parametrize(("make", "error", "match"), [
    (lambda: SharedFactors(0, 4, 4), ValueError, "r must be an integer of at least 1, got 0"),
    (lambda: SharedFactors(2, 4, 4, key=-1), ValueError, r"key must be an integer in \[0, 2\*\*63\) or None, got -1"),
    (lambda: SharedLoRALinear(4, 4), TypeError, "made over SharedFactors"),
    (lambda: SharedLoRALinear.from_linear(nn.Linear(9, 4), SharedFactors(2, 8, 8)), ValueError,
     "are for layers of up to 8 → 8, and this one is 9 → 4"),
    (lambda: SharedLoRALinear.from_linear(nn.Linear(4, 4), SharedFactors(2, 8, 8, dtype=torch.float64)), TypeError,
     "factors are in torch.float64, and this layer's adapter in torch.float32"),
    (lambda: SharedLoRALinear.from_linear(nn.Linear(4, 4), SharedFactors(2, 8, 8), lora_dropout=1.0), ValueError,
     r"lora_dropout must lie in \[0, 1\), got 1.0"),
    (lambda: shared().one.file_parts(), ValueError, "shared by several layers"),
    (lambda: ColwiseLoRA()._partition_linear_fn("one", shared().one, None), ValueError, "take FSDP2"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_its_values(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_replicas_of_data_parallel_are_refused():
    with pytest.raises(RuntimeError, match="stay on the first GPU: take DistributedDataParallel"):
        shared().one._replicate_for_data_parallel()


def test_repr_tells_the_settings():
    net = shared(train_u=False)
    assert "r=5, scaling=0.6, lora_u frozen" in repr(net.one)
    assert "SharedFactors(r=5, in_features=48, out_features=40, key=0, train_a=True, train_b=True)" in repr(net)


@pytest.mark.slow
def test_a_compiler_sees_one_graph_and_no_kept_fold():
    net, x = shared(train=(False, False)).eval(), torch.randn(3, WIDE)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
        net.one.lora_v.mul_(2)
        torch.testing.assert_close(compiled(x), net(x))
    net.train()
    y, z = compiled(x), net(x)
    y.square().sum().backward()
    got = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    z.square().sum().backward()
    for one, other in zip(got, [p.grad for p in net.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
