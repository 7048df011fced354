"""The Triton back-end's results in the interpreter: the launches of a GPU on CPU tensors. The tiles are so small that
every result has several."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import judging

from lora_kernels.core.dropout import dropout, keep_mask, rescale
from lora_kernels.testing import one_layer

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support.interp import interpret
from support.launches import changed

from lora_kernels.backends import triton, workspace
from lora_kernels.backends.triton import device
from lora_kernels.backends.triton import launch as launching
from lora_kernels.core.operands import Adapter, Base, Call
from lora_kernels.plans import choose, tiles

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
_REDUNDANT = tiles.Tile(
    max_rank=64, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, BLOCK_R=64, GROUP_M=2, num_warps=4, num_stages=2
)
_TICKETS = tiles.Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, GROUP_M=2, num_warps=4, num_stages=2)
_BACKWARD = tiles.Tile(
    BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=32, BLOCK_C=32, BLOCK_T=16, GROUP_M=2, num_warps=4, num_stages=2
)
TABLES = {
    "redundant": {"decode16": _REDUNDANT, "decode64": _REDUNDANT, "tickets": _TICKETS, "backward": _BACKWARD},
    "tickets": {"tickets": _TICKETS, "backward": _BACKWARD},
}
PLANS = list(TABLES)


def target(programs: int = 3, capturing: bool = False) -> device.Target:
    return device.Target(tiles.Gpu("interpreter", programs), contextlib.nullcontext, lambda: 0, lambda: capturing)


@contextlib.contextmanager
def interpreted(plan: str, on: device.Target | None = None, tma: bool = False) -> Iterator[ModuleType]:
    """Yield the back-end, which serves CPU tensors by one of the two plans; up to 64 rows by the redundant one. Fail
    where a launch has left counters in the workspace."""
    table = {kind: dataclasses.replace(tile, tma=tma) for kind, tile in TABLES[plan].items()}
    with pytest.MonkeyPatch.context() as patch, interpret():
        patch.setitem(device.TARGETS, CPU, on or target())
        for itemsize in (2, 4):
            patch.setitem(tiles.TABLES, ("interpreter", itemsize), table)
        patch.setattr(workspace, "_blocks", {})
        patch.setattr(workspace, "_by_stream", {})
        choose.plan.cache_clear()
        yield triton
        assert not workspace.clean(), "a launch left flags or tickets"


def results(q: judging.Problem, plan: str, **kwargs) -> dict[str, torch.Tensor]:
    with interpreted(plan, **kwargs) as backend:
        return judging.backend_results(backend, q)


SHAPES = [*judging.SHAPES[:-1], (97, 95, 93, 16)]
"""The last shape is just large enough for statistics, with dropout too: the interpreter is slow."""
VARIETY = list(itertools.product(judging.DTYPES, [0.0, 0.3]))
"""(dtypes, p). Each shape is tested with some of them. Over all shapes, every one occurs."""


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("number, shape", list(enumerate(SHAPES)))
def test_results_are_right_for_every_shape(
    number: int, shape: tuple[int, int, int, int], plan: str, poison: None
) -> None:
    (dtype, adapter_dtype), p = VARIETY[(3 * number + PLANS.index(plan)) % len(VARIETY)]
    q = judging.problem(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, p=p, bias=number % 3 > 0, strided=number % 2 == 0
    )
    judging.check(results(q, plan), q)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", judging.DTYPES, ids=str)
def test_results_are_right_for_every_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], p: float, plan: str, poison: None
) -> None:
    q = judging.problem(17, 20, 33, 5, dtype=dtypes[0], adapter_dtype=dtypes[1], p=p, strided=True)
    judging.check(results(q, plan), q)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 256])
def test_results_are_right_for_every_rank(rank: int, poison: None) -> None:
    q = judging.problem(18, 20, 24, rank, dtype=torch.bfloat16, p=0.1)
    judging.check(results(q, "tickets"), q)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    M=st.integers(0, 40), N=st.integers(1, 70), K=st.integers(1, 70), R=st.integers(1, 40),
    plan=st.sampled_from(PLANS), p=st.sampled_from([0.0, 0.5]), strided=st.booleans(), programs=st.integers(1, 9),
)  # fmt: skip
def test_results_are_right_for_random_shapes(
    M: int, N: int, K: int, R: int, plan: str, p: float, strided: bool, programs: int
) -> None:
    q = judging.problem(M, N, K, R, dtype=torch.float16, p=p, strided=strided)
    judging.check(results(q, plan, on=target(programs)), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_right_through_descriptors(dtype: torch.dtype, poison: None) -> None:
    """No dimension is a multiple of its tile; rows are multiples of 16 bytes."""
    q = judging.problem(21, 40, 56, 8, dtype=dtype, p=0.3)
    judging.check(results(q, "tickets", tma=True), q)


def test_unaligned_operands_are_not_described(poison: None) -> None:
    q = judging.problem(21, 39, 55, 8, dtype=torch.bfloat16)
    assert not launching.describable(q.x, q.w)
    assert not launching.describable(q.x[:0, :16])
    with interpreted("tickets", tma=False) as backend:
        judging.check(judging.backend_results(backend, q), q)


@pytest.mark.parametrize("plan", PLANS)
def test_the_number_of_programs_does_not_change_a_bit(plan: str) -> None:
    """Every sum has several parts, claimed by one program, by several, and by more than there is work for."""
    M, N, K, R = 40, 20, 40, 5
    q = judging.problem(M, N, K, R, dtype=torch.bfloat16, p=0.3)
    forward, backward = _REDUNDANT if plan == "redundant" else _TICKETS, _BACKWARD
    base, adapter = Base(q.w, q.bias), Adapter(q.a, q.b, q.scale, q.p, q.seed)
    runs, on = [], target()
    for programs in (1, 4, 40):
        y, h = torch.full((M, N), torch.nan).bfloat16(), torch.full((M, R), torch.nan).bfloat16()
        dx, da, db, g = (torch.full_like(t, torch.nan) for t in (q.x, q.a, q.b, h))
        with interpret():
            forward_plan = tiles.Plan(plan == "redundant", forward, 4)
            launch = launching.forward_launch(on, forward_plan, q.x, base, adapter, launching.Outputs(y, h, True))
            changed(launch, launch.programs if plan == "redundant" else programs).run()
            saved, gradients = launching.Saved(q.x, h), launching.GradientBuffers(dx, da, db, g)
            backward_plan = tiles.Plan(False, backward, 4)
            launch = launching.backward_launch(on, backward_plan, q.dy, saved, base, adapter, gradients)
            changed(launch, programs).run()
        runs.append({"y": y, "dx": dx, "da": da, "db": db})
    judging.check(runs[0], q)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


def test_only_what_is_needed_is_computed(poison: None) -> None:
    q = judging.problem(20, 17, 40, 3, dtype=torch.bfloat16, p=0.3)
    full = results(q, "tickets")
    for need_dx, need_da, need_db in itertools.product([False, True], repeat=3):
        with interpreted("tickets") as backend:
            _, h = one_layer.forward(backend, q.x, q.w, q.a, q.b, None, q.scale, q.p, q.seed, need_db)
            assert (h is not None) == need_db
            x = q.x if need_da else None
            got = one_layer.backward(
                backend, q.dy, x, q.w, q.a, q.b, h, q.scale, q.p, q.seed, need_dx, need_da, need_db
            )
        for name, value, need in zip(("dx", "da", "db"), got, (need_dx, need_da, need_db), strict=True):
            assert torch.equal(value, full[name]) if need else value is None


@pytest.mark.parametrize("plan", PLANS)
def test_received_tensors_are_not_written_to(plan: str) -> None:
    q = judging.problem(20, 33, 40, 3, p=0.3)
    before = {name: getattr(q, name).clone() for name in ("x", "w", "a", "b", "bias", "dy", "seed")}
    results(q, plan)
    assert all(torch.equal(getattr(q, name), value) for name, value in before.items())


@pytest.mark.parametrize("plan", PLANS)
def test_saved_h_is_unscaled(plan: str) -> None:
    q = judging.problem(20, 50, 40, 3, dtype=torch.bfloat16, p=0.3, scale=64.0)
    with interpreted(plan) as backend:
        _, h = one_layer.forward(backend, q.x, q.w, q.a, q.b, q.bias, q.scale, q.p, q.seed, True)
    exact = dropout(q.x.double(), q.p, q.seed) @ q.a.double().t()
    assert h.dtype == torch.bfloat16 and h.is_contiguous()
    torch.testing.assert_close(h.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-3, 2.0**-101, 200.0])
def test_results_are_right_for_every_scale(scale: float, plan: str) -> None:
    q = judging.problem(17, 20, 40, 4, dtype=torch.float16, scale=scale)
    got = results(q, plan)
    judging.check(got, q)
    if scale == 0:
        assert not any(got[name].any() for name in ("da", "db"))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_the_masks_of_h_dx_and_da_are_the_rule_bit_for_bit(seed: int, plan: str) -> None:
    """With these operands h, dx and da are each the mask times c."""
    M, K, p = 21, 43, 0.4
    keep = keep_mask(torch.tensor(seed), M, K, p)
    one = torch.ones((), dtype=torch.float32)
    with interpreted(plan) as backend:
        # h = c · keep ⊙ 1 · I
        _, h = one_layer.forward(
            backend,
            one.expand(M, K),
            torch.zeros(5, K),
            torch.eye(K),
            torch.zeros(5, K),
            None,
            1.0,
            p,
            torch.tensor(seed),
            True,
        )
        # dx = 0 + c · keep ⊙ (1 · 1)
        dx, _, _ = one_layer.backward(backend,
            one.expand(M, 1), None, torch.zeros(1, K), one.expand(1, K), one.expand(1, 1), None,
            1.0, p, torch.tensor(seed), True, False, False,
        )  # fmt: skip
        # da = c · Iᵀ (keep ⊙ 1)
        _, da, _ = one_layer.backward(backend,
            torch.eye(M), one.expand(M, K), torch.zeros(M, K), torch.zeros(M, K), torch.eye(M), None,
            1.0, p, torch.tensor(seed), False, True, False,
        )  # fmt: skip
    for name, value in (("h", h), ("dx", dx), ("da", da)):
        assert torch.equal(value != 0, keep), f"{name}'s mask differs"
        assert torch.equal(value, keep * torch.tensor(rescale(p), dtype=torch.float32)), f"{name}'s factor differs"


def test_captured_launches_have_counters_of_their_own() -> None:
    q = judging.problem(20, 33, 40, 3)
    with interpreted("tickets", on=target(capturing=True)) as backend:
        judging.check(judging.backend_results(backend, q), q)
        assert not workspace._by_stream


def call(**changes: object) -> Call:
    return Call("forward", CPU, torch.bfloat16, torch.bfloat16, 8, 8, 8, 8, False)._replace(**changes)


def test_refusals_name_what_is_refused() -> None:
    (reason,) = triton.why_not(call())
    assert "GPU" in reason and "cpu" in reason
    with interpreted("tickets"):
        assert triton.why_not(call()) == []
        (reason,) = triton.why_not(call(dtype=torch.float64))
        assert "float64" in reason
    with interpreted("tickets", on=target()._replace(gpu=tiles.Gpu("sm_75", 3))):
        (reason,) = triton.why_not(call())
        assert "sm_75" in reason and "sm_80" in reason
    with interpreted("tickets", on=target()._replace(gpu=tiles.Gpu("gfx942", 3))):
        (reason,) = triton.why_not(call())
        assert "NVIDIA" in reason and "gfx942" in reason and "composite" in reason
    with interpreted("tickets", on=target()._replace(gpu=tiles.Gpu("sm_103", 3))):
        assert triton.why_not(call()) == []
        (reason,) = triton.why_not(call(dtype=torch.float32))
        assert "sm_103" in reason and "fp32" in reason


@pytest.mark.parametrize(
    "arch, served_by", [("sm_89", "sm_89"), ("sm_121", "sm_120"), ("sm_75", None), ("gfx90a", None)]
)
def test_an_architecture_is_served_by_its_own_or_its_familys_tables(arch: str, served_by: str | None) -> None:
    assert tiles.resolve(arch) == served_by
