"""The fuzzer makes the same calls from the same seed, finds wrong numbers, and its calls find none in the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("lora_kernels._C", reason="the native CPU kernels are not built")
from benchmarks import fuzz, fuzz_calls
from benchmarks.fuzz_draw import MOST, Draw, is_exact, problems
from lora_kernels import _C, lora_linear
from lora_kernels.ops import attention, conv_function, embedding_passes
from lora_kernels.testing.judge import truth
from lora_kernels.testing.terminal import Terminal

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("exact", [False, True])
def test_random_calls_have_no_faults(exact):
    record = fuzz.run(1, range(40), exact, None, Terminal())
    assert record.calls == 40 and not record.faults, "\n".join(record.faults)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", _C.cpu_isas())
def test_many_random_calls_have_no_faults_with_any_instruction_set(name, exact):
    record = fuzz.run(2, range(300), exact, name, Terminal())
    assert record.calls == 300 and not record.faults, "\n".join(record.faults)
    assert set(record.kinds) == set(fuzz.kinds())


def test_a_call_is_a_function_of_the_seed_its_number_and_the_mode():
    def said(seed, k, exact):
        return fuzz.one(seed, k, exact, None)[0].said

    assert said(3, 5, False) == said(3, 5, False)
    assert len({tuple(said(*key)) for key in ((3, 5, False), (3, 6, False), (4, 5, False), (3, 5, True))}) == 4


def test_exact_problems_have_exact_results_that_are_not_all_zero():
    for k in range(60):
        (one,) = problems(Draw(9, k, True), 1)
        assert is_exact(one.q, MOST[one.q.x.dtype])
        for name, value in truth(one.q).items():
            assert torch.equal(value.to(one.q.x.dtype).double(), value), name
    shares = [(truth(problems(Draw(9, k, True), 1)[0].q)["y"] != 0).double().mean().nan_to_num(1.0) for k in range(60)]
    assert sum(shares) / 60 > 0.5


@pytest.mark.parametrize(
    ("seed", "k", "kind"),
    [
        pytest.param(0, 60, "dora_linear", id="the bias is within a z in bf16"),
        pytest.param(1, 694, "group", id="fp64, with many elements"),
        pytest.param(1, 1375, "module", id="the norm of a row that is nearly 0, under deterministic algorithms"),
        pytest.param(11, 3392, "multi", id="a g of subnormals in fp16"),
        pytest.param(12, 13249, "lora_linear", id="a dy whose rows are all alike"),
    ],
)
def test_calls_whose_rounding_is_large_have_no_faults(seed, k, kind):
    assert fuzz.one(seed, k, False, None, kind)[2] == []


@pytest.mark.parametrize(
    "k", [pytest.param(1105, id="a strided W is copied"), pytest.param(1169, id="the layer's mask keeps more")]
)
def test_exact_calls_of_layers_are_judged_by_what_the_layer_has(k):
    assert fuzz.one(1537, k, True, "baseline", "module")[2] == []


@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy", "bias"])
def test_what_lies_between_the_numbers_of_an_operand_shows_when_it_is_read(name):
    kept, nan = torch.ones(4, 6, dtype=torch.float16), 0
    for k in range(100):
        t = Draw(0, k, False).layout(name, kept)
        assert torch.equal(t, kept)
        whole = torch.as_strided(t, (t.untyped_storage().nbytes() // 2,), (1,), 0)
        nan += bool(torch.isnan(whole).any())
    assert nan > 10


class Wrong:
    """`lora_linear` with one wrong element of y, where y has more than 30."""

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, *args, **kwargs) -> Tensor:
        y = lora_linear(*args, **kwargs)
        error = torch.zeros_like(y)
        if y.numel() > 30:
            error.view(-1)[30] = self.amount
        return y + error


def test_a_wrong_element_is_found_and_the_printed_command_repeats_it(monkeypatch, capsys):
    monkeypatch.setattr(fuzz_calls, "lora_linear", Wrong(0.5))
    assert fuzz.main(["--calls", "30", "--exact", "--seed", "4", "--isa", "baseline"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "y differs in 1 elements, at" in said
    again = (
        said.split("again: python -m benchmarks.fuzz ")[1].split(" ✗")[0].split("--isa baseline")[0] + "--isa baseline"
    )
    assert "--exact" in again and fuzz.main(again.split()) == 1
    capsys.readouterr()
    monkeypatch.undo()
    assert fuzz.main(again.split()) == 0 and "no faults" in capsys.readouterr().out


def mask_of_the_other_layout(monkeypatch):
    right = conv_function.keep_mask
    monkeypatch.setattr(
        conv_function, "keep_mask", lambda x, window, by_rows, *rest: right(x, window, not by_rows, *rest)
    )


def gradient_of_the_padding_row(monkeypatch):
    right = embedding_passes._scattered
    monkeypatch.setattr(embedding_passes, "_scattered", lambda g, ids, a_t, row: right(g, ids, a_t, None))


def b_of_other_features(monkeypatch):
    right = attention.Projection.part

    def part(self, start, stop):
        return right(self, start, stop)._replace(b=self.b[: stop - start])

    monkeypatch.setattr(attention.Projection, "part", part)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("conv", mask_of_the_other_layout),
        ("embedding", gradient_of_the_padding_row),
        ("attention", b_of_other_features),
    ],
)
def test_a_fault_in_a_layer_is_found(kind, fault, exact, monkeypatch):
    assert not fuzz.run(3, range(12), exact, None, Terminal(), only=kind).faults
    fault(monkeypatch)
    assert fuzz.run(3, range(12), exact, None, Terminal(), only=kind).faults


def test_an_exception_is_a_fault_and_many_faults_end_the_run(monkeypatch):
    def broken(draw):
        raise RuntimeError("no such memory")

    monkeypatch.setattr(fuzz, "KINDS", {"lora_linear": (1.0, broken)})
    record = fuzz.run(0, range(1000), False, None, Terminal())
    assert record.calls == fuzz._ENOUGH and "no such memory" in record.faults[0]


def test_a_write_into_an_operand_is_found():
    x = torch.zeros(3, 4)
    watched = fuzz_calls.Watched(x, None)
    assert watched.faults() == []
    x[1, 2] = 1.0
    assert watched.faults() == ["an operand of shape (3, 4) was written"]
