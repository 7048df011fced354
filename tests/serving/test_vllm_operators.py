"""vLLM's LoRA operators, as the plug-in computes them, against their contract in plain torch."""

from __future__ import annotations

import gc

import pytest
import torch
from support.vllm_contract import Layer, Operators

from lora_kernels.serving.vllm.slots import used_rank
from lora_kernels.testing.judge import against_plain

IDS = [0, 2, -1, 1, 1, -1, 3, 0, 0, 2, 2, 3, -1, 1, 0, 3] * 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(dtype: torch.dtype = torch.float32, outputs: tuple[int, ...] = (48,), K: int = 64) -> Layer:
    """Return a layer whose four slots hold adapters of different ranks."""
    made = Layer(K, outputs, dtype=dtype)
    for slot, R in enumerate((1, 3, 8, 32)):
        made.set(slot, R)
    return made


def right(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    verdict = against_plain("y", got.double(), exact, plain.double())
    assert verdict.fault is None, verdict.fault


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_slices_of_a_fused_layer_get_the_adapter_of_their_row(dtype):
    outputs = (64, 24, 24)  # q, k and v
    own, x = layer(dtype, outputs), torch.randn(len(IDS), 64).to(dtype)
    before = torch.randn(len(IDS), sum(outputs)).to(dtype)
    y = own.add(Operators().step(IDS), before.clone(), x)
    right(y, own.expected(before, x, IDS, torch.float64), own.expected(before, x, IDS, dtype))


def test_a_row_without_an_adapter_keeps_its_bits_though_the_last_slot_is_taken():
    own, x = layer(), torch.randn(len(IDS), 64)
    before = torch.randn(len(IDS), 48)
    y = own.add(Operators().step(IDS), before.clone(), x)
    base = [m for m, slot in enumerate(IDS) if slot < 0]
    assert torch.equal(y[base], before[base])
    assert not torch.equal(y[0], before[0])


def test_columns_and_rows_of_a_larger_tensor_outside_the_layer_are_not_touched():
    own, x = layer(), torch.randn(len(IDS), 64)
    large = torch.full((len(IDS) + 4, 100), 7.0)
    y = large[2:-2, 20:68]
    own.add(Operators().step(IDS), y, x)
    large[2:-2, 20:68] = 7.0
    assert (large == 7.0).all()


def test_a_step_without_adapters_writes_nothing_and_lays_out_nothing():
    own, operators, y = layer(), Operators().step([-1] * 8), torch.randn(8, 48)
    version = y._version
    own.add(operators, y, torch.randn(8, 64))
    assert y._version == version
    assert not len(operators._layouts._of)


def test_rows_after_those_that_were_named_are_padding():
    own, x, before = layer(), torch.randn(12, 64), torch.randn(12, 48)
    x[8:] = float("nan")
    y = own.add(Operators().step([0, 1, 2, 3, 0, -1, 1, 2]), before.clone(), x)
    assert torch.equal(y[8:], before[8:])
    assert torch.isfinite(y).all()


def test_fewer_rows_than_were_named_are_refused():
    own, before = layer(), torch.randn(4, 48)
    with pytest.raises(ValueError, match="8 tokens, and the layer has 4 rows"):
        own.add(Operators().step([0] * 8), before, torch.randn(4, 64))


@pytest.mark.parametrize("M", [2, 9])
def test_another_number_of_logits_than_of_samples_is_refused(M):
    own = layer()
    with pytest.raises(ValueError, match=f"3 samples, and the layer has {M} rows"):
        Operators().step([0] * 9, [0, 1, 2]).add_lora_logits(
            torch.randn(M, 48), torch.randn(M, 64), own.a[0], own.b[0], 1.0
        )


def test_one_slot_that_was_named_stands_for_all_rows():
    own, x, before = layer(), torch.randn(5, 64), torch.randn(5, 48)
    y = own.add(Operators().step([2]), before.clone(), x)
    torch.testing.assert_close(y, own.expected(before, x, [2] * 5, torch.float32))


def test_the_scale_of_a_call_multiplies_the_low_rank_half():
    own, x, before = layer(), torch.randn(8, 64), torch.randn(8, 48)
    ids = [0, 1, 2, 3, 0, -1, 1, 2]
    operators = Operators().step(ids)
    for scale in (1.0, 0.25, 1.0):
        y = own.add(operators, before.clone(), x, scale)
        torch.testing.assert_close(y, own.expected(before, x, ids, torch.float32, scale))


@pytest.mark.parametrize(("x_dtype", "y_dtype", "own"), [
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.bfloat16),
])  # fmt: skip
def test_x_y_and_the_adapters_may_have_dtypes_of_their_own(x_dtype, y_dtype, own):
    made, x = layer(own), torch.randn(len(IDS), 64).to(x_dtype)
    before = torch.randn(len(IDS), 48).to(y_dtype)
    y = made.add(Operators().step(IDS), before.clone(), x)
    right(y, made.expected(before, x, IDS, torch.float64), made.expected(before, x, IDS, torch.float32).to(y_dtype))


