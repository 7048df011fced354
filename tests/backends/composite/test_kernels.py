"""The results of the back-end `composite` in Triton's interpreter: the launches of a GPU on CPU tensors. The tiles are
so small that every result has several."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support import judging

from lora_kernels.core.dropout import dropout, keep_mask, rescale
from lora_kernels.core.operands import Call, Needs
from lora_kernels.quant.weight import FORMATS, quantize_weight
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import judge, over_codes

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.composite_interp import CPU, interpreted, target

from lora_kernels.backends import composite


def results(q: judging.Problem, **kwargs) -> dict[str, torch.Tensor]:
    with interpreted(**kwargs) as backend:
        return judging.backend_results(backend, q)


SHAPES = [*judging.SHAPES[:-1], (97, 95, 93, 16)]
"""The last shape is just large enough for statistics, with dropout too: the interpreter is slow."""
VARIETY = list(itertools.product(judging.DTYPES, [0.0, 0.3]))
"""(dtypes, p). Each shape is tested with some of them. Over all shapes, every one occurs."""


@pytest.mark.parametrize("number, shape", list(enumerate(SHAPES)))
def test_results_are_right_for_every_shape(number: int, shape: tuple[int, int, int, int], poison: None) -> None:
    (dtype, adapter_dtype), p = VARIETY[3 * number % len(VARIETY)]
    q = judging.problem(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, p=p, bias=number % 3 > 0, strided=number % 2 == 0
    )
    judging.check(results(q), q)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_results_are_right_for_every_dtype(dtypes: tuple[torch.dtype, torch.dtype], p: float, poison: None) -> None:
    """The shape is just large enough for statistics."""
    q = judging.problem(97, 70, 65, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    judging.check(results(q), q)


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "gfx942"])
def test_results_are_right_in_either_precision_of_fp32(arch: str, poison: None) -> None:
    """With adapters in fp32 beside an x in bf16, the products that give y and dx are made in tf32 where the
    architecture has it."""
    q = judging.problem(97, 70, 65, 16, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3)
    judging.check(results(q, on=target(arch=arch)), q)


@pytest.mark.parametrize("rank", [1, 3, 16, 17, 32, 33, 64, 256])
def test_results_are_right_for_every_rank(rank: int, poison: None) -> None:
    q = judging.problem(18, 20, 24, rank, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1)
    judging.check(results(q), q)


def _random_problem(draw: random.Random, number: int) -> judging.Problem:
    dtype, adapter_dtype = draw.choice(judging.DTYPES)
    return judging.problem(
        draw.choice([0, 1, 2, 7, 16, 17, 31, 40]), draw.randint(1, 70), draw.randint(1, 70), draw.randint(1, 40),
        dtype=dtype, adapter_dtype=adapter_dtype, p=draw.choice([0.0, 0.0, 0.1, 0.5, 0.9]), bias=draw.random() < 0.5,
        strided=draw.random() < 0.5, scale=draw.choice([0.75, -2.0, 0.01, 30.0]), seed=number,
    )  # fmt: skip


@pytest.mark.parametrize(
    "first, count", [(0, 10), *(pytest.param(first, 49, marks=pytest.mark.slow) for first in range(10, 500, 49))]
)
def test_results_are_right_for_random_problems(first: int, count: int, poison: None) -> None:
    """500 problems, of which the fast tests take 30."""
    for number in range(first, first + count):
        draw = random.Random(number)
        q = _random_problem(draw, number)
        with interpreted(target(draw.choice([1, 3, 20]), draw.choice(["sm_75", "sm_90"]))) as backend:
            try:
                judging.check(judging.backend_results(backend, q), q)
            except AssertionError as fault:
                raise AssertionError(f"problem {number}: {fault}") from fault


def test_the_bits_are_the_same_in_every_run(poison: None) -> None:
    q = judging.problem(40, 50, 70, 20, dtype=torch.bfloat16, p=0.3)
    first, second = results(q), results(q)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_needed_is_computed(poison: None) -> None:
    """x is not there without da, nor h without db. The sums may differ in their parts, but not in their terms."""
    for rank in (3, 40):
        q = judging.problem(20, 37, 35, rank, dtype=torch.bfloat16, p=0.3)
        for need_dx, need_da, need_db in itertools.product([False, True], repeat=3):
            needs = Needs(need_dx, (need_da,), (need_db,))
            with interpreted() as backend:
                _, h = one_layer.forward_of(backend, q, need_db)
                assert (h is not None) == need_db
                got = one_layer.backward_of(backend, q, h, needs)
            for value, need in zip(got, (need_dx, need_da, need_db), strict=True):
                assert (value is not None) == need
            judging.check(dict(zip(("dx", "da", "db"), got, strict=True)), q)


def test_received_tensors_are_not_written_to() -> None:
    q = judging.problem(20, 33, 40, 3, p=0.3)
    before = {name: getattr(q, name).clone() for name in ("x", "w", "a", "b", "bias", "dy", "seed")}
    results(q)
    assert all(torch.equal(getattr(q, name), value) for name, value in before.items())


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_saved_h_is_unscaled_and_has_the_dtype_of_the_adapters(adapter_dtype: torch.dtype) -> None:
    q = judging.problem(20, 50, 40, 3, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, p=0.3, scale=64.0)
    with interpreted() as backend:
        _, h = one_layer.forward_of(backend, q)
    exact = dropout(q.x.double(), q.p, q.seed) @ q.a.double().t()
    assert h.dtype == adapter_dtype and h.is_contiguous()
    sums = 40 * torch.finfo(torch.float32).eps  # K roundings of sums near 1
    torch.testing.assert_close(h.double(), exact, rtol=torch.finfo(adapter_dtype).eps, atol=sums)


def test_h_in_fp32_does_not_overflow_where_x_is_fp16() -> None:
    """h reaches 256000, above the largest fp16, and s · h bᵀ is small."""
    x, a = torch.full((17, 64), 200.0).half(), torch.full((4, 64), 20.0)
    b, w = torch.full((24, 4), 1e-6), torch.zeros(24, 64).half()
    with interpreted() as backend:
        y, h = one_layer.forward(backend, x, w, a, b, None, 1.0, 0.0, None, True)
    assert torch.equal(h, torch.full((17, 4), 256000.0))
    torch.testing.assert_close(y.float(), torch.full((17, 24), 1.024), rtol=2**-10, atol=0)


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32])
def test_a_sum_that_fits_into_fp16_does_not_overflow_on_the_way(adapter_dtype: torch.dtype) -> None:
    """x wᵀ is 70272 and bias + s · h bᵀ is -69600: each alone, or its rounding, is above the largest fp16."""
    x, w, bias = (
        torch.full((17, 64), 30.0).half(),
        torch.full((24, 64), 36.6).half(),
        torch.full((24,), -60000.0).half(),
    )
    a, b = torch.full((4, 64), 0.125).to(adapter_dtype), torch.full((24, 4), -10.0).to(adapter_dtype)
    with interpreted() as backend:
        y, _ = one_layer.forward(backend, x, w, a, b, bias, 1.0, 0.0, None, True)
    want = torch.nn.functional.linear(x, w, bias).float() - 9600
    torch.testing.assert_close(y.float(), want, rtol=2**-10, atol=8)


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3, 2.0**-101, 200.0])
def test_results_are_right_for_every_scale(scale: float) -> None:
    q = judging.problem(17, 20, 40, 4, dtype=torch.float16, scale=scale)
    got = results(q)
    judging.check(got, q)
    if scale == 0:
        assert not any(got[name].any() for name in ("da", "db"))


@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_the_masks_of_h_dx_and_da_are_the_rule_bit_for_bit(seed: int) -> None:
    """With these operands h, dx and da are each the mask times c."""
    M, K, p = 21, 43, 0.4
    keep, seed = keep_mask(torch.tensor(seed), M, K, p), torch.tensor(seed)
    one, eye = torch.ones(()), torch.eye
    with interpreted() as backend:
        # h = c · keep ⊙ 1 · I
        _, h = one_layer.forward(
            backend, one.expand(M, K), torch.zeros(5, K), eye(K), torch.zeros(5, K), None, 1.0, p, seed, True
        )
        # dx = 0 + c · keep ⊙ (1 · 1)
        dx, _, _ = one_layer.backward(
            backend, one.expand(M, 1), None, torch.zeros(1, K), one.expand(1, K), one.expand(1, 1), None,
            1.0, p, seed, True, False, False,
        )  # fmt: skip
        # da = c · Iᵀ (keep ⊙ 1)
        _, da, _ = one_layer.backward(
            backend, eye(M), one.expand(M, K), torch.zeros(M, K), torch.zeros(M, K), eye(M), None,
            1.0, p, seed, False, True, False,
        )  # fmt: skip
        mask = backend.keep_mask(one.expand(M, K), p, seed)
    assert torch.equal(mask, keep.float())
    for name, value in (("h", h), ("dx", dx), ("da", da)):
        assert torch.equal(value != 0, keep), f"{name}'s mask differs"
        assert torch.equal(value, keep * torch.tensor(rescale(p), dtype=torch.float32)), f"{name}'s factor differs"


@pytest.mark.parametrize("w_format", FORMATS)
def test_results_are_right_over_a_quantised_weight(w_format: str, poison: None) -> None:
    q = judging.problem(19, 48, 64, 5, dtype=torch.bfloat16, p=0.3)
    w = quantize_weight(q.w, w_format)
    with interpreted() as backend:
        y, h = one_layer.forward(backend, q.x, w, q.a, q.b, q.bias, q.scale, q.p, q.seed, True)
        gradients = one_layer.backward(backend, q.dy, q.x, w, q.a, q.b, h, q.scale, q.p, q.seed)
    stored, plain = over_codes(q, w)
    for verdict in judge(dict(zip(("y", "dx", "da", "db"), (y, *gradients), strict=True)), stored, plain=plain):
        assert verdict.fault is None, verdict.fault


def test_a_backward_without_dx_does_not_dequantise(monkeypatch: pytest.MonkeyPatch) -> None:
    q = judging.problem(19, 48, 64, 5, dtype=torch.bfloat16)
    w = quantize_weight(q.w, "nf4")
    with interpreted() as backend:
        _, h = one_layer.forward_of(backend, q)
        monkeypatch.setattr(backend, "dense", lambda w, dtype: pytest.fail("dequantises"))
        one_layer.backward(backend, q.dy, q.x, w, q.a, q.b, h, q.scale, 0.0, None, need_dx=False)


def call(**changes: object) -> Call:
    return Call("forward", CPU, torch.bfloat16, torch.bfloat16, 8, 8, 8, 8, False)._replace(**changes)


def test_refusals_name_what_is_refused() -> None:
    (reason,) = composite.why_not(call())
    assert "GPU" in reason and "cpu" in reason
    with interpreted():
        assert composite.why_not(call()) == []
        (reason,) = composite.why_not(call(dtype=torch.float64))
        assert "float64" in reason
        (reason,) = composite.why_not(call(w_format="nf3"))
        assert "nf3" in reason
    with interpreted(target(arch="sm_70")):
        (reason,) = composite.why_not(call())
        assert "sm_70" in reason and "sm_75" in reason
    with interpreted(target(arch="sm_75")):
        (reason,) = composite.why_not(call())
        assert "bf16" in reason
        assert composite.why_not(call(dtype=torch.float16)) == []


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"R": 8}, "r16 few"), ({"R": 64, "M": 16}, "r64 few"), ({"R": 17, "M": 32}, "r32 many"),
        ({"R": 200, "M": 8192}, "r128 in chunks many"),
    ],
)  # fmt: skip
def test_the_class_names_the_rank_block_and_the_rows(changes: dict[str, int], expected: str) -> None:
    assert composite.kernel_class(call(**changes)) == expected
