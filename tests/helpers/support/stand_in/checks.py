"""What must hold of the launches of the Triton back-ends, on the stand-in driver. `run` runs one of them by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.stand_in import arguments
from support.stand_in.driver import Driver, Recorded, start, use
from torch import Tensor
from triton import knobs
from triton.runtime import driver as active

from lora_kernels.backends import composite, workspace
from lora_kernels.backends import triton as one_launch
from lora_kernels.backends.triton.device import Frame
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.quant import quantize_weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = Needs(True, (True,), (True,))


class Problem:
    """The operands of one layer."""

    def __init__(
        self, M: int, N: int, K: int, R: int, p: float = 0.0, dtype: torch.dtype = BF16,
        adapters: torch.dtype | None = None, bias: bool = True, w_format: str | None = None, view: int = 0,
    ) -> None:  # fmt: skip
        """`view` moves x and dy by so many elements, so that they are not aligned."""
        adapters = adapters or dtype
        self.x = torch.zeros(M, K + view, dtype=dtype)[:, view:]
        self.dy = torch.zeros(M, N + view, dtype=dtype)[:, view:]
        w: Any = torch.zeros(N, K, dtype=dtype)
        if w_format:
            w = quantize_weight(torch.randn(N, K).to(dtype), w_format.removesuffix("+"), double_quant="+" in w_format)
        self.base = Base(w, torch.zeros(N, dtype=dtype) if bias else None)
        a, b = torch.zeros(R, K, dtype=adapters), torch.zeros(N, R, dtype=adapters)
        self.adapter = Adapter(a, b, 0.5, p, torch.tensor(5) if p else None)
        self.h = torch.zeros(M, R, dtype=adapters)

    def forward(self, backend: Any = one_launch) -> Tensor:
        return backend.forward(self.x, [self.base], [self.adapter], [True])[0][0]

    def backward(self, backend: Any = one_launch) -> Any:
        return backend.backward([self.dy], self.x, [self.base], [self.adapter], [self.h], ALL)


def kernels(driver: Driver) -> list[str]:
    return [launch.kernel for launch in driver.launches()]


@contextlib.contextmanager
def checked(driver: Driver) -> Iterator[list[Recorded]]:
    """Check every launch in the block: its grid, and that every argument arrives. Yield what was launched."""
    seen: list[Recorded] = []
    run = Frame.run

    def check(frame: Frame, **others: Any) -> None:
        before = driver.count
        run(frame, **others)
        launches = driver.launches()[before:]
        assert len(launches) == (1 if frame.programs else 0), frame.kernel
        for launch in launches:
            assert launch.grid == (frame.programs, 1, 1)
            assert launch.threads == 32 * frame.options["num_warps"]
            compiled = next(
                each for each in frame.kernel.device_caches[0][0].values() if each.function == launch.handle
            )
            assert launch.shared == compiled.metadata.shared
            arguments.check(driver, launch, compiled, frame.arguments | others)
            seen.append(launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Frame, "run", check)
        yield seen


def both_ways(driver: Driver, problem: Problem, backend: Any, expected: dict[str, list[str]]) -> None:
    """Check a forward and a backward, twice: Triton launches the first ones, and we the second ones. Nothing is
    compiled or loaded for the second."""
    driver.clear()
    for direction, names in expected.items():
        with checked(driver) as first:
            getattr(problem, direction)(backend)
        modules = driver.modules
        with checked(driver) as second:
            getattr(problem, direction)(backend)
        assert driver.modules == modules
        assert (got := [launch.kernel for launch in first]) == names, got
        assert [launch[:5] for launch in first] == [launch[:5] for launch in second]


COMPOSITE = {"forward": ["down", "up"], "backward": ["pass_over_dy", "add_parts", "pass_over_x", "add_parts"]}
REDUNDANT = {"forward": ["forward_redundant"], "backward": ["backward"]}
TICKETS = {"forward": ["forward_tickets"], "backward": ["backward"]}
WIDE = {"forward": ["down", "up"], "backward": ["pass_over_dy", "down", *COMPOSITE["backward"][1:]]}
FIRST = {name: ["dequantise", *kernels] for name, kernels in TICKETS.items()}

ARGUMENTS: dict[str, tuple[Any, dict[str, list[str]], dict[str, Any]]] = {
    "composite": (composite, COMPOSITE, {"M": 130, "N": 136, "K": 264, "R": 13, "p": 0.1}),
    "redundant": (one_launch, REDUNDANT, {"M": 16, "N": 512, "K": 512, "R": 16}),
    "tickets, descriptors": (one_launch, TICKETS, {"M": 2048, "N": 512, "K": 384, "R": 16, "p": 0.1}),
}
"""(back-end, the kernels launched, the problem) of the checks of all arguments."""
MORE_ARGUMENTS: dict[str, tuple[Any, dict[str, list[str]], dict[str, Any]]] = {
    "composite, all sizes 1": (composite, COMPOSITE, {"M": 3, "N": 1, "K": 1, "R": 1}),
    "composite, fp32 adapters": (composite, WIDE, {"M": 20, "N": 24, "K": 40, "R": 16, "adapters": FP32}),
    "composite, rank 40": (composite, WIDE, {"M": 130, "N": 136, "K": 264, "R": 40}),
    "composite, unaligned": (composite, COMPOSITE, {"M": 20, "N": 24, "K": 40, "R": 13, "view": 1, "bias": False}),
    "all sizes 1": (one_launch, TICKETS, {"M": 200, "N": 1, "K": 1, "R": 1}),
    "one row of one": (one_launch, REDUNDANT, {"M": 1, "N": 17, "K": 1, "R": 3}),
    "unaligned": (one_launch, TICKETS, {"M": 130, "N": 136, "K": 264, "R": 40, "view": 1, "bias": False}),
    "fp32": (one_launch, TICKETS, {"M": 512, "N": 512, "K": 512, "R": 16, "p": 0.1, "dtype": FP32}),
    "fp32 adapters": (one_launch, TICKETS, {"M": 2048, "N": 512, "K": 512, "R": 16, "adapters": FP32}),
    "rank 256": (one_launch, TICKETS, {"M": 1024, "N": 1024, "K": 1024, "R": 256, "dtype": FP16}),
    "nf4 within": (one_launch, REDUNDANT, {"M": 4, "N": 512, "K": 512, "R": 16, "w_format": "nf4"}),
    "nested nf4 within": (one_launch, REDUNDANT, {"M": 4, "N": 512, "K": 512, "R": 16, "w_format": "nf4+"}),
    "int8 within": (one_launch, REDUNDANT, {"M": 4, "N": 512, "K": 512, "R": 16, "w_format": "int8"}),
    "fp8 within": (one_launch, REDUNDANT, {"M": 4, "N": 512, "K": 512, "R": 16, "w_format": "fp8"}),
    "nf4 first": (one_launch, FIRST, {"M": 2048, "N": 512, "K": 512, "R": 16, "p": 0.1, "w_format": "nf4"}),
}


def arguments_arrive(driver: Driver, name: str) -> None:
    backend, expected, sizes = (ARGUMENTS | MORE_ARGUMENTS)[name]
    both_ways(driver, Problem(**sizes), backend, expected)


def descriptors_describe_the_operands(driver: Driver) -> None:
    q = Problem(2048, 512, 384, 16)
    y = q.forward()
    driver.clear()
    q.forward()
    (launch,) = driver.launches()
    maps = [driver.map_of(parameter) for parameter in launch.parameters if parameter[:7] == b"tensor="]
    described = [(m.address, m.shape, m.strides) for m in maps]
    w = q.base.w
    assert described == [(q.x.data_ptr(), (2048, 384), (768,)), (w.data_ptr(), (512, 384), (768,))]
    assert all(rows <= 256 and columns * 2 <= 128 for rows, columns in (m.box for m in maps))
    assert y.shape == (2048, 512)


def nothing_is_launched_for_empty_problems(driver: Driver) -> None:
    for backend in (composite, one_launch):
        q = Problem(0, 16, 16, 8)
        driver.clear()
        assert q.forward(backend).shape == (0, 16)
        assert driver.count == 0, backend.name


def _small(**options: Any) -> Problem:
    return Problem(8, 16, 16, 8, **options)


def other_kernels_are_not_mistaken_for_the_kept_one(driver: Driver) -> None:
    """Another dtype, alignment or presence of an operand takes a kernel of its own, in any order of calls."""
    problems = [_small(), _small(dtype=FP16), _small(view=1), _small(view=8), _small(bias=False), _small(p=0.1)]
    odd = _small()
    odd.base = odd.base._replace(bias=torch.zeros(17, dtype=BF16)[1:])  # the layout of the first, other alignment
    problems.append(odd)
    for _ in range(2):
        for q in problems:
            for backend, expected in ((composite, 2), (one_launch, 1)):
                with checked(driver) as launches:
                    q.forward(backend)
                assert len(launches) == expected
    handles = {}
    for name, q in (("aligned", problems[0]), ("odd", odd)):
        driver.clear()
        q.forward(composite)
        handles[name] = driver.launches()[1].handle
    assert handles["aligned"] != handles["odd"]


def another_number_of_rows_needs_no_other_kernel(driver: Driver) -> None:
    """A step of training with a new length compiles nothing. M is 1 or a multiple of 16 in some, and so are the numbers
    of blocks and parts that follow from it."""
    for backend in (composite, one_launch):
        loaded = set()
        for M in (100, 128, 200, 333, 512, 777, 1000, 1024, 2048, 3000, 4096, 8192):
            problem = Problem(M, 64, 64, 16, p=0.1)
            problem.forward(backend)
            problem.backward(backend)
            loaded.add(driver.modules)
        assert len(loaded) == 1, f"{backend.name} has compiled {max(loaded) - min(loaded)} kernels more"


def hooks_and_settings_of_triton_are_heard(driver: Driver) -> None:
    q = _small()
    for _ in range(2):
        q.forward(composite)
    heard: list[str] = []

    def enter(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        with checked(driver):
            q.forward(composite)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    assert heard == ["down", "up"]

    from lora_kernels.backends.composite.kernels import forward

    def before(*args: Any, **kwargs: Any) -> None:
        heard.append("before")

    forward.up.add_pre_run_hook(before)
    try:
        q.forward(composite)
    finally:
        forward.up.pre_run_hooks.clear()
    assert heard == ["down", "up", "before"]

    driver.clear()
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        q.forward(composite)
    debug = driver.launches()
    driver.clear()
    q.forward(composite)
    assert [a.handle == b.handle for a, b in zip(debug, driver.launches(), strict=True)] == [False, False]


def lists_and_masks_arrive(driver: Driver) -> None:
    qs = [_small(p=0.1), _small(bias=False), Problem(8, 24, 16, 5)]
    bases, adapters = [q.base for q in qs], [q.adapter for q in qs]
    for _ in range(2):
        with checked(driver) as launches:
            composite.forward(qs[0].x, bases, adapters, [True, False, True])
            composite.backward(
                [q.dy for q in qs], qs[0].x, bases, adapters, [q.h for q in qs], Needs(True, (True,) * 3, (True,) * 3)
            )
        assert [launch.kernel for launch in launches] == [*COMPOSITE["forward"], *COMPOSITE["backward"]]
        for backend in (composite, one_launch):
            with checked(driver) as launches:
                backend.keep_mask(qs[0].x, 0.3, torch.tensor(5))
            assert [launch.kernel for launch in launches] == ["dropout_mask"]


def every_device_has_its_own_kernel_and_stream(driver: Driver) -> None:
    q, seed = _small(), torch.tensor(5)
    handles = []
    for number in (0, 1, 0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(active.active, "get_current_device", lambda number=number: number)
            patch.setattr(active.active, "get_current_stream", lambda device: 0x1000 + device)
            driver.clear()
            composite.keep_mask(q.x, 0.3, seed)
        (launch,) = driver.launches()
        assert launch.stream == 0x1000 + number
        handles.append(launch.handle)
    assert handles[:2] == handles[2:]
    assert handles[0] != handles[1]


def a_failed_launch_raises_and_the_next_one_works(driver: Driver) -> None:
    q = Problem(2048, 512, 384, 16)
    for calls in range(2):
        for backend in (composite, one_launch):
            driver.fail_next_launch(719)
            with pytest.raises(RuntimeError, match="stand-in"):
                q.forward(backend)
            assert not workspace.clean()
            with checked(driver) as launches:
                q.forward(backend)
            assert launches, calls


CHECKS: dict[str, Callable[[Driver], None]] = {
    check.__name__: check
    for check in (
        descriptors_describe_the_operands,
        nothing_is_launched_for_empty_problems,
        other_kernels_are_not_mistaken_for_the_kept_one,
        another_number_of_rows_needs_no_other_kernel,
        hooks_and_settings_of_triton_are_heard,
        lists_and_masks_arrive,
        every_device_has_its_own_kernel_and_stream,
        a_failed_launch_raises_and_the_next_one_works,
    )
}


def run(name: str) -> None:
    """Run a check, by its name in CHECKS, ARGUMENTS or MORE_ARGUMENTS."""
    driver = start()
    use("sm_90")
    driver.clear()
    if name in CHECKS:
        CHECKS[name](driver)
    else:
        arguments_arrive(driver, name)
