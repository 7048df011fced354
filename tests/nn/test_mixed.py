"""`lora_kernels.nn.mixed`: which layers see a context, and what its rows may be given as."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRAConv2d, FusedLoRAEmbedding, FusedLoRALinear, FusedLoRAMultiheadAttention
from lora_kernels.core.rows import Rows
from lora_kernels.nn.in_force import current_for
from lora_kernels.nn.mixed import Mixed, mixable, mixed, table_of

TABLE = {"a": 0, "b": 1, "c": 2}


class Layer(nn.Module):
    """A layer that computes by row: it multiplies each row by its own adapter's number plus two."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    @staticmethod
    def adapter_table(model: nn.Module) -> dict[str, int]:
        return TABLE

    def forward(self, x: Tensor) -> Tensor:
        context = current_for(self)
        if context is None:
            return x * self.w
        rows = context.of(x)
        rows = rows.repeated(x[..., 0].numel() // rows.M) if rows.per_sample else rows
        factor = torch.ones(rows.M)
        for i in range(rows.n):
            factor[rows.index(i)] = i + 2.0
        return context.computed(self, x * self.w * factor.view(*x.shape[:-1], 1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.fixture
def model() -> Model:
    return Model()


def factors(y: Tensor) -> list[float]:
    return y.reshape(-1, 4)[:, 0].sqrt().tolist()


@pytest.mark.parametrize(
    "given",
    [
        ["a", None, "c"],
        ["a", "__base__", "c"],
        (0, -1, 2),
        torch.tensor([0, -1, 2]),
        Rows.by_sample(["a", None, "c"], TABLE),
    ],
)
def test_names_and_ids_of_samples_stand_for_all_rows_of_a_sample(model, given):
    with mixed(model, given):
        assert factors(model(torch.ones(3, 2, 4))) == pytest.approx([2, 2, 1, 1, 4, 4])


@pytest.mark.parametrize(
    "given", [[[0, 0, -1, 2]], torch.tensor([[0, 0, -1, 2]]), Rows.by_length([2, 1, 1], [0, -1, 2])]
)
def test_ids_of_tokens_stand_for_one_row_each(model, given):
    with mixed(model, given):
        assert factors(model(torch.ones(1, 4, 4))) == pytest.approx([2, 2, 1, 4])


def test_ids_of_tokens_are_refused_for_an_x_whose_two_dimensions_are_exchanged(model):
    with mixed(model, [[0, 0, -1], [1, 2, 1]]):
        assert factors(model(torch.ones(2, 3, 4))) == pytest.approx([2, 2, 1, 3, 4, 3])
        assert factors(model(torch.ones(6, 4))) == pytest.approx([2, 2, 1, 3, 4, 3])
        assert factors(model(torch.ones(1, 6, 4))) == pytest.approx([2, 2, 1, 3, 4, 3])
        with pytest.raises(ValueError, match=r"the ids are \(2, 3\), and a layer has x \(3, 2, 4\)"):
            model(torch.ones(3, 2, 4))


def test_the_context_ends_with_its_block_also_after_an_error(model):
    with pytest.raises(ZeroDivisionError), mixed(model, ["a"]):
        raise ZeroDivisionError
    assert factors(model(torch.ones(1, 1, 4))) == [1]


def test_no_other_model_sees_the_context(model):
    other = Model()
    with mixed(model, ["a"]):
        assert factors(other(torch.ones(1, 1, 4))) == [1]
        with mixed(other, ["b"]):
            assert factors(other(torch.ones(1, 1, 4))) == pytest.approx([3])
            assert factors(model(torch.ones(1, 1, 4))) == pytest.approx([2])  # the outer context is in force for it


def test_the_inner_of_two_contexts_of_one_model_is_in_force(model):
    with mixed(model, ["a"]):
        with mixed(model, ["c"]):
            assert factors(model(torch.ones(1, 1, 4))) == pytest.approx([4])
        assert factors(model(torch.ones(1, 1, 4))) == pytest.approx([2])


def test_no_other_thread_sees_the_context(model):
    found = []
    with mixed(model, ["a"]):
        thread = threading.Thread(target=lambda: found.append(current_for(model.one)))
        thread.start()
        thread.join()
    assert found == [None]


def test_tasks_of_one_thread_have_contexts_of_their_own(model):
    async def run(name: str) -> list[float]:
        with mixed(model, [name]):
            await asyncio.sleep(0)
            y = model(torch.ones(1, 1, 4))
            await asyncio.sleep(0)
        return factors(y)

    async def both() -> list[list[float]]:
        return await asyncio.gather(run("a"), run("c"))

    assert asyncio.run(both()) == [pytest.approx([2]), pytest.approx([4])]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (["nobody"], KeyError, "no adapter is called nobody; there are a, b, c"),
        ([3], ValueError, "-1..2"),
        (torch.zeros(1, 1, 1, dtype=torch.long), ValueError, r"\[B\] or \[B, S\]"),
        (["a", 0], TypeError, "either names or ids"),
        ("a", TypeError, "one name or id for each sample"),
        (Rows.by_length([1], [5]), ValueError, "6 adapters, and the model has 3: a, b, c"),
    ],
)
def test_other_names_and_ids_are_refused(model, given, error, text):
    with pytest.raises(error, match=text):
        mixed(model, given)
    assert current_for(model.one) is None


def test_a_model_without_a_layer_that_computes_by_row_is_refused():
    with pytest.raises(RuntimeError, match=r"call lora_kernels\.fuse\(model\)"):
        mixed(nn.Linear(2, 2), ["a"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedLoRAEmbedding(4, 4, r=2),
        lambda: FusedLoRAConv2d(4, 4, 3, r=2),
        lambda: FusedLoRAMultiheadAttention.from_attention(nn.MultiheadAttention(4, 2), r=2),
    ],
)
def test_layers_that_cannot_leave_their_adapter_out_of_a_row_are_refused(model, make):
    model.three = make()
    with pytest.raises(RuntimeError, match=f"a {type(model.three).__name__} has one adapter"):
        mixed(model, ["a"])
    with pytest.raises(RuntimeError, match=f"a {type(model.three).__name__} has one adapter"):
        mixed(nn.Sequential(model.three), ["a"])


def test_layers_of_two_packages_in_one_model_are_refused(model):
    model.three = FusedLoRALinear(4, 4, r=2)
    with pytest.raises(RuntimeError, match="mixed takes one kind of them"):
        mixed(model, ["a"])


def test_threads_of_data_parallel_are_refused(model):
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        mixed(nn.DataParallel(model), ["a"])


def test_a_context_is_entered_once(model):
    context = mixed(model, ["a"])
    with context, pytest.raises(RuntimeError, match="entered once"):
        context.__enter__()


def test_the_table_gives_the_numbers_by_name(model):
    assert table_of(model) == TABLE


def test_rows_of_a_model_known_before_need_no_look_at_it(model):
    known = mixable(model)
    with Mixed(known, Rows.by_length([1], [1])):
        assert factors(model(torch.ones(1, 1, 4))) == pytest.approx([3])


def test_a_compiled_model_sees_the_context_and_is_not_compiled_for_each(model):
    compiled_for = []

    def backend(graph, _):
        compiled_for.append(graph)
        return graph.forward

    class Sum(Layer):
        def forward(self, x: Tensor) -> Tensor:
            context = current_for(self)
            return x if context is None else x + context.of(x).order.sum()

    layer = Sum()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.ones(4, 4)
    assert torch.equal(compiled(x), x)
    for ids in ([0, 1, 2, 0], [1, 1, 1, 1], [-1, -1, 0, 0]):
        with mixed(layer, ids):
            assert torch.equal(compiled(x), x + 6)
    assert torch.equal(compiled(x), x)
    assert len(compiled_for) == 2


def test_tasks_whose_contexts_overlap_have_their_own_rows_in_a_compiled_model_too(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    x = torch.ones(1, 1, 4)

    async def run(name: str, seconds: float) -> list[float]:
        found = []
        with mixed(model, [name]):
            for _ in range(2):
                await asyncio.sleep(seconds)
                found += factors(compiled(x))
        return found

    async def every() -> list[list[float]]:
        return await asyncio.gather(run("a", 0.01), run("b", 0.03), run("c", 0.02))

    for _ in range(2):
        assert asyncio.run(every()) == [pytest.approx([factor] * 2) for factor in (2, 3, 4)]
        assert factors(compiled(x)) == [1]
        with mixed(model, ["b"]):
            assert factors(torch.compile(model, backend="eager", fullgraph=True)(x)) == pytest.approx([3])


def test_a_compiled_model_without_graph_breaks_refuses_tasks_whose_contexts_overlap(model):
    torch._dynamo.reset()  # which forgets the layers of other tests that it has given up to compile
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    async def run(name: str) -> list[float]:
        with mixed(model, [name]):
            await asyncio.sleep(0.01)
            return factors(compiled(torch.ones(1, 1, 4)))

    async def both() -> list[list[float]]:
        return await asyncio.gather(run("a"), run("c"))

    says = torch.__version__ >= (2, 7)  # torch 2.6 tells only that the traced code has raised
    with pytest.raises(Exception, match="several tasks of this thread" if says else "Observed exception"):
        asyncio.run(both())


@pytest.mark.parametrize("given", [["a", None], [0, -1], [[0, -1]]])
def test_a_default_device_does_not_disturb_rows(model, given):
    with torch.device("meta"):
        context = mixed(model, given)
    assert context.rows.order.device.type == context.rows.starts.device.type == "cpu"
    with torch.device("meta"):
        assert Rows.by_length([1], [0]).order.device.type == "cpu"