def test_an_adapter_gives_the_same_bits_whoever_its_neighbours_are():
    own, x = layer(), torch.randn(len(IDS), 64)
    together = own.add(Operators().step(IDS), torch.zeros(len(IDS), 48), x)
    mine = [m for m, slot in enumerate(IDS) if slot == 3]
    alone = own.add(Operators().step([3] * len(mine)), torch.zeros(len(mine), 48), x[mine])
    assert torch.equal(together[mine], alone)


def test_a_slot_that_was_written_to_is_laid_out_again_and_no_other():
    own, operators = layer(), Operators()
    ids, x, zero = [0, 1, 2, 3], torch.randn(4, 64), torch.zeros(4, 48)
    own.add(operators.step(ids), zero.clone(), x)
    stack = operators._layouts.adapters(own.a[0], own.b[0], range(4), torch.float32)
    before, version = stack.slots, stack.version
    own.add(operators.step(ids), zero.clone(), x)
    assert stack.version == version
    own.set(1, 5)
    y = own.add(operators.step(ids), zero.clone(), x)
    torch.testing.assert_close(y, own.expected(zero, x, ids, torch.float32))
    assert [after is was for after, was in zip(stack.slots, before, strict=True)] == [True, False, True, True]
    own.reset(1)
    y = own.add(operators.step(ids), zero.clone(), x)
    assert torch.equal(y[1], zero[1])
    assert stack[1] is None


def test_a_slot_is_found_changed_by_one_element_of_each_tensor():
    own, operators, x, zero = layer(), Operators().step([2]), torch.randn(1, 64), torch.zeros(1, 48)
    for t, at in ((own.a[0], (2, 0, 7, 63)), (own.b[0], (2, 0, 47, 7)), (own.a[0], (2, 0, 31, 0))):
        own.add(operators, zero.clone(), x)
        t[at] += 1.0
        y = own.add(operators, zero.clone(), x)
        torch.testing.assert_close(y, own.expected(zero, x, [2], torch.float32))


def test_a_slot_is_found_changed_by_a_rank_after_those_in_use():
    own, operators, x, zero = layer(), Operators().step([2]), torch.randn(1, 64), torch.zeros(1, 48)
    own.add(operators, zero.clone(), x)
    own.a[0][2, 0, 20], own.b[0][2, 0, :, 20] = torch.randn(64), torch.randn(48)
    y = own.add(operators, zero.clone(), x)
    torch.testing.assert_close(y, own.expected(zero, x, [2], torch.float32))


def test_a_slot_is_read_again_where_its_tensor_got_other_memory():
    own, operators, x, zero = layer(), Operators().step([2]), torch.randn(1, 64), torch.zeros(1, 48)
    own.add(operators, zero.clone(), x)
    own.a[0].data = own.a[0].data * 2  # counts as no write
    y = own.add(operators, zero.clone(), x)
    torch.testing.assert_close(y, own.expected(zero, x, [2], torch.float32))


def test_writes_are_seen_in_inference_mode():
    with torch.inference_mode():
        inference = layer()
    counted, operators = layer(), Operators()
    for own in (counted, inference):  # the tensors of the second count no writes
        for R in (4, 9):
            with torch.inference_mode():
                own.set(2, R)
                x, zero = torch.randn(6, 64), torch.zeros(6, 48)
                y = own.add(operators.step([2] * 6), zero.clone(), x)
            torch.testing.assert_close(y, own.expected(zero, x, [2] * 6, torch.float32))


def test_the_used_rank_ends_at_the_last_rank_that_adds_something():
    a, b = torch.zeros(8, 16), torch.zeros(24, 8)
    assert used_rank(a, b) == 0
    a[:5, 3], b[2, :4] = 1.0, 1.0
    assert used_rank(a, b) == 4
    a[6, 0], b[0, 6] = 1.0, float("nan")
    assert used_rank(a, b) == 7
    assert used_rank(a[8:], b[:, 8:]) == 0


