"""Under deterministic algorithms the number of threads changes no bit of a result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels are not built")
from lora_kernels import dora_linear, lora_linear, lora_linear_group, quantize_weight  # noqa: E402
from lora_kernels.core.operands import Layer  # noqa: E402
from lora_kernels.ops import sums  # noqa: E402
from lora_kernels.ops.dora_norm import weight_norm  # noqa: E402

SIZES = [(5, 1024, 4096, 16), (300, 100, 130, 12), (1000, 100, 33, 3), (64, 1024, 1024, 64), (2, 1, 40_000, 4)]
"""M, N, K, R. torch's own product W Aᵀ, and its own sum over the rows of 1000 × 100, change with the threads here."""
THREADS = (1, 2, 3, 8)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def changed(call: Callable[[], dict[str, Tensor]]) -> list[str]:
    """Return the results that change with the number of threads."""
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(call())
    return [name for name, t in found[0].items() if not all(torch.equal(other[name], t) for other in found[1:])]


def operands(size, dtype=torch.float32):
    M, N, K, R = size
    leaves = {"x": torch.randn(M, K), "a": torch.randn(R, K), "b": torch.randn(N, R), "bias": torch.randn(N)}
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    return leaves, (torch.randn(N, K) * K**-0.5).to(dtype), torch.randn(M, N).to(dtype)


def graded(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_and_dora(dtype, p, size):
    leaves, w, dy = operands(size, dtype)
    m = (torch.rand(size[1]) + 0.5).to(dtype).requires_grad_()
    args = w, leaves["a"], leaves["b"]
    more = {"scale": 2.0, "bias": leaves["bias"], "dropout_p": p, "seed": 5}
    assert changed(lambda: graded(lora_linear(leaves["x"], *args, **more), dy, leaves)) == []
    assert changed(lambda: graded(dora_linear(leaves["x"], *args, m, **more), dy, leaves | {"m": m})) == []


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_groups(size, isa):
    leaves, w, dy = operands(size)
    layers = [Layer(w, leaves["a"], leaves["b"], 2.0, leaves["bias"]), Layer(w * 2, leaves["a"], leaves["b"], 1.0)]

    def group():
        ys = lora_linear_group(leaves["x"], layers)
        grads = torch.autograd.grad(ys, list(leaves.values()), [dy, dy])
        return {"y": ys[0].detach(), "y1": ys[1].detach()} | dict(zip(leaves, grads, strict=True))

    assert changed(group) == []


@pytest.mark.parametrize("size", [(5, 1023, 258, 16), (300, 100, 130, 12), (40, 1023, 66, 3)], ids=str)
@pytest.mark.parametrize("how", [{"format": "fp8", "scaling": "block"}, {"format": "int8"}, {"format": "nf4"}], ids=str)
def test_quantised_weights(how, size, isa):
    leaves, w, dy = operands(size)
    q = quantize_weight(w, **how)
    assert (
        changed(
            lambda: graded(
                lora_linear(leaves["x"], q, leaves["a"], leaves["b"], scale=2.0, bias=leaves["bias"]), dy, leaves
            )
        )
        == []
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms_of_dora(size):
    leaves, w, _ = operands(size)
    a, b, m = leaves["a"].detach(), leaves["b"].detach(), torch.empty(0)
    for weight in (w, w.t().contiguous().t(), w.bfloat16()):
        assert changed(functools.partial(norms, weight, a, b, m)) == []


def norms(weight, a, b, m) -> dict[str, Tensor]:
    return {"n": weight_norm(weight, a, b, 2.0, m)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_column_sum_is_right_and_does_not_change(dtype):
    for M, N in ((0, 3), (1, 5), (1000, 100), (31, 1025), (4000, 7), (2, 40_000)):
        u = torch.randn(M, N).to(dtype)
        assert changed(functools.partial(column_sum, u)) == []
        got, exact = sums.column_sum(u), u.double().sum(0)
        assert got.dtype == dtype and got.shape == (N,)
        bound = torch.finfo(dtype).eps * exact.abs() + 20 * torch.finfo(
            torch.promote_types(dtype, torch.float32)
        ).eps * (u.double().abs().sum(0))
        assert ((got.double() - exact).abs() <= bound).all()


def column_sum(u: Tensor) -> dict[str, Tensor]:
    return {"sum": sums.column_sum(u)}
