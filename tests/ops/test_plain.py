"""A call that no kernel can serve and plain torch can is computed in plain torch: recorded ones, and those with a
nested, sparse or MKL-DNN x."""

from __future__ import annotations

import io
import warnings

import peft
import pytest
import torch
from support.wrapper import Wrapper
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRALinear, dora_linear, lora_linear
from lora_kernels.ops.group import Layer, lora_linear_group
from lora_kernels.testing.judge import check, problem

N, K, R = 32, 16, 4


def of_peft(fused: bool, dropout: float = 0.0, **settings) -> nn.Module:
    """Return a PEFT layer with values of its own, without its model around it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=R, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False, **settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    if fused:
        assert lora_kernels.fuse(model).fused
    return model.base_model.model


def ours(dropout: float = 0.0, merged: bool = False, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(0)
    made = FusedLoRALinear.from_linear(nn.Linear(K, N).to(dtype), r=R, lora_dropout=dropout, **settings)
    nn.init.normal_(made.lora_B)
    if merged:
        made.merge(lossy=True) if "quant" in settings else made.merge()
    return nn.Sequential(made)


KINDS = {
    "plain": ours,
    "dora": lambda p=0.0: ours(p, use_dora=True),
    "nf4": lambda p=0.0: ours(p, quant="nf4"),
    "nf4 in odd blocks": lambda p=0.0: ours(p, quant="nf4", blocksize=1024, double_quant=True),
    "int8": lambda p=0.0: ours(p, quant="int8"),
    "fp8": lambda p=0.0: ours(p, quant="fp8"),
    "peft": lambda p=0.0: of_peft(True, p),
    "peft, dora": lambda p=0.0: of_peft(True, p, use_dora=True),
    "merged": lambda p=0.0: ours(p, merged=True),
    "nf4, merged": lambda p=0.0: ours(p, merged=True, quant="nf4"),
}
TRAINED = [kind for kind in KINDS if "merged" not in kind]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def traced(model: nn.Module, x: Tensor, **how) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, x, **how)


def names_of(graph) -> set[str]:
    return {node.kind() for node in graph.inlined_graph.nodes()}


def test_a_trace_can_be_saved_and_takes_any_number_of_rows(kind):
    model, x = KINDS[kind]().eval(), torch.randn(3, 5, K)
    graph, file = traced(model, x), io.BytesIO()
    torch.jit.save(graph, file)
    file.seek(0)
    graph, x = torch.jit.load(file), torch.randn(7, 9, K)
    assert not any("lora_kernels" in name or "Python" in name for name in names_of(graph))
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(torch.jit.freeze(graph)(x), model(x))


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trace_in_training_mode_has_gradients_and_draws_a_new_mask_in_each_run(kind):
    x = torch.randn(64, K)
    model = KINDS[kind]().train()
    graph = traced(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    for got, want in zip(*(torch.autograd.grad(run(x).square().sum(), trained) for run in (graph, model)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    graph = traced(KINDS[kind](0.5).train(), x, check_trace=False)
    assert "aten::dropout" in names_of(graph) and not torch.equal(graph(x), graph(x))


def test_a_seed_is_not_recorded():
    """One mask for all runs would be fixed in the trace. A call without a seed draws a new one in each run."""
    q = problem(5, N, K, R)
    with pytest.raises(ValueError, match="a new mask in each run: leave seed away"):
        traced(lambda x: lora_linear(x, q.w, q.a, q.b, scale=q.scale, dropout_p=0.5, seed=7), q.x)


def test_a_traced_group_is_its_layers():
    q = problem(5, N, K, R)

    def run(x):
        return lora_linear_group(x, (Layer(q.w, q.a, q.b, 0.5), Layer(q.w, q.a, q.b, 2.0, q.bias)))

    torch.testing.assert_close(traced(run, q.x)(2 * q.x), run(2 * q.x))


tells_of_exports = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="this torch does not tell, so the operators are exported"
)
EXPORTED = ["plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dora", "nf4", "peft", "merged"))]


@tells_of_exports
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_program_needs_no_package(kind, strict):
    model, x = KINDS[kind]().eval(), torch.randn(3, 5, K)
    rows = torch.export.Dim("rows", min=1, max=64)
    program, file = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program, x = torch.export.load(file), torch.randn(7, 5, K)
    assert not any("lora_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@tells_of_exports
def test_an_exported_program_draws_a_new_mask_in_each_run():
    run = torch.export.export(ours(0.5).train(), (x := torch.randn(64, K),)).module()
    assert not torch.equal(run(x), run(x))


def test_a_symbolic_trace_has_one_node_for_a_layer():
    for kind in ("plain", "dora", "nf4", "merged"):
        model, x = KINDS[kind]().eval(), torch.randn(5, K)
        graph = torch.fx.symbolic_trace(model)
        if kind != "merged":
            called = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
            assert called.count("dora_linear" if kind == "dora" else "lora_linear") == 1
        torch.testing.assert_close(graph(x), model(x))


NESTED = [torch.jagged, torch.strided]


def nested(layout: torch.layout) -> tuple[Tensor, Tensor]:
    """Return a nested tensor, and its rows as a dense one."""
    parts = [torch.randn(3, K), torch.randn(5, K)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    return x, torch.cat(parts).requires_grad_()


def rows_of(x: Tensor) -> Tensor:
    return torch.cat(list(x.unbind()))


@pytest.mark.parametrize("layout", NESTED, ids=str)
@pytest.mark.parametrize("kind", TRAINED)
def test_a_nested_tensor_gives_what_its_rows_give(kind, layout):
    if "dora" in kind and layout is torch.strided:
        pytest.skip("refused, as by PEFT")
    model = KINDS[kind]()
    trained = [p for p in model.parameters() if p.requires_grad]
    x, rows = nested(layout)
    y, want = model(x), model(rows)
    assert y.is_nested and y.layout is layout
    torch.testing.assert_close(rows_of(y), want)
    dx, *got = torch.autograd.grad((y * 2).to_padded_tensor(0.0).sum(), [x, *trained])
    wanted = torch.autograd.grad((want * 2).sum(), [rows, *trained])
    for one, other in zip([rows_of(dx), *got], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", NESTED, ids=str)
def test_a_nested_tensor_equals_peft_with_dropout_and_fp32_adapters(layout):
    x, _ = nested(layout)
    results = []
    for fused in (False, True):
        model = of_peft(fused, 0.5)
        torch.manual_seed(1)
        results.append(rows_of(model(x)))
    assert torch.equal(*results)
    q = problem(64, N, K, R, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.nested.nested_tensor(list(q.x.split((24, 40))), layout=layout)
    check({"y": rows_of(lora_linear(x, q.w, q.a, q.b, scale=q.scale, bias=q.bias))}, q)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.nested.nested_tensor(list(q.x.float().split((24, 40))), layout=layout)
        check({"y": rows_of(lora_linear(x, q.w, q.a, q.b, scale=q.scale, bias=q.bias))}, q)


def test_a_nested_tensor_that_cannot_be_served_is_refused():
    x, _ = nested(torch.strided)
    with pytest.raises(ValueError, match=r"nested tensor of layout torch\.strided.*layout=torch\.jagged"):
        ours(use_dora=True)(x)
    x, _ = nested(torch.jagged)
    with pytest.raises(ValueError, match=r"nested tensor.*backend='cpu' does not read.*backend=None"):
        ours(backend="cpu")(x)
    q = problem(5, N, K, R)
    with pytest.raises(ValueError, match=r"x is a nested tensor of layout.*leave seed away"):
        lora_linear(x, q.w, q.a, q.b, scale=1.0, dropout_p=0.5, seed=3)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\)"):
        lora_linear(x, q.w, q.a, q.b, scale=1.0, dropout_p=1.5)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_an_x_of_another_layout_gives_what_it_gives_dense(kind, layout):
    model, x = KINDS[kind](), torch.randn(5, K)
    if "dora" in kind and layout == "to_mkldnn":
        with pytest.raises(ValueError, match=r"layout torch\._mkldnn.*to_dense"):
            model(x.to_mkldnn())
        return
    y = model(getattr(x, layout)())
    torch.testing.assert_close(y if y.layout is torch.strided else y.to_dense(), model(x))


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CS")
def test_dropout_of_a_layout_that_torch_cannot_drop_is_refused(kind, layout):
    model, x = KINDS[kind](0.5).train(), torch.randn(5, K)
    if "dora" in kind and layout == "to_mkldnn":
        return  # refused without dropout too
    with pytest.raises(ValueError, match=r"layout torch\.\w+, and torch has no dropout.*p = 0\.5.*to_dense\(\)"):
        model(getattr(x, layout)())
    model.eval()
    model(getattr(x, layout)())


def test_a_sparse_x_that_torch_cannot_multiply_is_named():
    for x in (torch.randn(2, 5, K).to_sparse(), torch.randn(5, K).to_sparse(1)):
        with pytest.raises(ValueError, match=r"layout torch\.sparse_coo.*torch\.float32.*to_dense\(\).*torch says"):
            ours()(x)


def test_a_named_backend_is_not_recorded_in_a_trace_and_is_in_an_exported_program():
    model, x = ours(backend="cpu").eval(), torch.randn(5, K)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace.*backend='cpu' was asked for.*backend=None.*Merged"):
        traced(model, x)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert torch.ops.lora_kernels.forward.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("op", ["lora_linear", "dora_linear", "lora_linear_group"])
def test_a_sparse_dy_gives_what_it_gives_dense(op, p, backend):
    q = problem(5, N, K, R)
    wanted = [t.requires_grad_() for t in (q.x, q.a, q.b, q.bias)]
    settings = {"dropout_p": p, "seed": 3 if p else None}
    if op == "lora_linear_group":
        (y,) = lora_linear_group(q.x, [Layer(q.w, q.a, q.b, 0.5, q.bias, **settings)], backend=backend)
    elif op == "dora_linear":
        m = torch.ones(N, requires_grad=True)
        wanted.append(m)
        y = lora_kernels.dora_linear(q.x, q.w, q.a, q.b, m, scale=0.5, bias=q.bias, backend=backend, **settings)
    else:
        y = lora_linear(q.x, q.w, q.a, q.b, scale=0.5, bias=q.bias, backend=backend, **settings)
    dy = torch.eye(5, N)
    want = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    for got, dense in zip(torch.autograd.grad(y, wanted, dy.to_sparse()), want, strict=True):
        assert got.layout is torch.strided
        torch.testing.assert_close(got, dense)


@pytest.mark.parametrize("dy", ["expanded", "negated", "transposed", "fp64"])
def test_a_dy_of_any_strides_is_served(dy):
    q = problem(6, N, K, R)
    given = {
        "expanded": torch.ones(()).expand(6, N),
        "negated": torch._neg_view(torch.randn(6, N)),
        "transposed": torch.randn(N, 6).t(),
        "fp64": torch.randn(6, N, dtype=torch.float64),
    }[dy]
    wanted = [t.requires_grad_() for t in (q.x, q.a, q.b, q.bias)]
    y = lora_linear(q.x, q.w, q.a, q.b, scale=0.5, bias=q.bias)
    same = given.clone(memory_format=torch.contiguous_format).resolve_neg().float()
    assert torch.equal(same, given.float())
    want = torch.autograd.grad(y, wanted, same, retain_graph=True)
    if dy == "fp64":
        y = y.double()
    for got, other in zip(torch.autograd.grad(y, wanted, given), want, strict=True):
        torch.testing.assert_close(got, other)


def test_layers_of_a_group_may_come_from_an_iterator():
    q = problem(5, N, K, R)
    layers = [Layer(q.w, q.a, q.b, q.scale, q.bias)] * 2
    ys = lora_linear_group(q.x, iter(layers))
    assert len(ys) == 2
    check({"y": ys[1]}, q)
    with pytest.raises(ValueError, match="at least one layer"):
        lora_linear_group(q.x, iter(()))


@pytest.mark.parametrize("kind", TRAINED)
def test_a_subclass_sees_the_operators_of_torch(kind):
    model, inner = KINDS[kind](), torch.randn(5, K)
    x = Wrapper(inner).requires_grad_()
    y = model(x)
    torch.testing.assert_close(y.inner, model(inner))
    (dx,) = torch.autograd.grad(y.sum(), x)
    inner.requires_grad_()
    (want,) = torch.autograd.grad(model(inner).sum(), inner)
    torch.testing.assert_close(dx.inner, want)


@pytest.mark.parametrize("kind", TRAINED)
def test_the_meta_device_gives_shapes(kind):
    y = KINDS[kind]().to("meta")(torch.empty(3, 5, K, device="meta"))
    assert y.is_meta and y.shape == (3, 5, N)


def test_a_trace_of_dora_adds_the_bias_before_the_rounding():
    x, w, bias = torch.ones(4, 64).half(), torch.full((8, 64), 70000 / 64).half(), torch.full((8,), -60000.0).half()
    m = 0.999 * w.float().norm(dim=1)

    def layer(x):
        return dora_linear(x, w, torch.zeros(2, 64), torch.zeros(8, 2), m, scale=1.0, bias=bias)

    want = 0.999 * 64 * w[0, 0].double() - 60000
    for y in (layer(x), torch.jit.trace(layer, x)(x)):
        assert (y.double() - want).abs().max() <= 8 * 2.0**-11 * want + 0.999 * 8
