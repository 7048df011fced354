"""The source of the sm_90a kernels, run as a whole and in random order on the emulated GPU of
tests/helpers/support/sm90_machine."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch
from support import sm90

from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch
from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans.sm90 import BY_RULE, PLANS, Sm90Plan
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import Problem, judge, problem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the emulated kernels with"),
    pytest.mark.skipif(sm90.cuda_include() is None, reason="the headers of the CUDA toolkit are not there"),
    pytest.mark.timeout(600),  # the first test compiles the kernels for the host
]

FP16, BF16 = torch.float16, torch.bfloat16


SINGLE, PAIRS = PLANS[1:]
"""Plans with tiles of 256 columns. `BY_RULE` takes tiles of 128 where there are few."""


def results(device: sm90.Device, q: Problem) -> dict[str, torch.Tensor]:
    y, h = device.forward(q.x, q.w, q.a, q.b, q.bias, q.scale, q.p, q.seed)
    dx, da, db = device.backward(q.dy, q.x, q.w, q.a, q.b, h, q.scale, q.p, q.seed)
    return {"y": y, "dx": dx, "da": da, "db": db}


def assert_right(got: dict[str, torch.Tensor], q: Problem) -> None:
    assert [verdict.fault for verdict in judge(got, q) if verdict.fault] == []


@pytest.mark.parametrize("plan", [BY_RULE, SINGLE, PAIRS])
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "p", "dtype", "sms", "resident"),
    [
        (1, 8, 8, 1, 0.0, BF16, 4, 4),  # decode, all at the edge
        (3, 136, 1288, 8, 0.0, BF16, 16, 3),  # decode, K in parts
        (16, 264, 200, 20, 0.0, FP16, 3, 2),  # decode, a copied
        (33, 72, 328, 136, 0.0, BF16, 9, 9),  # decode, two tiles of a
        (64, 392, 72, 256, 0.0, FP16, 4, 1),
        (40, 72, 72, 3, 0.4, BF16, 4, 2),  # few rows, but dropout
        (200, 264, 136, 16, 0.0, BF16, 4, 2),  # tiles of 256 columns
        (200, 264, 136, 20, 0.25, BF16, 4, 4),
        (130, 520, 392, 64, 0.1, FP16, 3, 3),
        (130, 520, 392, 33, 0.0, BF16, 64, 7),  # tiles of 128 columns, more blocks than items at a time
        (257, 72, 328, 128, 0.5, BF16, 3, 2),
        (257, 136, 72, 129, 0.3, BF16, 99, 5),  # two rank tiles
        (129, 264, 264, 256, 0.0, FP16, 2, 1),
        (1601, 72, 72, 8, 0.3, BF16, 4, 3),  # da and db in parts
        (1100, 72, 136, 160, 0.0, FP16, 8, 8),
    ],
)
def test_results_are_right(M, N, K, R, p, dtype, sms, resident, plan) -> None:
    q = problem(M, N, K, R, dtype=dtype, p=p, seed=M)
    assert_right(results(sm90.Device(M, sms, resident, plan), q), q)


@pytest.mark.parametrize("plan", [BY_RULE, PAIRS])
def test_random_shapes_on_one_stream(plan: Sm90Plan) -> None:
    """The launches follow each other over one workspace, as on a stream."""
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    device = sm90.Device(3, 5, 3, plan)
    for seed in range(8):
        q = problem(
            draw(1, 300), 8 * draw(1, 40), 8 * draw(1, 40), draw(1, 257), dtype=BF16,
            p=0.2 * (seed % 2), bias=seed % 4 != 3, scale=(0.5, -3.0, 0.0)[seed % 3], seed=seed,
        )  # fmt: skip
        assert_right(results(device, q), q)


@pytest.mark.parametrize("plan", [BY_RULE, PAIRS])
def test_results_do_not_depend_on_timing(plan: Sm90Plan) -> None:
    q = problem(1100, 136, 136, 40, dtype=BF16, p=0.2)
    runs = [results(sm90.Device(seed, 6, resident, plan), q) for seed, resident in ((1, 1), (2, 3), (3, 6))]
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


@pytest.mark.parametrize("R", [5, 24, 40, 200])
def test_pairs_of_blocks_give_the_bits_of_single_ones(R: int) -> None:
    """Every plan adds over K and N in the same order. The sums over M are the same too, because three row blocks are
    not split."""
    q = problem(300, 264, 136, R, dtype=BF16, p=0.2, seed=R)
    single, pairs = (results(sm90.Device(R, 6, 4, plan), q) for plan in (SINGLE, PAIRS))
    for name, value in pairs.items():
        assert torch.equal(value, single[name]), name


@pytest.mark.parametrize("seed", range(4))
def test_pairs_of_blocks_are_right_in_any_order(seed: int) -> None:
    """Items have few stages, so that a block often waits for the other. The number of row blocks is odd. Seeds 0 and 2
    have two rank tiles."""
    q = problem(270, 136, 264, (130, 17)[seed % 2], dtype=FP16, p=0.1, seed=seed)
    assert_right(results(sm90.Device(seed, 2 + seed, 2 + seed, PAIRS), q), q)


def test_decode_does_not_depend_on_timing() -> None:
    q = problem(5, 264, 1400, 24, dtype=FP16)
    devices = [sm90.Device(1, 12, 1), sm90.Device(2, 12, 12)]
    runs = [device.forward(q.x, q.w, q.a, q.b, q.bias, 1.0, 0.0, None) for device in devices]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_dropout_follows_the_rule_bit_for_bit() -> None:
    """With a = I and x = 1, h is c times the mask."""
    M, K = 300, 136
    q = problem(M, 8, K, K, dtype=FP16, p=0.37)
    x, a = torch.ones(M, K, dtype=FP16), torch.eye(K, dtype=FP16)
    _, h = sm90.Device().forward(x, q.w, a, q.b, None, 1.0, q.p, q.seed)
    assert torch.equal(h != 0, dropout.keep_mask(q.seed, M, K, q.p))


@pytest.mark.parametrize("plan", [BY_RULE, PAIRS])
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_only_the_wanted_gradients_are_computed(needs: tuple[int, int, int], plan: Sm90Plan) -> None:
    q = problem(150, 72, 136, 12, dtype=BF16, p=0.2)
    device = sm90.Device(5, plan=plan)
    _, h = device.forward(q.x, q.w, q.a, q.b, None, q.scale, q.p, q.seed)
    whole = device.backward(q.dy, q.x, q.w, q.a, q.b, h, q.scale, q.p, q.seed)
    part = device.backward(
        q.dy, q.x if needs[1] else None, q.w, q.a, q.b, h if needs[2] else None, q.scale, q.p, q.seed, *map(bool, needs)
    )
    for needed, want, got in zip(needs, whole, part, strict=True):
        assert torch.equal(got, want) if needed else got is None


def test_h_is_not_stored_unless_asked_for() -> None:
    for M in (150, 20):
        q = problem(M, 72, 136, 12, dtype=BF16)
        y, h = sm90.Device().forward(q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None, save_h=False)
        assert h is None
        assert torch.equal(y, sm90.Device().forward(q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None)[0])


@pytest.mark.parametrize("plan", [BY_RULE, PAIRS])
def test_row_strides_do_not_change_the_results(plan: Sm90Plan) -> None:
    """Rows are further apart than their length, and a and b start at odd elements or are one row expanded. The launch
    converts an a or b that TMA cannot read."""
    q = problem(140, 72, 136, 24, dtype=BF16, p=0.3)

    def apart(t: torch.Tensor, by: int, offset: int = 0) -> torch.Tensor:
        wide = torch.full((t.shape[0], t.shape[1] + by), float("nan"), dtype=t.dtype)
        wide[:, offset : offset + t.shape[1]] = t
        return wide[:, offset : offset + t.shape[1]]

    moved = replace(q, x=apart(q.x, 8), w=apart(q.w, 24), dy=apart(q.dy, 16), a=apart(q.a, 3, 1), b=apart(q.b, 5, 2))
    whole = results(sm90.Device(2, plan=plan), q)
    for name, value in results(sm90.Device(9, plan=plan), moved).items():
        assert torch.equal(value, whole[name]), name
    one = replace(q, a=q.a[:1].expand_as(q.a), b=q.b[:1].expand_as(q.b))
    copied = results(sm90.Device(3, plan=plan), replace(one, a=one.a.contiguous(), b=one.b.contiguous()))
    for name, value in results(sm90.Device(4, plan=plan), one).items():
        assert torch.equal(value, copied[name]), name


def test_a_row_that_is_not_finite_changes_no_other_row() -> None:
    """A row of x that is not finite changes no other row, and the padding of the rank adds no NaN to the row itself."""
    q = problem(130, 72, 136, 5, dtype=BF16)
    x = q.x.clone()
    x[7, 3], x[129] = float("inf"), float("nan")
    y, h = sm90.Device().forward(x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None)
    clean_y, clean_h = sm90.Device().forward(q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None)
    others = torch.ones(130, dtype=torch.bool)
    others[[7, 129]] = False
    assert torch.equal(y[others], clean_y[others])
    assert torch.equal(h[others], clean_h[others])
    assert torch.equal(torch.isnan(h[7]), torch.isnan(x[7:8].float() @ q.a.float().t())[0])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"K": 4}, {"N": 12}, {"R": 257}, {"M": 0}, {"ldw": 73}, {"w": 8}, {"bias": 2}),
        *({"threshold": 70000}, {"threshold": 5}),
        *({"columns": 64, "cluster": 1}, {"columns": 128, "cluster": 2}, {"columns": 256}, {"cluster": 2}),
    ],
)
def test_operands_that_break_the_rules_are_refused(wrong: dict[str, int | None]) -> None:
    q = problem(16, 72, 72, 8, dtype=BF16)
    args = sm90.ForwardArgs()
    sm90.Device()._operands(args, 16, q.x, q.w, q.a, q.b, 1.0, 0.0, None)
    needed = sm90.Workspace()
    workspace = sm90.library().emulated_forward_workspace
    assert workspace(ctypes.byref(args), ctypes.byref(needed)) == b""
    for field, value in wrong.items():
        setattr(args, field, value)
    assert workspace(ctypes.byref(args), ctypes.byref(needed)) == b"cudaError_t 1"  # cudaErrorInvalidValue


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> sm90.Extension:
    return sm90.serve_cpu(monkeypatch)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.usefixtures("extension")
def test_every_plan_can_be_asked_for(plan: Sm90Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan reaches the kernels, and they fill the tensors that they are given."""
    asked = []

    def operands(*args: object) -> dict[str, object]:
        asked.append(given := make(*args))
        return given

    make = launch.operands
    monkeypatch.setattr(launch, "operands", operands)
    q = problem(20, 72, 136, 12, dtype=BF16)
    y, h, dx, da, db = (torch.full_like(t, float("nan")) for t in (q.dy, q.x[:, :12], q.x, q.a, q.b))
    base, adapter = Base(q.w, q.bias), Adapter(q.a, q.b, q.scale)
    launch.launch_forward(plan, q.x, base, adapter, y, h)
    launch.launch_backward(plan, q.dy, q.x, base, adapter, h, launch.GradientBuffers(dx, da, db))
    assert_right({"y": y, "dx": dx, "da": da, "db": db}, q)
    assert [(each["columns"], each["cluster"]) for each in asked] == [plan, plan]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("M", "p"), [(1, 0.0), (20, 0.0), (150, 0.3), (0, 0.3)])
