"""The Triton back-end with a quantised weight, in the interpreter: the weight bit for bit, and every result against
fp64, with the weight dequantised within the product and dequantised first."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from support import judging

from lora_kernels.core.dropout import keep_mask, rescale
from lora_kernels.quant.weight import DTYPES, FORMATS, QuantizedWeight, quantize_weight
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import judge, over_codes

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support.interp import interpret
from support.launches import changed

from lora_kernels.backends import triton, workspace
from lora_kernels.backends.triton import device
from lora_kernels.backends.triton import launch as launching
from lora_kernels.backends.triton import quant as quantised
from lora_kernels.core.operands import Adapter, Base, Call
from lora_kernels.plans import choose, quant_tiles, tiles

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
WITHIN = tiles.Tile(max_rank=64, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, BLOCK_R=64, GROUP_M=2, num_warps=4, num_stages=2)
TICKETS = tiles.Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2, num_warps=4, num_stages=2)
BACKWARD = tiles.Tile(
    BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
DENSE = {"tickets": TICKETS, "backward": BACKWARD}
WHOLE = dataclasses.replace(quant_tiles.WHOLE, BLOCK_N=32, BLOCK_K=64)
WAYS = {"within": {"decode16": WITHIN, "decode64": WITHIN, "backward": BACKWARD}, "first": {}}
"""W is dequantised within the products, or before them."""

KINDS = {
    "nf4": {"format": "nf4"},
    "nf4-32-nested": {"format": "nf4", "blocksize": 32, "double_quant": True},
    "fp4-nested": {"format": "fp4", "double_quant": True},
    "fp4-4096": {"format": "fp4", "blocksize": 4096},
    "int8": {"format": "int8"},
    "fp8-tensor": {"format": "fp8", "scaling": "tensor"},
    "fp8-row": {"format": "fp8"},
    "fp8-block": {"format": "fp8", "scaling": "block"},
}


@contextlib.contextmanager
def interpreted(way: str, capturing: bool = False) -> Iterator[ModuleType]:
    """Yield the back-end, which serves CPU tensors in one of the two ways. Fail where a launch has left counters in
    the workspace."""
    target = device.Target(tiles.Gpu("interpreter", 8), contextlib.nullcontext, lambda: 0, lambda: capturing)
    with pytest.MonkeyPatch.context() as patch, interpret():
        patch.setitem(device.TARGETS, CPU, target)
        for itemsize in (2, 4):
            patch.setitem(tiles.TABLES, ("interpreter", itemsize), DENSE)
            patch.setitem(quant_tiles.TABLES, ("interpreter", itemsize), WAYS[way])
        patch.setattr(quant_tiles, "ROWS", dict.fromkeys(quant_tiles.ROWS, 1000))
        patch.setattr(quantised, "WHOLE", WHOLE)
        patch.setattr(workspace, "_blocks", {})
        patch.setattr(workspace, "_by_stream", {})
        choose.plan.cache_clear()
        yield triton
        assert not workspace.clean(), "a launch left flags behind"


def quantise(q: judging.Problem, kind: str) -> QuantizedWeight:
    return quantize_weight(q.w, **KINDS[kind])


def results(q: judging.Problem, w: QuantizedWeight, way: str, **kwargs: bool) -> dict[str, torch.Tensor]:
    with interpreted(way, **kwargs) as backend:
        return judging.backend_results(backend, dataclasses.replace(q, w=w))


def check(got: dict[str, torch.Tensor], q: judging.Problem, w: QuantizedWeight) -> None:
    stored, plain = over_codes(q, w)
    for verdict in judge(got, stored, plain=plain):
        assert verdict.fault is None, verdict.fault


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Compare bits: NaN like any other value, and zeros with their signs."""
    whole = {2: torch.int16, 4: torch.int32}[want.element_size()]
    return got.dtype == want.dtype and torch.equal(got.view(whole), want.view(whole))


# --- the weight ---


