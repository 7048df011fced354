"""The dtype of h and g in the back-end `eager`, and its products with fp32 adapters beside an x in 16 bits."""

from __future__ import annotations

import pytest
import torch
from support import judging
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.backends import eager, products
from lora_kernels.testing import one_layer

MIXED = [dtypes for dtypes in judging.DTYPES if dtypes[0] != dtypes[1]]


@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_h_has_the_dtype_of_the_adapters(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    _, h = one_layer.forward_of(eager, judging.problem(5, 7, 9, 3, dtype=dtypes[0], adapter_dtype=dtypes[1]))
    assert h.dtype == dtypes[1]


def test_h_and_g_do_not_overflow_where_x_is_fp16() -> None:
    """h and g reach 256000, above the largest fp16. What is computed from them is small."""
    big, small = torch.full((4, 64), 20.0), torch.full((64, 4), 1e-6)
    x = torch.full((5, 64), 200.0).half()
    w = torch.zeros(64, 64).half()
    y, h = one_layer.forward(eager, x, w, big, small, None, 1.0, 0.0, None, True)
    assert torch.equal(h, torch.full((5, 4), 256000.0))
    torch.testing.assert_close(y.float(), torch.full((5, 64), 1.024), rtol=2**-10, atol=0)
    seed = torch.tensor(3)
    for p in (0.0, 0.5):
        dx, da, db = one_layer.backward(eager, x, x, w, small.t(), big.t(), h, 1.0, p, seed if p else None)
        assert dx.isfinite().all() and dx.any()
        assert da.isfinite().all() and da.any()
        assert torch.equal(db, torch.full((64, 4), 5 * 200 * 256000.0))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_fp32_adapters_are_not_rounded(
    dtypes: tuple[torch.dtype, torch.dtype], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of A and B have errors of fp32, over several blocks of rows, and no fp32 copy of x is made."""
    monkeypatch.setattr(products, "_ROWS", 40)
    q = judging.problem(97, 70, 65, 16, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p)
    with _LargestSingle() as made:
        got = judging.backend_results(eager, q)
    judging.check(got, q)
    assert got["da"].dtype == got["db"].dtype == torch.float32
    assert made.numel <= 40 * 70


class _LargestSingle(TorchDispatchMode):
    """Records the number of elements of the largest fp32 tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out
