"""What a layer hands on to later ones belongs to one forward: threads, errors, recomputation and modes do not mix."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from support.residual_models import K, adapters, fill, gradients, made
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import apply_reslora
from lora_kernels.nn import residual_calls

ACTIVATIONS = [("is", 1), ("ms", 2)]
EACH = [("bs", 2), *ACTIVATIONS]


def rows(seed: int, m: int = 4) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *gradients(y, x, adapters(model)).values()]


def same(got, want):
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(("structure", "previous"), EACH)
def test_two_threads_at_once_compute_what_each_computes_alone(structure, previous):
    model = made(structure, previous)
    xs = [rows(1), rows(2)]
    want = [results(model, x) for x in xs]
    barrier = threading.Barrier(2)

    def meet(module, args):
        barrier.wait(20)  # so that the forwards of both threads are under way at once

    for block in model.blocks:
        block.up.register_forward_pre_hook(meet)
    got: dict[int, list[torch.Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: results(model, xs[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert same(got[0], want[0]) and same(got[1], want[1])


@pytest.mark.parametrize(("structure", "previous"), EACH)
def test_modes_without_gradients_compute_the_same(structure, previous):
    model = made(structure, previous)
    y = model(rows(1))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(rows(1)), y)
            assert torch.equal(model.eval()(rows(1)), y)
        model.train()
    assert same(results(model, rows(1)), results(model, rows(1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_block_shortcuts_are_computed_again_by_checkpointing(reentrant):
    model = made("bs", None)
    want = results(model, rows(1))
    for block in model.blocks:
        block.reentrant = reentrant
    x = rows(1).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert same([y, x.grad, *(p.grad for p in adapters(model).values())], want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_checkpointed_blocks_are_refused_with_shortcuts_of_activations(structure, previous, reentrant):
    model = made(structure, previous)
    for block in model.blocks:
        block.reentrant = reentrant
    y = model(rows(1).requires_grad_())
    with pytest.raises(
        RuntimeError, match=r"computes blocks\.2\.\w+ again in the backward.*the model as a whole, or none"
    ):
        y.sum().backward()
    for block in model.blocks:
        block.reentrant = None
    assert same(results(model, rows(1)), results(made(structure, previous), rows(1)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_a_checkpoint_around_all_blocks_computes_the_same(structure, previous, reentrant):
    model = made(structure, previous)
    want = results(model, rows(1))
    x = rows(1).requires_grad_()
    y = checkpoint(model, x, use_reentrant=reentrant)
    with torch.no_grad():
        model(rows(2))  # another forward between the two leaves nothing behind
    y.square().sum().backward()
    assert same([y, x.grad, *(p.grad for p in adapters(model).values())], want)


@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_a_recomputation_inside_of_another_forward_does_not_read_its_tensors(structure, previous):
    model = made(structure, previous)
    for block in model.blocks:
        block.reentrant = False
    y = model(rows(1).requires_grad_())
    model.blocks[1].up.register_forward_pre_hook(lambda module, args: y.sum().backward())
    with pytest.raises(RuntimeError, match=r"computes blocks\.2\.\w+ again in the backward"):
        model(rows(2))


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Interrupt])
@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_nothing_is_kept_after_a_forward_or_an_error(structure, previous, error):
    model = made(structure, previous)
    want = model(rows(1))

    def stop(module, args):
        raise error

    handle = model.blocks[2].up.register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(rows(2, m=3))
    handle.remove()
    assert torch.equal(model(rows(1)), want)
    assert residual_calls._OPEN.calls == []
    read: list[weakref.ref] = []
    model.blocks[0].up.register_forward_hook(lambda module, args, y: read.append(weakref.ref(args[0])))
    with torch.no_grad():
        model(rows(1))
    assert read[-1]() is None


@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_only_what_a_later_layer_reads_is_kept_during_a_forward(structure, previous):
    model = made(structure, previous)
    sizes = []
    for block in model.blocks:
        block.up.register_forward_hook(
            lambda module, args, y: sizes.append(sum(len(call.kept) for call in residual_calls._OPEN.calls))
        )
    model(rows(1))
    # After `up` of blocks 0, 1 and 2; q, up and down have a chain each, and down has not run yet in its block.
    assert sizes == ([2, 3, 1] if structure == "is" else [2, 5, 4])


@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_a_layer_outside_of_the_forward_around_the_blocks_is_refused(structure, previous):
    model = made(structure, previous)
    model(rows(1))
    for call in (lambda: model.blocks[0](rows(1)), lambda: model.blocks[1].q(rows(1))):
        with pytest.raises(RuntimeError, match=r'called outside of a forward of the model.*structure="bs"'):
            call()


@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_a_block_that_is_left_out_or_runs_twice_is_refused(structure, previous):
    model = made(structure, previous)
    blocks = list(model.blocks)
    model.forward = lambda x: blocks[1](x)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.q needs what blocks\.0\.q hand on, which were not called"):
        model(rows(1))
    model.forward = lambda x: blocks[1](blocks[0](blocks[0](x)))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.q was called twice .* before blocks\.1\.q was called once"):
        model(rows(1))
    del model.forward
    assert same([model(rows(1))], [made(structure, previous)(rows(1))])


@pytest.mark.parametrize(("structure", "previous"), ACTIVATIONS)
def test_other_tokens_in_a_later_block_are_refused(structure, previous):
    model = made(structure, previous)
    blocks = list(model.blocks)
    model.forward = lambda x: blocks[1](blocks[0](x)[:2])
    with pytest.raises(ValueError, match=r"rows of blocks\.1\.q are not those of blocks\.0\.q: \(2,\) and \(4,\)"):
        model(rows(1))


class InPlace(nn.Module):
    """Blocks that write the sum into x, as some models do without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.in_place = nn.ModuleList(nn.Linear(K, K) for _ in range(2)), True

    def forward(self, x):
        x = x.clone()
        for layer in self.layers:
            y = layer(x)
            x = x.add_(y) if self.in_place else x + y
        return x