def dequantised(w: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    with interpreted("first"):
        return quantised.dense(w, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_dequantised_bit_for_bit(kind: str, dtype: torch.dtype, poison: None) -> None:
    """The sizes are no multiples of the tiles and exceed a block of fp8; blocks of 4 bits straddle the rows."""
    w = quantize_weight(torch.randn(131, 134) * torch.logspace(-3, 2, 134), **KINDS[kind])
    assert same_bits(dequantised(w, dtype), w.dequantize(dtype))


@pytest.mark.parametrize("K", [2, 6, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_blocks_may_or_may_not_divide_the_rows(K: int, blocksize: int, poison: None) -> None:
    w = quantize_weight(torch.randn(17, K), "nf4", blocksize=blocksize, double_quant=True)
    assert same_bits(dequantised(w, torch.bfloat16), w.dequantize(torch.bfloat16))


def test_double_quantisation_may_have_several_second_level_blocks(poison: None) -> None:
    """There are more than 256 absmax, so they have two scales of their own."""
    w = quantize_weight(torch.randn(130, 66), "nf4", blocksize=32, double_quant=True)
    assert w.nested is not None and w.nested.absmax.numel() == 2
    assert same_bits(dequantised(w, torch.float32), w.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_code_is_decoded(dtype: torch.dtype) -> None:
    """The codes include subnormals, both zeros and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).view(torch.float8_e4m3fn)
    w = QuantizedWeight("fp8", (8, 32), dtype, codes, torch.tensor([[0.75]])).check()
    got, want = dequantised(w, dtype), w.dequantize(dtype)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 2
    assert same_bits(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_every_pair_of_codes_is_decoded(format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    w = QuantizedWeight(format, (8, 64), torch.float32, codes, torch.linspace(0.5, 2, 8), 64).check()
    assert same_bits(dequantised(w, torch.float32), w.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_extreme_weights_are_dequantised_bit_for_bit(format: str) -> None:
    """There are rows of zeros, of the smallest numbers and of almost the largest."""
    w = torch.randn(4, 64)
    w[0], w[1] = 0, w[1] * 1e-40
    w[2] *= 1e35
    q = quantize_weight(w, format)
    assert same_bits(dequantised(q, torch.float32), q.dequantize())


# --- results ---

SHAPES = [  # M, N, K, R
    (1, 1, 2, 1),
    (5, 7, 4, 2),
    (3, 40, 24, 8),
    (17, 33, 66, 3),
    (33, 70, 34, 17),
    (20, 24, 98, 64),
    (0, 16, 24, 4),
]
"""K is even. Results this small are judged element by element, by the bound of rounding."""
VARIETY = list(itertools.product(judging.DTYPES, [0.0, 0.3]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number, kind", list(enumerate(KINDS)))
def test_results_are_right_for_every_format(number: int, kind: str, way: str, poison: None) -> None:
    """Each format is tested with two shapes and two combinations of dtypes and dropout. Over all formats, every one
    occurs."""
    for turn in (2 * number, 2 * number + 1):
        (dtype, adapter_dtype), p = VARIETY[(3 * turn + list(WAYS).index(way)) % len(VARIETY)]
        shape, bias = SHAPES[turn % len(SHAPES)], turn % 3 > 0
        q = judging.problem(*shape, dtype=dtype, adapter_dtype=adapter_dtype, p=p, bias=bias, strided=turn % 2 == 0)
        w = quantise(q, kind)
        check(results(q, w, way), q, w)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_results_are_right_for_every_dtype(dtypes: tuple[torch.dtype, torch.dtype], way: str, poison: None) -> None:
    q = judging.problem(17, 20, 34, 5, dtype=dtypes[0], adapter_dtype=dtypes[1], p=0.3, strided=True)
    w = quantise(q, "nf4-32-nested")
    check(results(q, w, way), q, w)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_within_a_product_is_dequantised_bit_for_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """y = I Wᵀ and dx = I W show W itself. The launch that dequantises W first is taken away."""
    N, K = 21, 38
    w = quantize_weight(torch.randn(N, K), **KINDS[kind])
    monkeypatch.delattr(quantised, "dense")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.zeros(3, K, dtype=dtype), torch.zeros(N, 3, dtype=dtype)
        with interpreted("within") as backend:
            y, _ = one_layer.forward(backend, torch.eye(K, dtype=dtype), w, a, b, None, 1.0, 0.0, None, False)
            dx, _, _ = one_layer.backward(
                backend, torch.eye(N, dtype=dtype), None, w, a, b, None, 1.0, 0.0, None, True, False, False
            )
        assert torch.equal(y.t(), w.dequantize(dtype))
        assert torch.equal(dx, w.dequantize(dtype))


@pytest.mark.parametrize("way, dtype", [("within", torch.bfloat16), ("first", torch.float16)], ids=str)
def test_results_are_as_good_as_plain_torchs(way: str, dtype: torch.dtype, poison: None) -> None:
    """The results are large enough for statistics."""
    q = judging.problem(64, 64, 80, 16, dtype=dtype)
    w = quantise(q, "nf4")
    check(results(q, w, way), q, w)


@pytest.mark.parametrize("kind", ["nf4-32-nested", "fp8-block"])
def test_the_number_of_programs_does_not_change_a_bit(kind: str, poison: None) -> None:
    """Sums are split into parts or not, and those of the backward are run by one program or several."""
    M, N, K, R = 34, 24, 40, 5
    q = judging.problem(M, N, K, R, dtype=torch.bfloat16, p=0.3)
    w = quantise(q, kind)
    base, adapter = Base(w, q.bias), Adapter(q.a, q.b, q.scale, q.p, q.seed)
    target = device.Target(tiles.Gpu("interpreter", 8), contextlib.nullcontext, lambda: 0, lambda: False)
    for forward_split, backward_split in ((1, 1), (4, 4), (2, 2)):
        forward = tiles.Plan(True, WITHIN, forward_split, within=True)
        backward = tiles.Plan(False, BACKWARD, backward_split, within=True)
        runs = []
        for programs in (1, 3):
            y, h = torch.full((M, N), torch.nan).bfloat16(), torch.full((M, R), torch.nan).bfloat16()
            dx, da, db, g = (torch.full_like(t, torch.nan) for t in (q.x, q.a, q.b, h))
            with interpret():
                out = launching.Outputs(y, h, True)
                launching.forward_launch(target, forward, q.x, base, adapter, out).run()
                saved, gradients = launching.Saved(q.x, h), launching.GradientBuffers(dx, da, db, g)
                launch = launching.backward_launch(target, backward, q.dy, saved, base, adapter, gradients)
                assert launch.arguments["splits"] == {1: 1, 4: 3, 2: 2}[backward_split]
                changed(launch, programs).run()
            runs.append({"y": y, "dx": dx, "da": da, "db": db})
        check(runs[0], q, w)
        assert all(torch.equal(run[name], value) for run in runs[1:] for name, value in runs[0].items())


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_of_h_is_the_rule_bit_for_bit(way: str) -> None:
    """With a = I and x = 1, h is the mask times c."""
    M, K, p, seed = 21, 42, 0.4, torch.tensor(2**32 + 1)
    w = quantize_weight(torch.zeros(5, K), "nf4")
    with interpreted(way) as backend:
        _, h = one_layer.forward(
            backend, torch.ones(1, 1).expand(M, K), w, torch.eye(K), torch.zeros(5, K), None, 1.0, p, seed, True
        )
    keep = keep_mask(seed, M, K, p)
    assert torch.equal(h, keep * torch.tensor(rescale(p), dtype=torch.float32))


def test_only_what_is_needed_is_computed(poison: None) -> None:
    q = judging.problem(17, 17, 20, 3, dtype=torch.bfloat16, p=0.3)
    w = quantise(q, "int8")
    for way in WAYS:
        with interpreted(way) as backend:
            _, h = one_layer.forward(backend, q.x, w, q.a, q.b, None, q.scale, q.p, q.seed, False)
            assert h is None
            _, h = one_layer.forward(backend, q.x, w, q.a, q.b, None, q.scale, q.p, q.seed, True)
            full = one_layer.backward(backend, q.dy, q.x, w, q.a, q.b, h, q.scale, q.p, q.seed, True, True, True)
            for needs in itertools.product([False, True], repeat=3):
                x, kept = (q.x if needs[1] else None), (h if needs[2] else None)
                got = one_layer.backward(backend, q.dy, x, w, q.a, q.b, kept, q.scale, q.p, q.seed, *needs)
                for value, need, whole in zip(got, needs, full, strict=True):
                    assert torch.equal(value, whole) if need else value is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["nf4-32-nested", "fp8-row"])
def test_received_tensors_are_not_written_to(kind: str, way: str) -> None:
    q = judging.problem(20, 33, 40, 3, p=0.3)
    w = quantise(q, kind)
    before = [t.clone() for t in (*w.tensors, q.x, q.dy)]
    results(q, w, way)
    assert all(torch.equal(t, old) for t, old in zip((*w.tensors, q.x, q.dy), before, strict=True))


@pytest.mark.parametrize("scale", [0.0, -3.0, 2.0**-101])
def test_results_are_right_for_every_scale(scale: float) -> None:
    q = judging.problem(17, 20, 40, 4, dtype=torch.float16, scale=scale)
    w = quantise(q, "fp4-nested")
    check(results(q, w, "within"), q, w)


def test_captured_launches_have_counters_of_their_own() -> None:
    q = judging.problem(20, 33, 40, 3)
    w = quantise(q, "nf4")
    for way in WAYS:
        with interpreted(way, capturing=True) as backend:
            check(judging.backend_results(backend, dataclasses.replace(q, w=w)), q, w)
            assert not workspace._by_stream


# --- the choice ---


def case(itemsize: int, M: int, R: int) -> tiles.Case:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    return tiles.Case((dtype, dtype), M, 4096, 4096, R, False, w_format="nf4")


@pytest.mark.parametrize(
    "arch, itemsize, M, R, kind",
    [
        ("sm_90", 2, 1, 8, "decode16"),
        ("sm_90", 2, 16, 64, "decode16"),
        ("sm_90", 2, 16, 65, "decode16_wide"),
        ("sm_90", 2, 16, 129, None),
        ("sm_103", 2, 17, 64, "decode64"),
        ("sm_121", 2, 64, 64, "decode64"),
        ("sm_80", 2, 64, 65, None),
        ("sm_80", 2, 65, 8, None),
        ("sm_80", 4, 16, 32, "decode16"),
        ("sm_80", 4, 17, 8, None),
    ],
)
def test_few_rows_are_dequantised_within(arch: str, itemsize: int, M: int, R: int, kind: str | None) -> None:
    on, gpu = case(itemsize, M, R), tiles.Gpu(arch, 132)
    plan = choose.plan("forward", on, gpu)
    if kind is None:
        assert not plan.within and plan == choose.plan("forward", on._replace(w_format=""), gpu)
    else:
        assert plan.within and plan.redundant and plan.split > 1
        assert plan.tile is quant_tiles.TABLES[tiles.resolve(arch) or arch, itemsize][kind]


@pytest.mark.parametrize("arch, itemsize", quant_tiles.TABLES)
def test_few_rows_are_dequantised_within_the_backward(arch: str, itemsize: int) -> None:
    for M, R in ((1, 1), (16, 256), (64, 64), (65, 8), (4096, 8)):
        plan = choose.plan("backward", case(itemsize, M, R), tiles.Gpu(arch, 132))
        assert plan.within == (M <= 64)
        assert plan.tile.BLOCK_C and not plan.redundant
        assert plan.tile is (quant_tiles if plan.within else tiles).TABLES[arch, itemsize]["backward"] or M > 64


def test_every_architecture_has_a_table() -> None:
    assert set(quant_tiles.TABLES) == set(tiles.TABLES)


def test_refusals_name_the_format() -> None:
    call = Call("forward", CPU, torch.bfloat16, torch.bfloat16, 8, 8, 8, 8, False)
    with interpreted("within"):
        assert all(triton.why_not(call._replace(w_format=format)) == [] for format in ("dense", *FORMATS))
        (reason,) = triton.why_not(call._replace(w_format="int3"))
        assert "int3" in reason and "nf4" in reason


def test_kernels_take_no_addresses_of_strided_tensors() -> None:
    q = quantize_weight(torch.randn(48, 64), "int8")
    with pytest.raises(ValueError, match=r"codes of int8.*must be contiguous"):
        quantised.codes(dataclasses.replace(q, codes=q.codes.t().contiguous().t(), checked=True), 16)
