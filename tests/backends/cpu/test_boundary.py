"""The boundary between Python and the native CPU kernels: how tensors and adapters are read, what is refused, and how
many Python functions a call enters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import FrameType

import pytest
import torch
from torch import Tensor

from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.quant.weight import quantize_weight

_C = pytest.importorskip("lora_kernels._C", reason="the native CPU kernels were not built on this machine")
from support.native_problems import SEED, X_DTYPES  # noqa: E402
from support.paths import ROOT  # noqa: E402

from lora_kernels.backends import cpu  # noqa: E402


@pytest.mark.parametrize(
    "p", [0.0, 1e-6, 1e-5, 0.5, 0.99999, 1.0, *(i / 131072 for i in range(1, 200, 2)), *(i / 97 for i in range(97))]
)
def test_the_dropout_rule_is_the_same_in_python_and_in_the_kernels(p: float) -> None:
    """The thresholds are multiples of 2⁻¹⁶. Odd multiples of 2⁻¹⁷ lie half-way between two of them."""
    threshold, rescale = _C.dropout_rule(p)
    assert threshold == dropout.threshold(p) and rescale == torch.tensor(dropout.rescale(p), dtype=torch.float32).item()


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.99999])
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_the_mask_is_that_of_the_rule(isa: str, dtype: torch.dtype, p: float) -> None:
    seed = torch.tensor(SEED)
    for M, K in [(1, 1), (0, 5), (5, 0), (33, 203), (70, 4100), (300, 64)]:
        x = torch.randn(M, K).to(dtype)
        mask = cpu.keep_mask(x, p, seed)
        assert mask.dtype == dtype and mask.is_contiguous()
        assert torch.equal(mask, dropout.keep_mask(seed, M, K, p).to(dtype))


@pytest.mark.parametrize("dtype", X_DTYPES)
def test_operands_of_any_strides_give_the_bits_of_contiguous_ones(dtype: torch.dtype) -> None:
    M, N, K, R = 19, 40, 33, 5
    drawn = [torch.randn(*shape).to(dtype) for shape in ((M, K), (N, K), (N,), (R, K), (N, R), (M, N))]
    needs, seed = Needs(True, (True,), (True,)), torch.tensor(SEED)

    def run(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> list[Tensor | None]:
        bases, adapters = [Base(w, bias)], [Adapter(a, b, 0.5, 0.1, seed)]
        ys, hs = cpu.forward(x, bases, adapters, [True])
        assert hs[0] is not None
        dx, das, dbs = cpu.backward([dy], x, bases, adapters, [hs[0].t().contiguous().t()], needs)
        return [*ys, *hs, dx, *das, *dbs]

    def strided(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2]

    x, w, bias, a, b, dy = drawn
    want = run(x, w, bias, a, b, dy)
    got = run(strided(x), w, strided(bias), strided(a), strided(b), strided(dy))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_the_boundary_refuses_what_the_kernels_cannot_address() -> None:
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="last stride is 1, got 3"):
        _C.gemm(1, x, w, torch.empty(4, 3).t(), False, None)
    with pytest.raises(TypeError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        _C.gemm(1, x.double(), w.double(), torch.empty(3, 4).double(), False, None)
    with pytest.raises(ValueError, match="one or two dimensions, got 3"):
        _C.gemm(1, x[None], w, torch.empty(3, 4), False, None)
    adapter = Adapter(torch.randn(2, 8), torch.randn(4, 2), 1.0)
    one, many = [torch.zeros(3, 4)], [torch.zeros(3, 4)] * 2
    for ys, hs in ((one, []), (many, [None])):
        with pytest.raises(ValueError, match=r"one entry for each adapter: there are 1 adapters, and a list of [02]"):
            _C.forward(1, x, [Base(w)], [adapter], ys, hs, [False])
    with pytest.raises(ValueError, match="one entry for each adapter: there are 1 adapters, and a list of 0"):
        _C.backward(1, one, x, [Base(w)], [adapter], [], None, [None], [None], [False])
    with pytest.raises(ValueError, match="needs one adapter at least, got none"):
        _C.backward(1, [], x, [], [], [], None, [], [], [])
    with pytest.raises(TypeError, match="norms in float32"):
        _C.row_norm(1, w, torch.randn(2, 8), torch.randn(4, 2), 1.0, torch.empty(4).half())
    with pytest.raises(ValueError, match="only formats of nf4 and fp4"):
        _C.set_levels("int8", [0.0] * 16)


def test_the_boundary_refuses_operands_without_memory() -> None:
    """A null pointer would end the process."""
    x, w, y, h = torch.randn(3, 8), torch.randn(4, 8), torch.zeros(3, 4), torch.zeros(3, 2)
    adapter = Adapter(torch.randn(2, 8), torch.randn(4, 2), 1.0)
    for operands in ((x.to("meta"), w, y), (x, w.to("meta"), y), (x, w, y.to("meta"))):
        with pytest.raises(ValueError, match="meta device"):
            _C.gemm(1, *operands, False, None)
    with pytest.raises(ValueError, match="no element"):
        _C.keep_mask(1, 0.5, torch.empty(0, dtype=torch.int64), torch.empty(3, 8))
    with pytest.raises(TypeError, match="needs x"):
        _C.forward(1, None, [Base(w)], [adapter], [y], [h], [True])
    with pytest.raises(TypeError, match="needs y"):
        _C.forward(1, x, [Base(w)], [adapter], [None], [h], [True])
    with pytest.raises(TypeError, match="needs x"):
        _C.backward(1, [y], None, [Base(w)], [adapter], [h], None, [torch.empty(2, 8)], [None], [False])
    with pytest.raises(TypeError, match="needs h"):
        _C.backward(1, [y], x, [Base(w)], [adapter], [None], None, [None], [torch.empty(4, 2)], [False])
    with pytest.raises(TypeError, match="needs dx"):
        _C.backward(1, [y], x, [Base(w)], [adapter], [h], None, [None], [None], [True])
    with pytest.raises(TypeError, match="must be a string"):
        _C.dequantize(1, replace(quantize_weight(w), format=3), 0, 0, torch.empty(4, 8))


@pytest.mark.parametrize("name", ["x", "w", "bias", "lora_a", "lora_b", "y", "h", "dy", "dx", "da", "db", "n"])
@pytest.mark.parametrize("cut", [0, 1])
def test_the_boundary_refuses_operands_of_another_size(name: str, cut: int) -> None:
    """A kernel would read or write beyond the memory of an operand that is too small."""
    M, N, K, R = 3, 4, 8, 2
    sizes = {"x": (M, K), "w": (N, K), "bias": (N,), "lora_a": (R, K), "lora_b": (N, R), "y": (M, N), "h": (M, R),
             "dy": (M, N), "dx": (M, K), "da": (R, K), "db": (N, R), "n": (N,)}  # fmt: skip
    if cut >= len(sizes[name]):
        pytest.skip(f"{name} has one dimension")
    backward = name in ("x", "lora_a", "dy", "dx", "da", "db")

    def run(sizes: dict[str, tuple[int, ...]]) -> None:
        t = {key: torch.zeros(size) for key, size in sizes.items()}
        bases, adapters = [Base(t["w"], t["bias"])], [Adapter(t["lora_a"], t["lora_b"], 1.0)]
        if name in ("w", "lora_a", "lora_b", "n"):
            _C.row_norm(1, t["w"], t["lora_a"], t["lora_b"], 1.0, t["n"])
        _C.forward(1, t["x"], bases, adapters, [t["y"]], [t["h"]], [True])
        if backward:
            _C.backward(1, [t["dy"]], t["x"], bases, adapters, [t["h"]], t["dx"], [t["da"]], [t["db"]], [True])

    run(sizes)
    for change in (-1, 1):
        wrong = list(sizes[name])
        wrong[cut] += change
        with pytest.raises(ValueError, match=r"the CPU kernels take \w+ of size \[\d+, \d+\] here, got \["):
            run(sizes | {name: tuple(wrong)})


def test_the_boundary_refuses_operands_that_are_missing() -> None:
    """A null pointer would end the process."""
    x, w, y, h = torch.randn(3, 8), torch.randn(4, 8), torch.zeros(3, 4), torch.zeros(3, 2)
    a, b = torch.randn(2, 8), torch.randn(4, 2)
    for base, adapter, missing in (
        (Base(None), Adapter(a, b, 1.0), "w"),
        (Base(w), Adapter(None, b, 1.0), "a"),
        (Base(w), Adapter(a, None, 1.0), "b"),
    ):
        with pytest.raises(TypeError, match=f"needs {missing}, got None"):
            _C.forward(1, x, [base], [adapter], [y], [h], [True])
        with pytest.raises(TypeError, match=f"needs {missing}, got None"):
            _C.backward(1, [y], x, [base], [adapter], [h], torch.zeros(3, 8), [None], [None], [True])
    for operands, missing in (((None, a, b), "w"), ((w, None, b), "a"), ((w, a, None), "b")):
        with pytest.raises(TypeError, match=f"needs {missing}, got None"):
            _C.row_norm(1, *operands, 1.0, torch.empty(4))
    with pytest.raises(ValueError, match="blocksize of at least 1, got -1"):
        _C.dequantize(1, replace(quantize_weight(w, "nf4"), blocksize=-1), 0, 0, torch.empty(4, 8))


def test_tensors_are_read_through_dlpack_where_torch_has_its_table() -> None:
    assert _C.dlpack == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def test_tensors_are_read_alike_without_the_table_of_dlpack() -> None:
    """An older torch has no such table. Every other test of this file then passes too."""
    code = (
        "import sys, pytest, torch; torch.Tensor.__dlpack_c_exchange_api__ = None; from lora_kernels import _C; "
        f"sys.exit(_C.dlpack or pytest.main(['-q', '-k', 'not dlpack', {__file__!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_call_enters_few_python_functions_of_the_package(
    isa: str, quantised: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a small dense W they are two: the call itself, and the test whether the base product is small. Otherwise
    they are five at most, with our own GEMM: these two, the way to the base GEMM, the choice of it, and that GEMM."""
    x, w, dy = torch.randn(8, n), torch.randn(n, n), torch.randn(8, n)
    most = 2 if not quantised and _C.is_small(8, n, n) else 5
    bases = [Base(quantize_weight(w, "nf4") if quantised else w)]
    adapters = [Adapter(torch.randn(8, n), torch.randn(n, 8), 0.5, 0.1, torch.tensor(SEED))]
    _, hs = cpu.forward(x, bases, adapters, [True])
    needs = Needs(True, (True,), (True,))
    monkeypatch.setattr(cpu.gemm, "_choices", dict.fromkeys(cpu.gemm._choices, "own"))
    monkeypatch.setattr(cpu.gemm, "_faster", lambda *_: "own")
    for call in (
        lambda: cpu.forward(x, bases, adapters, [True]),
        lambda: cpu.backward([dy], x, bases, adapters, hs, needs),
    ):
        call()
        entered: list[str] = []

        def record(frame: FrameType, event: str, _: object, entered: list[str] = entered) -> None:
            if event == "call" and frame.f_globals["__name__"].startswith("lora_kernels"):
                entered.append(frame.f_code.co_name)

        before = sys.getprofile()
        sys.setprofile(record)
        try:
            call()
        finally:
            sys.setprofile(before)
        assert 0 < len(entered) <= most, entered