def test_an_x_that_was_written_to_is_refused_or_was_kept_as_it_was():
    torch.manual_seed(0)
    model = InPlace().double()
    apply_reslora(model, "is", r=2)
    fill(model)
    model.in_place = False
    with torch.no_grad():
        want = model(rows(1))
    model.in_place = True
    with pytest.raises(RuntimeError, match=r"x of layers\.0 was written to .* and layers\.1 needs it as it was"):
        model(rows(1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="was written to"):
        model(rows(1))
    with torch.inference_mode():
        assert torch.equal(model(rows(1)), want)


def test_models_of_one_kind_inside_of_each_other_keep_to_themselves():
    inner, outer = made("is"), made("is")
    want = outer(rows(1)) + inner(rows(2))
    got = []
    outer.blocks[1].up.register_forward_pre_hook(lambda module, args: got.append(inner(rows(2))))
    assert torch.equal(outer(rows(1)) + got[0], want)


def compiled(model: nn.Module, x: torch.Tensor, fullgraph: bool) -> list[torch.Tensor]:
    """Return y and the gradients of the adapters in a model that was compiled for the first time."""
    torch._dynamo.reset()
    model.zero_grad()
    y = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(x)
    y.square().sum().backward()
    torch._dynamo.reset()
    return [y, *(p.grad for p in adapters(model).values())]


def two_layers(structure: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    apply_reslora(model, structure, r=2)
    return fill(model)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["bs", "is"])
def test_block_shortcuts_are_compiled_whole_and_the_others_run_beside_compiled_code(structure):
    model, x = two_layers(structure), rows(1).float()
    y, _, *grads = results(model, x)
    torch.testing.assert_close(compiled(model, x, structure == "bs"), [y, *grads], rtol=1e-5, atol=1e-6)
    if structure != "bs":
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(model, x, True)
