"""Whole fused models under torch.compile: one graph, eager's numbers, and no needless compilation."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
from functorch.compile import make_boxed_func
from peft import get_peft_model
from support.old_torch import TORCH, compiles_whole_models
from support.peft_models import fused_layers, randomise, run
from support.tiny_llama import VOCABULARY, llama, lora, lora_llama
from torch._dynamo.backends.common import aot_autograd

import lora_kernels
from lora_kernels import FusedLoRALinear

ops = torch.ops.lora_kernels
FEW = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A torch.compile back-end like aot_eager that counts our two operators in every graph it is given."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.backend = aot_autograd(
            fw_compiler=self._counting(self.forward, ops.forward.default),
            bw_compiler=self._counting(self.backward, ops.backward.default),
        )

    @staticmethod
    def _counting(counts: list[int], operator: Any) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            counts.append(sum(node.target is operator for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        return compiler


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


def step(model: nn.Module, forward: Callable[..., Any], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return loss, logits and gradients, under the same seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = forward(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach()} | grads


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Assert equality up to the rounding of fp32, relative to the largest element."""
    assert got.keys() == want.keys() and len(got) > 2
    for name, value in want.items():
        assert value.abs().max() > 0, name
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error < 1e-5, f"{name}: {error:.3g}"


@compiles_whole_models
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_llama_is_one_graph_with_eagers_numbers(p):
    model, graphs, ids = lora_llama(random=True, lora_dropout=p), Graphs(), tokens()
    lora_kernels.fuse(model, strict=True)
    want = step(model, model, ids)
    calls = [layer.fused_calls for layer in fused_layers(model)]
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    same(step(model, compiled, ids), want)
    assert graphs.forward == graphs.backward == [14] == [len(calls)]
    assert calls == [1] * 14 == [layer.fused_calls for layer in fused_layers(model)], "compiled calls are not counted"
    # The eager call changes counters, and no guard depends on them.
    with torch.compiler.set_stance("fail_on_recompile"):
        model(ids)
        same(step(model, compiled, ids), want)


@pytest.mark.slow
@compiles_whole_models
def test_scaling_adapter_and_batch_compile_once_at_most():
    """A float that changes is a symbol from its second value on; an adapter is compiled at its first use."""
    model, graphs = lora_llama(1, random=True, target_modules=FEW), Graphs()
    model.add_adapter("second", lora(r=4, lora_alpha=3.5, target_modules=FEW))
    model.set_adapter("default")  # from here on PEFT shares the list of active adapters among layers, and dynamo checks
    randomise(model, 0.1)
    lora_kernels.fuse(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)

    def check(batch: int = 2) -> None:
        got = step(model, compiled, tokens(batch))
        same(got, step(model, model, tokens(batch)))

    def rescale(scaling: float) -> None:
        for layer in fused_layers(model):
            layer.scaling["default"] = scaling

    check()
    rescale(1.5)
    check()
    assert len(graphs.forward) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for scaling in (0.7, 3.0, 1.0, 2.0):
            rescale(scaling)
            check()
    model.set_adapter("second")
    check()
    assert len(graphs.forward) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            check()
    check(batch=3)
    assert graphs.forward == [2] * 4 == graphs.backward
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (4, 7):
            check(batch)


@pytest.mark.slow
@compiles_whole_models
def test_dynamic_compiles_once_for_every_scaling_and_batch():
    model, graphs = lora_llama(1, random=True, lora_dropout=0.1, target_modules=FEW), Graphs()
    lora_kernels.fuse(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    for count, (scaling, batch) in enumerate([(2.0, 2), (0.3, 2), (0.3, 3), (1.7, 5)]):
        for layer in fused_layers(model):
            layer.scaling["default"] = scaling
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            got = step(model, compiled, tokens(batch))
        same(got, step(model, model, tokens(batch)))
    assert graphs.forward == graphs.backward == [2]


@compiles_whole_models
def test_regional_compilation_shares_one_graph_among_the_layers():
    model, graphs, ids = lora_llama(3, random=True), Graphs(), tokens()
    # Otherwise the first layer has a graph of its own, since its input needs no gradient.
    model.enable_input_require_grads()
    lora_kernels.fuse(model, strict=True)
    want = step(model, model, ids)
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True, backend=graphs.backend)
    same(step(model, model, ids), want)
    assert graphs.forward == graphs.backward == [7]


@compiles_whole_models
def test_inductor_gives_eagers_numbers():
    """A Llama's MLP is enough, since it has a group and a single layer. The rest of the model has no code of ours."""
    model = get_peft_model(llama(1).model.layers[0].mlp, lora(target_modules="all-linear", task_type=None))
    randomise(model)
    assert lora_kernels.fuse(model, strict=True, group=True).groups
    x = torch.randn(5, 32)
    want = run(model, x)
    model.compile(fullgraph=True)
    same(run(model, x), want)


@compiles_whole_models
@pytest.mark.gpu
def test_cuda_graphs_give_eagers_numbers():
    """The mode reduce-overhead records CUDA graphs, whose outputs the next step may overwrite."""
    model, ids = lora_llama(1, random=True).cuda(), tokens().cuda()
    lora_kernels.fuse(model, strict=True, group=True)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        got = {name: value.clone() for name, value in step(model, compiled, ids).items()}
        same(got, step(model, model, ids))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_plain_model_compiles_once_for_changing_scaling_and_rows(dynamic):
    model, graphs = nn.Sequential(FusedLoRALinear(16, 24, r=4), nn.GELU(), FusedLoRALinear(24, 8, r=4)), Graphs()
    model[2].lora_dropout = 0.2

    def squared_step(forward: Callable[..., Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
        def squared(*, input_ids, labels):
            y = forward(input_ids)
            return SimpleNamespace(loss=y.square().mean(), logits=y)

        return step(model, squared, x)

    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=graphs.backend)
    for scaling, rows in [(4.0, 5), (1.5, 5), (0.7, 6), (3.0, 9)]:
        model[0].scaling = model[2].scaling = scaling
        x = torch.randn(rows, 16)
        same(squared_step(compiled, x), squared_step(model, x))
    most = 4 if TORCH < (2, 7) else 1 if dynamic else 3  # torch 2.6 compiles for every scaling
    assert graphs.forward == [2] * most == graphs.backward
