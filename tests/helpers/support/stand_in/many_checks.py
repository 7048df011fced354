"""What must hold of the launches of many adapters, on the stand-in driver: what `checks` has for one layer."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.stand_in.checks import BF16, FP32, checked, kernels
from support.stand_in.driver import Driver, Recorded, start, use

from lora_kernels.backends import composite
from lora_kernels.backends.composite import adapter_table
from lora_kernels.core.dropout import rescale, threshold
from lora_kernels.core.many import AdapterStack
from lora_kernels.core.operands import Adapter, Base, Needs
from lora_kernels.core.rows import Rows


class Many:
    """The operands of one layer with n adapters, the second of which has nothing in the layer."""

    def __init__(self, M: int, n: int, dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16), p: float = 0.1) -> None:
        N, K, (dtype, adapters) = 136, 264, dtypes
        self.x, self.dy = torch.zeros(M, K, dtype=dtype), torch.zeros(M, N, dtype=dtype)
        self.base = Base(torch.zeros(N, K, dtype=dtype), torch.zeros(N, dtype=dtype))
        self.adapters: list[Adapter | None] = []
        for i in range(n):
            R = (13, 16, 40)[i % 3]
            a, b = torch.zeros(R, K, dtype=adapters), torch.zeros(N, R, dtype=adapters)
            rate = 0.0 if i % 2 else p
            self.adapters.append(Adapter(a, b, 0.5 - i, rate, torch.tensor(i) if rate else None))
        self.adapters[1] = None
        self.rows = Rows.by_id(torch.arange(M) % n, n)

    def forward(self, stack: AdapterStack | None = None) -> Any:
        return composite.forward_multi(self.x, self.base, stack or self.adapters, self.rows, stack is None)

    def backward(self) -> Any:
        h = torch.zeros(self.x.shape[0] * 40, dtype=self.adapters[0].a.dtype)
        every = (True,) * len(self.adapters)
        return composite.backward_multi(
            self.dy, self.x, self.base, self.adapters, self.rows, h, Needs(True, every, every)
        )


PASSES_OF_MANY = {
    "forward": ["down_multi", "up_multi"],
    "backward": ["down_multi", "up_multi", *["across_multi", "add_parts_multi"] * 2],
}


def _table(launches: list[Recorded], n: int) -> list[tuple[int, ...]]:
    """Return the numbers that the launches of `fill` write, for each adapter."""
    numbers: list[int] = []
    for launch in launches:
        _, *codes, _, _ = launch.parameters  # the table's address, and two that are Triton's
        for code in codes:
            value = int.from_bytes(code, "little") - (1 << 60)
            assert len(code) == 8 and value % 2 == 1
            numbers.append(value >> 1)
    fields = adapter_table.FIELDS
    return [tuple(numbers[i * fields : (i + 1) * fields]) for i in range(n)]


def _arrive(driver: Driver, cases: Sequence[tuple[int, tuple[torch.dtype, torch.dtype]]]) -> None:
    """Every launch gets its arguments, and the table the addresses, ranks, strides and factors of every adapter."""
    for n, dtypes in cases:
        q = Many(70, n, dtypes)
        for op, names in PASSES_OF_MANY.items():
            for _ in range(2):
                driver.clear()
                with checked(driver) as launches:
                    results = getattr(q, op)()
                assert [launch.kernel for launch in launches] == names
                filled = [launch for launch in driver.launches() if launch.kernel == "fill"]
                assert len(filled) == -(-n // adapter_table.AT_ONCE)
                for i, row in enumerate(_table(filled, n)):
                    adapter = q.adapters[i]
                    if adapter is None:
                        assert row == (0,) * len(row)
                        continue
                    a, b, scale, p, seed = adapter
                    # An adapter without dropout has the seed of another.
                    seed = (
                        seed if p else next((each.seed for each in q.adapters if each and each.seed is not None), None)
                    )
                    gradients = [each[i].data_ptr() for each in results[1:]] if op == "backward" else [0, 0]
                    address = 0 if seed is None else seed.data_ptr()
                    assert row[:5] == (a.data_ptr(), b.data_ptr(), address, *gradients)
                    assert row[5:10] == (a.shape[0], *a.stride(), *b.stride())
                    assert row[10] == threshold(p)
                    assert row[11:] == tuple(struct.unpack("II", struct.pack("ff", scale, rescale(p))))


def many_adapters_arrive(driver: Driver) -> None:
    _arrive(driver, [(11, (BF16, BF16))])


def many_adapters_of_other_dtypes_arrive(driver: Driver) -> None:
    _arrive(driver, [(3, (BF16, FP32)), (2, (FP32, FP32))])


def a_stack_writes_its_table_once(driver: Driver) -> None:
    q = Many(70, 3, p=0.0)
    stack = AdapterStack(q.adapters)
    for launched in (["fill", *PASSES_OF_MANY["forward"]], PASSES_OF_MANY["forward"]):
        driver.clear()
        with checked(driver):
            q.forward(stack)
        assert kernels(driver) == launched
    stack.replace({1: stack[0]})
    driver.clear()
    q.forward(stack)
    assert kernels(driver)[0] == "fill"


def another_division_among_adapters_needs_no_other_kernel(driver: Driver) -> None:
    """Neither do other numbers of rows and adapters, up to 16, and other ranks."""
    loaded = set()
    for M, n in ((100, 16), (128, 2), (33, 3), (512, 8), (777, 16), (1, 2), (16, 12)):
        q = Many(M, n)
        q.forward()
        q.backward()
        loaded.add(driver.modules)
    assert len(loaded) == 1, f"{max(loaded) - min(loaded)} kernels more are compiled"


CHECKS: dict[str, Callable[[Driver], None]] = {
    check.__name__: check
    for check in (
        many_adapters_arrive,
        many_adapters_of_other_dtypes_arrive,
        a_stack_writes_its_table_once,
        another_division_among_adapters_needs_no_other_kernel,
    )
}


def run(name: str) -> None:
    """Run a check, by its name in CHECKS."""
    driver = start()
    use("sm_90")
    driver.clear()
    CHECKS[name](driver)
