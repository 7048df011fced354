"""The judge rejects results that are slightly wrong, in every dtype. The other tests rely on it."""

from __future__ import annotations

import pytest
import torch
from support import judging

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


def test_the_poison_reaches_uninitialised_memory(poison):
    assert torch.empty(7).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
