"""Experts under torch.compile: one program serves any rows, without a break."""

from __future__ import annotations

import pytest
import torch
from support.experts_calls import experts

from lora_kernels import Rows, lora_linear_experts

pytestmark = pytest.mark.usefixtures("one_thread")

E = 4


@pytest.mark.parametrize("way", ["ids", pytest.param("rows", marks=pytest.mark.slow)])
def test_a_compiled_program_serves_any_rows(way):
    """One compilation for the first M and one for any M; none for other splits."""
    m = experts(12, 8, 3, (0,) * E, p=0.3)
    leaves = [t.detach().requires_grad_() for t in (m.a, m.b, m.bias)]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(x, of):
        rows = Rows.by_id(of, E) if way == "ids" else of
        x = x[rows.order]
        return lora_linear_experts(
            x, m.w, leaves[0], leaves[1], rows.in_order(), scale=0.5, bias=leaves[2], dropout_p=0.3, seed=m.seed
        )

    torch._dynamo.reset()
    program = torch.compile(call, backend=backend, fullgraph=True)
    drawn = torch.Generator().manual_seed(0)
    splits = [torch.randint(-1, E, (M,), generator=drawn) for M in (12, 12, 17, 31, 9)]
    for ids in [*splits, torch.full((20,), -1), torch.full((20,), 2)]:
        of = ids if way == "ids" else Rows.by_id(ids, E)
        x = torch.randn(len(ids), 8, requires_grad=True)
        got, want = program(x, of), call(x, of)
        dy = torch.randn_like(got)
        assert torch.equal(got, want)
        pairs = (torch.autograd.grad(y, [x, *leaves], dy) for y in (got, want))
        for compiled_grad, grad in zip(*pairs, strict=True):
            torch.testing.assert_close(compiled_grad, grad)
    assert len(compiled) <= 2


def test_rows_out_of_order_are_refused_when_the_program_runs():
    m = experts(12, 8, 3, (3, 2))

    def call(x, ids):
        return lora_linear_experts(x, m.w, m.a, m.b, Rows.by_id(ids, 2), scale=0.5)

    torch._dynamo.reset()
    program = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(program(m.x, torch.tensor([0, 0, 0, 1, 1])), call(m.x, torch.tensor([0, 0, 0, 1, 1])))
    with pytest.raises(ValueError, match="must follow each other"):
        program(m.x, torch.tensor([0, 1, 0, 1, 1]))
