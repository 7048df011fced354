"""Many adapters in transforms, traces and with other tensors, which plain torch operations serve, and their FLOPs."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from support import judging, many
from support.many import leaves, mixed
from support.wrapper import Wrapper
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import Adapter, Rows, lora_linear_multi

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_warnings_of_eager():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no kernel is chosen")
        yield


def truth(m: many.Mixed, x: Tensor, adapters=None) -> Tensor:
    """Return y in plain torch, without dropout."""
    parts = [
        (m.ids == i)[:, None] * (float(each.scale) * (x @ each.lora_a.t() @ each.lora_b.t()))
        for i, each in enumerate(adapters or m.adapters)
    ]
    return torch.nn.functional.linear(x, m.w, m.bias) + sum(parts)


def test_transforms_of_torch_func_are_served():
    m = mixed(9, 6, 4, (2, 3, 1))
    x, tangent = m.x, torch.randn_like(m.x)

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, m.rows, bias=m.bias)

    torch.testing.assert_close(torch.func.vmap(call)(x[None])[0], truth(m, x))
    torch.testing.assert_close(
        torch.func.grad(lambda x: call(x).square().sum())(x), torch.func.grad(lambda x: truth(m, x).square().sum())(x)
    )
    got, want = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (call, lambda x: truth(m, x)))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want)

    def of_a(a):
        return lora_linear_multi(x, m.w, [m.adapters[0], m.adapters[1]._replace(lora_a=a), m.adapters[2]], m.rows)

    a = m.adapters[1].lora_a
    (da,) = torch.func.vjp(of_a, a)[1](m.dy)
    judging.check({"da": da}, many.problem_of(m, 1))
    with forward_ad.dual_level():  # the tangent of an adapter that is not the first
        assert forward_ad.unpack_dual(of_a(forward_ad.make_dual(a, torch.ones_like(a)))).tangent is not None


def test_a_transform_draws_the_mask_of_a_seed():
    m = mixed(30, 6, 16, (2, 3), p=0.5)

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, m.rows, bias=m.bias)

    torch.testing.assert_close(torch.func.vmap(call)(m.x[None])[0], call(m.x))


def test_several_gradients_at_once_are_refused_with_the_way_out():
    m = mixed(9, 6, 4, (2, 3))
    x, adapters, wanted = leaves(m)
    y = lora_linear_multi(x, m.w, adapters, m.rows)
    with pytest.raises(RuntimeError, match=r"one dy at a time.*is_grads_batched"):
        torch.autograd.grad(y, wanted, torch.randn(4, 9, 6), is_grads_batched=True)


class Layer(nn.Module):
    """A layer whose rows come as ids. torch.export takes only tensors of the module."""

    def __init__(self, m: many.Mixed) -> None:
        super().__init__()
        self.scales = [each.scale for each in m.adapters]
        self.parts = nn.ParameterList(t for each in m.adapters for t in each[:2])
        self.base = nn.ParameterList([m.w, m.bias])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        adapters = [Adapter(self.parts[2 * i], self.parts[2 * i + 1], self.scales[i]) for i in range(3)]
        w, bias = self.base
        return lora_linear_multi(x, w.detach(), adapters, Rows.by_id(ids, 3), bias=bias)


@pytest.mark.parametrize("tool", ["trace", "export"])
def test_what_is_recorded_serves_other_rows(tool):
    m = mixed(9, 6, 4, (2, 3, 1))
    layer, other = Layer(m), torch.tensor([2, 2, -1, 0, 1, -1, 0, 0, 1])
    if tool == "trace":
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            recorded = torch.jit.trace(layer, (m.x, m.ids))
        assert "lora_kernels::" not in str(recorded.inlined_graph)
    else:
        exported = torch.export.export(layer, (m.x, m.ids))
        assert not any("lora_kernels" in str(node.target) for node in exported.graph.nodes)
        recorded = exported.module()
    for ids in (m.ids, other):
        torch.testing.assert_close(recorded(m.x, ids), layer(m.x, ids))


def test_a_named_backend_is_refused_where_plain_torch_serves():
    m = mixed(9, 6, 4, (2, 3))

    def call(x):
        return lora_linear_multi(x, m.w, m.adapters, m.rows, backend="eager").sum()

    with pytest.raises(RuntimeError, match=r"backend='eager' does not go with torch\.func's transforms"):
        torch.func.grad(call)(m.x)
    tangent = m.adapters[1]
    with pytest.raises(RuntimeError, match="forward-mode AD"), forward_ad.dual_level(), torch.no_grad():
        a = forward_ad.make_dual(tangent.lora_a, tangent.lora_a)
        lora_linear_multi(m.x, m.w, [m.adapters[0], tangent._replace(lora_a=a)], m.rows, backend="eager")


def test_a_subclass_that_knows_torchs_operators_only_is_served():
    m = mixed(9, 6, 4, (2, 3))
    y = lora_linear_multi(Wrapper(m.x), m.w, m.adapters, m.rows, bias=m.bias)
    torch.testing.assert_close(y.inner, truth(m, m.x))


def test_a_dtensor_is_refused_with_the_way_out():
    class Distributed(Wrapper):
        def to_local(self) -> Tensor:
            return self.inner

    m = mixed(9, 6, 4, (2, 3))
    with pytest.raises(ValueError, match=r"x is a Distributed.*as to_local\(\) gives them"):
        lora_linear_multi(Distributed(m.x), m.w, m.adapters, m.rows)


@pytest.mark.parametrize("kind", ["jagged", "sparse", "mkldnn"])
def test_an_x_that_is_not_dense_is_refused_with_the_way_out(kind):
    m = mixed(9, 6, 4, (2, 3))
    make = {
        "jagged": lambda x: torch.nested.nested_tensor([x[:4], x[4:]], layout=torch.jagged),
        "sparse": Tensor.to_sparse,
        "mkldnn": Tensor.to_mkldnn,
    }[kind]
    way_out = r"x\.values\(\), with Rows\.by_length" if kind == "jagged" else r"call to_dense\(\) on x"
    with pytest.raises(ValueError, match=way_out):
        lora_linear_multi(make(m.x), m.w, m.adapters, m.rows)


def test_double_backward_is_refused():
    m = mixed(9, 6, 4, (2, 3))
    x, adapters, _ = leaves(m)
    y = lora_linear_multi(x, m.w, adapters, m.rows)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_multi has no double backward"):
        dx.sum().backward()


def test_a_sparse_or_empty_dy_is_served():
    m = mixed(9, 6, 4, (2, 3))
    x, adapters, wanted = leaves(m)
    y = lora_linear_multi(x, m.w, adapters, m.rows)
    torch.sgn(y).sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in wanted)


def flops(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def test_a_counter_counts_what_it_counts_for_pefts_mixed_batch():
    base = nn.Sequential(nn.Linear(8, 12, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]), "u")
    model.add_adapter("v", peft.LoraConfig(r=5, target_modules=["0"]))
    names = ["u", "__base__", "v", "v", "u", "v"]
    layer = model.base_model.model[0].eval()
    x = torch.randn(6, 7, 8)
    adapters = [
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in ("u", "v")
    ]
    for adapter in adapters:
        adapter.lora_a.requires_grad_()
        adapter.lora_b.requires_grad_()
    rows = Rows.by_sample(names, ["u", "v"])

    def ours(x):
        return lora_linear_multi(x, layer.base_layer.weight, adapters, rows)

    def pefts(x):
        return layer(x, adapter_names=names)

    layer.base_layer.weight.requires_grad_(False)
    torch.testing.assert_close(ours(x), pefts(x))
    for step in (
        lambda f: f(x),
        lambda f: torch.no_grad()(f)(x),
        lambda f: f(x).sum().backward(),
        lambda f: f(x.clone().requires_grad_()).sum().backward(),
    ):
        assert flops(lambda step=step: step(ours)) == flops(lambda step=step: step(pefts)) > 0


def test_rows_without_an_adapter_count_as_the_base():
    m = mixed(20, 12, 8, (2, 3), ids=torch.full((20,), -1))
    assert flops(lambda: lora_linear_multi(m.x, m.w, m.adapters, m.rows)) == 2 * 20 * 12 * 8
