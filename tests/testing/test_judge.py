"""The judge rejects results that are slightly wrong, in every dtype. The other tests rely on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import judging

from lora_kernels.testing.judge import roundings

WRONG = {
    "a factor of 1 - p forgotten": lambda t, q: t * 0.7,
    "one per cent too large": lambda t, q: (t.double() * 1.01).to(t.dtype),
    "one row missing": lambda t, q: torch.cat([t[:-1], torch.zeros_like(t[:1])]),
    "one element off": lambda t, q: t.clone().index_put_((torch.tensor(0), torch.tensor(0)), t[0, 0] + t.abs().max()),
    "not a number": lambda t, q: t.clone().index_put_(
        (torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"), dtype=t.dtype)
    ),
    "transposed": lambda t, q: t.t().contiguous() if t.shape[0] == t.shape[1] else t.flip(0),
    "three roundings more": lambda t, q: (
        t.double() * (1 + 6 * torch.finfo(q.x.dtype).eps * torch.randn_like(t.double()))
    ).to(t.dtype),
}


SMALL, LARGE = (48, 40, 56, 8), (211, 193, 187, 8)


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["y", "dx", "da", "db"])
@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        (shape, wrong)
        for shape in (SMALL, LARGE)
        for wrong in WRONG
        if shape == LARGE or wrong not in ("one per cent too large", "three roundings more")
    ],
    ids=str,
)
def test_a_wrong_result_is_rejected(shape, wrong, name, dtypes):
    """Large results are judged by statistics, small ones by a bound on rounding. The bound accepts three more roundings
    in a sum of 60 terms, and an error of one per cent in 16 bits, so these two are tried on large results only."""
    q = judging.problem(*shape, dtype=dtypes[0], adapter_dtype=dtypes[1], p=0.3)
    results = judging.evaluate(q)
    judging.check(results, q)
    with pytest.raises(AssertionError, match=name):
        judging.check({name: WRONG[wrong](results[name], q)}, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_gradient_that_is_wrong_is_rejected(dtype):
    """A bias gradient has few elements, and is rounded only once."""
    for shape in (SMALL, LARGE):
        q = judging.problem(*shape, dtype=dtype)
        dbias = judging.evaluate(q)["dbias"]
        judging.check({"dbias": dbias}, q)
        with pytest.raises(AssertionError, match="dbias"):
            judging.check({"dbias": (dbias.double() * 1.01).to(dtype)}, q)


def repeating(name, shape, dtype, seed=0):
    """A problem whose x or dy repeats its first row."""
    q = judging.problem(*shape, dtype=dtype, seed=seed)
    rows = getattr(q, name)
    return replace(q, **{name: rows[:1].expand(rows.shape)})


def fewer_digits(t, bits):
    """The numbers rounded to so many bits fewer than their dtype has."""
    mantissa, exponent = torch.frexp(t.double())
    step = torch.finfo(t.dtype).eps / 2 * 2**bits
    return torch.ldexp((mantissa / step).round() * step, exponent).to(t.dtype)


def test_numbers_that_repeat_count_as_one_rounding():
    shape = (_, N, K, R) = 200, 90, 70, 8
    counts = {"x": {"y": R, "db": R}, "dy": {"dx": R, "da": R}, "": {}}
    for name, few in counts.items():
        q = repeating(name, shape, torch.float16) if name else judging.problem(*shape, dtype=torch.float16)
        want = judging.truth(q)
        expected = {"y": 1024, "dx": 1024, "da": R * K, "db": N * R, "dbias": N}
        assert roundings(q, want) == pytest.approx(expected | few, rel=0.02)  # some sums are equal by chance
    q = judging.problem(*shape, dtype=torch.float16, p=0.5)
    assert roundings(q, judging.truth(q))["da"] == pytest.approx(R * K / 2, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "result"), [("dy", "dx"), ("x", "y")])
def test_results_that_repeat_a_row_are_accepted_if_their_errors_are_those_of_plain_torch(name, result, dtype):
    """The errors of plain torch on other numbers are as good as its own. Over 30 elements their RMS differs by a factor
    above 1.25 by chance."""
    problems = [repeating(name, (64, 30, 30, 18), dtype, seed) for seed in range(60)]
    truths = [judging.truth(q)[result] for q in problems]
    errors = [judging.evaluate(q)[result].double() - want for q, want in zip(problems, truths, strict=True)]
    ratios = []
    for i, q in enumerate(problems):
        judging.check({result: truths[i] + errors[i - 1]}, q)
        ratios.append(errors[i - 1].square().mean().sqrt() / errors[i].square().mean().sqrt())
    assert max(ratios) > 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "result"), [("dy", "dx"), ("x", "y")])
def test_a_wrong_result_that_repeats_a_row_is_rejected(name, result, dtype):
    q = repeating(name, (211, 193, 187, 64), dtype)
    right = judging.evaluate(q)[result]
    judging.check({result: right}, q)
    wrong = {
        "rounded twice, first to fewer digits": fewer_digits(right, 13 if dtype == torch.float32 else 3),
        "three roundings more": WRONG["three roundings more"](right, q),
        "one row missing": WRONG["one row missing"](right, q),
        "one element off": WRONG["one element off"](right, q),
    }
    for fault, value in wrong.items():
        with pytest.raises(AssertionError, match=result):
            judging.check({result: value.to(dtype)}, q)
            pytest.fail(fault)


def test_the_poison_reaches_uninitialised_memory(poison):
    assert torch.empty(7).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