@pytest.mark.usefixtures("extension", "poison")
def test_the_backend_gives_right_results(M: int, p: float, strided: bool) -> None:
    q = problem(M, 72, 136, 12, dtype=BF16, p=p, strided=strided)
    y, h = one_layer.forward(cuda, q.x, q.w, q.a, q.b, q.bias, q.scale, q.p, q.seed, True)
    dx, da, db = one_layer.backward(cuda, q.dy, q.x, q.w, q.a, q.b, h, q.scale, q.p, q.seed, True, True, True)
    assert_right({"y": y, "dx": dx, "da": da, "db": db}, q)
    assert all(t.is_contiguous() for t in (y, h, dx, da, db))


@pytest.mark.parametrize("at", [slice(1, 73), slice(0, 144, 2)])
@pytest.mark.usefixtures("extension")
def test_a_bias_that_cannot_be_read_in_pairs_is_copied(at: slice) -> None:
    q = problem(150, 72, 136, 12, dtype=BF16)
    bias = torch.zeros(144, dtype=BF16)[at].copy_(q.bias)
    want, _ = one_layer.forward(cuda, q.x, q.w, q.a, q.b, q.bias, q.scale, 0.0, None, False)
    got, _ = one_layer.forward(cuda, q.x, q.w, q.a, q.b, bias, q.scale, 0.0, None, False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 3, -7])
@pytest.mark.parametrize(("M", "K", "p"), [(1, 8, 0.5), (37, 136, 0.1), (300, 72, 0.9), (5, 16, 0.0), (0, 8, 0.5)])
@pytest.mark.usefixtures("extension", "poison")
def test_the_mask_kernel_draws_the_rule(M: int, K: int, p: float, seed: int, dtype: torch.dtype) -> None:
    x, given = torch.ones(K, M, dtype=dtype).t(), torch.tensor(seed)
    mask = cuda.keep_mask(x, p, given)
    assert mask.dtype == dtype
    assert mask.is_contiguous()
    assert torch.equal(mask, dropout.keep_mask(given, M, K, p).to(dtype))