def test_the_layout_has_the_used_rank_only():
    own, operators = layer(), Operators()
    own.add(operators.step([0, 1, 2, 3]), torch.zeros(4, 48), torch.randn(4, 64))
    stack = operators._layouts.adapters(own.a[0], own.b[0], (), torch.float32)
    assert [each.a.shape[0] for each in stack] == [1, 3, 8, 32]


def test_what_was_laid_out_goes_with_the_layer():
    own, operators = layer(), Operators().step([0, 1])
    own.add(operators, torch.zeros(2, 48), torch.randn(2, 64))
    assert len(operators._layouts._of) == 1
    del own
    gc.collect()
    assert not len(operators._layouts._of)


def test_the_rows_of_a_step_are_made_once_and_anew_in_the_next():
    first, second, operators = layer(), layer(), Operators().step([0, 1])
    for own in (first, second):
        own.add(operators, torch.zeros(2, 48), torch.randn(2, 64))
    assert len(operators._rows) == 1
    x, zero = torch.randn(2, 64), torch.zeros(2, 48)
    y = first.add(operators.step([3, -1]), zero.clone(), x)
    torch.testing.assert_close(y, first.expected(zero, x, [3, -1], torch.float32))


def test_logits_take_the_adapters_of_the_rows_that_are_sampled_from():
    own, x = layer(torch.bfloat16, (96,)), torch.randn(3, 64).bfloat16()
    before = torch.randn(3, 100)  # a padded vocabulary, and logits in fp32
    y = before.clone()
    Operators().step([0] * 7, [1, -1, 3]).add_lora_logits(y, x, own.a[0], own.b[0], 1.0)
    torch.testing.assert_close(y, own.expected(before, x, [1, -1, 3], torch.float32))
    y = before[:, :90].clone()  # fewer logits than B has rows
    Operators().step([0] * 7, [1, -1, 3]).add_lora_logits(y, x, own.a[0], own.b[0], 1.0)
    torch.testing.assert_close(y, own.expected(before, x, [1, -1, 3], torch.float32)[:, :90])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_and_expand_are_the_two_halves_of_a_layer(dtype):
    outputs = (64, 24)
    own, x = layer(dtype, outputs), torch.randn(len(IDS), 64).to(dtype)
    before = torch.randn(len(IDS), 100).to(dtype)
    operators, y = Operators().step(IDS), before.clone()
    h = torch.full((2, len(IDS), 32), float("nan"))
    operators.add_shrink(h, x, own.a, 1.0)
    operators.add_expand(y, h, own.b, outputs, offset_start=12, add_input=True)
    exact, plain = (own.expected(before[:, 12:], x, IDS, each) for each in (torch.float64, dtype))
    right(y[:, 12:], exact, plain)
    assert torch.equal(y[:, :12], before[:, :12])
    assert not h[:, [m for m, slot in enumerate(IDS) if slot < 0]].any()


def test_a_linear_layer_fills_the_buffer_that_it_is_given():
    own, x, zero = layer(), torch.randn(len(IDS), 64), torch.zeros(len(IDS), 48)
    operators, buffer = Operators().step(IDS), (torch.zeros(len(IDS), 32),)
    operators.add_lora_linear(y := zero.clone(), x, own.a, own.b, 1.0, own.outputs, buffer=buffer)
    torch.testing.assert_close(y, own.expected(zero, x, IDS, torch.float32))
    torch.testing.assert_close(buffer[0][0], own.a[0][0, 0] @ x[0])


@pytest.mark.parametrize("add", [True, False])
def test_an_embedding_expands_rows_of_its_a(add):
    own, h, before = layer(), torch.randn(len(IDS), 32), torch.randn(len(IDS), 48)
    y = before.clone()
    Operators().step(IDS).add_lora_embedding(y, h, own.b[0], add_inputs=add, add_input=True)
    for m, slot in enumerate(IDS):
        want = before[m] if slot < 0 else own.b[0][slot, 0] @ h[m] + (before[m] if add else 0)
        torch.testing.assert_close(y[m], want)


def test_operands_with_a_batch_dimension_are_flattened():
    own, x, before = layer(), torch.randn(1, 6, 64), torch.randn(1, 6, 48)
    ids = [0, 1, -1, 2, 3, 1]
    y = own.add(Operators().step(ids), before.clone(), x)
    torch.testing.assert_close(y[0], own.expected(before[0], x[0], ids, torch.float32))
