"""What the `cuda` back-end hands to the CUDA runtime: kernels, grids, parameters and tensor maps. It goes through the
extension's own bindings and launches, on the stand-in for the runtime of tests/helpers/support/stand_in."""

from __future__ import annotations

import shutil

import pytest
import torch
from support import sm90
from support.stand_in.runtime import Launched, Runtime, TensorMap

from lora_kernels.backends import cuda, workspace
from lora_kernels.backends.cuda import launch
from lora_kernels.core import dropout
from lora_kernels.core.operands import Base
from lora_kernels.plans.sm90 import BY_RULE, PLANS, Sm90Plan
from lora_kernels.testing import one_layer
from lora_kernels.testing.judge import Problem, problem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the extension with"),
    pytest.mark.skipif(sm90.cuda_include() is None, reason="the headers of the CUDA toolkit are not there"),
    pytest.mark.timeout(300),  # the first test compiles the extension for the host
]

BF16, FP16 = torch.bfloat16, torch.float16
INVALID_VALUE = 1
SHARED_LIMIT = 232448
"""The bytes of shared memory that a block can have on sm_90."""


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return sm90.serve_cpu(monkeypatch, Runtime(ordinal=3))


def forward(extension: Runtime, q: Problem) -> tuple[list[TensorMap], Launched, torch.Tensor, torch.Tensor | None]:
    """Return the tensor maps and the one launch of a forward, y and h."""
    y, h = one_layer.forward_of(cuda, q)
    maps, (launched,) = extension.take()
    return maps, launched, y, h


def map_of(maps: list[TensorMap], t: torch.Tensor, box: tuple[int, int]) -> TensorMap:
    """Return the one map that reads or writes t as it lies in memory, in boxes of a size."""
    (found,) = [each for each in maps if each.address == t.data_ptr() and each.box == box]
    assert found.shape == t.shape and found.row_bytes == 2 * t.stride(0) and found.bf16 == (t.dtype == BF16)
    assert found.swizzle == min(2 * box[1], 128)
    return found


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_parameters_of_a_forward_arrive(extension, dtype) -> None:
    q = problem(300, 264, 136, 40, dtype=dtype, p=0.25)
    maps, launched, y, _ = forward(extension, q)
    for t, box in ((q.x, (128, 64)), (q.w, (128, 64)), (q.a, (64, 64)), (q.b, (128, 64)), (y, (64, 64))):
        map_of(maps, t, box)
    assert len(maps) == 6, "those five, and s · h"
    assert launched.sizes == (300, 264, 136, 40)
    assert (launched.device, launched.stream, launched.threads) == (3, 5, 384)
    assert launched.seed == q.seed.data_ptr()
    assert launched.threshold == dropout.threshold(0.25)
    assert (launched.rescale, launched.scale) == pytest.approx((dropout.rescale(0.25), q.scale), rel=1e-5)
    counters = workspace._by_stream[q.x.device, 5]
    assert launched.counters == counters.data_ptr() and launched.counter_count <= counters.numel()


@pytest.mark.parametrize("R", [1, 16, 40, 65, 200])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_takes_its_kernel(extension, monkeypatch, plan: Sm90Plan, R: int) -> None:
    """Both passes launch the kernel of the dtype, the columns, the padded rank and the cluster that were asked for."""
    monkeypatch.setattr(cuda, "_plan", lambda *args: plan)
    dtype, element = (BF16, "__nv_bfloat16") if R % 2 else (FP16, "__half")
    q = problem(300, 264, 136, R, dtype=dtype)
    padded = next(each for each in (16, 64, 128, 256) if each >= R)
    arguments = f"{element}, {plan.columns}, {min(padded, 128)}, {plan.cluster}>"
    _, launched, _, h = forward(extension, q)
    one_layer.backward_of(cuda, q, h)
    _, (backward,) = extension.take()
    for each, parameters in ((launched, "ForwardParams"), (backward, "BackwardParams")):
        assert f"<lk::sm90::{parameters}, {arguments}" in each.kernel
        assert each.cluster == plan.cluster and each.grid[0] % plan.cluster == 0 and each.grid[1:] == (1, 1)
        assert each.shared <= SHARED_LIMIT


@pytest.mark.parametrize(("M", "rows"), [(1, 8), (9, 16), (17, 32), (64, 64)])
def test_few_rows_take_the_decode_kernel(extension, M, rows) -> None:
    q = problem(M, 264, 1288, 16, dtype=BF16)
    maps, launched, _, _ = forward(extension, q)
    assert [each.box for each in maps] == [(rows, 64), (128, 64), (128, 64)]
    assert [each.address for each in maps] == [t.data_ptr() for t in (q.x, q.w, q.a)]
    assert launched.kernel == "" and launched.cluster == 1 and launched.sizes == (M, 264, 1288, 16)
    stage = 128 * 64 * 2 + rows * 64 * 2
    assert (launched.shared - 1024 - 256) % stage == 0 and launched.shared <= SHARED_LIMIT
    assert launched.grid[0] <= 132


