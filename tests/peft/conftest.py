"""A check that goes along with every test of this folder."""

from __future__ import annotations

import functools

import pytest
from torch import Tensor


@pytest.fixture(autouse=True)
def _the_short_reading_equals_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `FusedLinear.plain_operands` gives for a layer, `read` and `as_one_adapter` give too."""
    pytest.importorskip("peft")
    from lora_kernels.peft.linear import FusedLinear
    from lora_kernels.peft.reading import OneAdapter, as_one_adapter

    short = FusedLinear.plain_operands

    @functools.wraps(short)
    def checked(layer: FusedLinear, x: Tensor) -> OneAdapter | None:
        operands = short(layer, x)
        if operands is not None:
            whole = layer.read(x)
            assert not isinstance(whole, str), f"the kernels were to serve a call that is PEFT's: {whole}"
            for one, other in zip(operands, as_one_adapter(whole), strict=True):
                assert one is other or (not isinstance(one, Tensor) and one == other)
        return operands

    monkeypatch.setattr(FusedLinear, "plain_operands", checked)