def test_the_grid_is_no_larger_than_the_work_or_the_device(extension, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_plan", lambda *args: PLANS[0])
    grids = [forward(extension, problem(M, 512, 72, 16, dtype=BF16))[1].grid[0] for M in (100, 8000)]
    assert grids == [1 + 4, 132]  # one tile of h, four of y; all multiprocessors


def test_a_backward_maps_what_it_reads_and_writes(extension) -> None:
    q = problem(300, 264, 136, 16, dtype=BF16, p=0.1)
    h = torch.zeros(300, 16, dtype=BF16)
    dx, *_ = one_layer.backward_of(cuda, q, h)
    maps, (launched,) = extension.take()
    for t, box in (
        (q.dy, (128, 64)), (q.b, (64, 16)), (q.a, (64, 64)), (q.w, (64, 64)), (dx, (64, 64)), (q.dy, (64, 64)),
        (h, (64, 16)), (q.x, (64, 64)),
    ):  # fmt: skip
        map_of(maps, t, box)
    assert len(maps) == 10, "those eight, and g by rows and by columns"
    assert launched.sizes == (300, 264, 136, 16) and launched.stream == 5


@pytest.mark.parametrize(
    ("needs", "read"),
    [
        ((True, False, False), {"dy", "b", "a", "w"}),
        ((False, True, False), {"dy", "b", "x"}),
        ((False, False, True), {"dy", "h"}),
    ],
    ids=["dx", "da", "db"],
)
def test_a_backward_reads_only_what_a_gradient_needs(extension, needs, read) -> None:
    q = problem(300, 264, 136, 16, dtype=BF16)
    operands = {"dy": q.dy, "x": q.x, "w": q.w, "a": q.a, "b": q.b, "h": torch.zeros(300, 16, dtype=BF16)}
    one_layer.backward(cuda, q.dy, q.x, q.w, q.a, q.b, operands["h"], q.scale, 0.0, None, *needs)
    maps, (launched,) = extension.take()
    addresses = {each.address for each in maps}
    assert {name for name, t in operands.items() if t.data_ptr() in addresses} == read
    assert launched.seed == 0 and launched.threshold == 0


def test_a_view_whose_rows_are_aligned_is_read_where_it_lies(extension) -> None:
    q = problem(300, 264, 136, 16, dtype=BF16)
    x = torch.zeros(300, 160, dtype=BF16)[:, 8:144]
    one_layer.forward(cuda, x, q.w, q.a, q.b, None, 1.0, 0.0, None, False)
    maps, _ = extension.take()
    assert map_of(maps, x, (128, 64)).row_bytes == 320


@pytest.mark.parametrize("at", [slice(1, 137), slice(0, 272, 2)], ids=["unaligned", "strided"])
def test_a_view_that_no_map_describes_is_copied(extension, at) -> None:
    q = problem(300, 264, 136, 16, dtype=BF16)
    x = torch.zeros(300, 272, dtype=BF16)[:, at]
    one_layer.forward(cuda, x, q.w, q.a, q.b, None, 1.0, 0.0, None, False)
    maps, (launched,) = extension.take()
    (of_x,) = [each for each in maps if each.shape == (300, 136)]
    assert of_x.address != x.data_ptr() and of_x.row_bytes == 2 * 136
    assert launched.sizes == (300, 264, 136, 16)


def test_adapters_that_no_map_describes_are_copied_to_scratch(extension, monkeypatch) -> None:
    """b's rows of 12 elements are no multiple of 16 bytes, so its map lies in the scratch of the launch."""
    scratch = []

    def kept(*args: object) -> workspace.Workspace:
        scratch.append(make(*args))
        return scratch[-1]

    make = launch.workspace
    monkeypatch.setattr(launch, "workspace", kept)
    q = problem(300, 264, 136, 12, dtype=BF16)
    maps, *_ = forward(extension, q)
    (of_b,) = [each for each in maps if each.shape == (264, 12)]
    first = scratch[0].scratch.data_ptr()
    assert first <= of_b.address < first + 4 * scratch[0].scratch.numel()
    assert of_b.bf16 and of_b.row_bytes == 2 * 16


def test_clusters_that_cannot_run_together_are_left_out(monkeypatch) -> None:
    """The runtime is asked once for each kernel and device, and a launch has no more clusters than it allows."""
    q = problem(8000, 512, 72, 16, dtype=BF16)
    monkeypatch.setattr(cuda, "_plan", lambda *args: Sm90Plan(256, 2))
    grids, asked = [], []
    for ordinal, allowed in ((4, 50), (4, 40), (5, 40)):
        extension = sm90.serve_cpu(monkeypatch, Runtime(ordinal))
        extension.allow_clusters(allowed)
        before = extension.occupancy_questions
        grids.append(forward(extension, q)[1].grid[0])
        asked.append(extension.occupancy_questions - before)
    assert grids == [100, 100, 80] and asked == [1, 0, 1]


@pytest.mark.parametrize("M", [0, 300])
def test_an_empty_problem_launches_nothing(extension, M) -> None:
    q = problem(M, 264, 136, 16, dtype=BF16)
    y, h = one_layer.forward_of(cuda, q)
    assert (y.shape, h.shape) == ((M, 264), (M, 16))
    one_layer.backward_of(cuda, q, h)
    _, launches = extension.take()
    assert len(launches) == (2 if M else 0)


def test_a_launch_that_fails_raises_and_the_next_one_is_not_disturbed(extension) -> None:
    q = problem(300, 264, 136, 16, dtype=BF16)
    *_, launched, _, _ = forward(extension, q)
    extension.fail_next_launch(INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"the sm_90a launch failed: cudaErrorInvalidValue"):
        one_layer.forward_of(cuda, q)
    assert extension.take()[1] == []
    *_, again, _, _ = forward(extension, q)
    assert again.counters == launched.counters and not workspace.clean()


def test_operands_that_the_kernels_cannot_read_are_refused_before_a_launch(extension) -> None:
    """The back-end copies such an x. The extension itself refuses it."""
    q = problem(300, 264, 136, 16, dtype=BF16)
    operands = launch.operands(BY_RULE, 300, q.x, Base(q.w), q.adapter)
    call = extension.Sm90Forward(**{**operands, "x": q.x.data_ptr() + 2})
    with pytest.raises(RuntimeError, match="cannot plan the sm_90a launch: cudaErrorInvalidValue"):
        call.workspace()
    assert extension.take() == ([], [])
