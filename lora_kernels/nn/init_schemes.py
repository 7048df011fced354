"""The names that ``init=`` takes, and the functions that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_kernels.nn.init import loftq, lq_lora, milora, olora, pissa
from lora_kernels.nn.init_values import FIRST_VALUES

_DENSE: dict[str, Callable[..., Any]] = {"pissa": pissa, "milora": milora, "olora": olora}
_QUANTISED: dict[str, Callable[..., Any]] = {"loftq": loftq, "lq_lora": lq_lora}
_FROM_DATA = {
    "lora_ga": "it needs its gradient, which lora_kernels.train.lora_ga(model, batches, ...) finds",
    "eva": "it needs the layer's inputs: let PEFT compute it, then load_adapter reads the file",
    "corda": "it needs the layer's inputs: let PEFT compute it, then call fuse(model)",
}
"""The schemes that a weight alone does not give, and the way to each."""


def split_named(init: str, quant: str | None) -> Callable[..., Any] | None:
    """Return the function that splits W as `init` says, or None where `init` leaves W as it is. Raises ValueError for
    an unknown name, and for a scheme of a dense base beside a `quant`, or the reverse."""
    ways = _DENSE if quant is None else _QUANTISED
    if init in FIRST_VALUES or init in ways:
        return ways.get(init)
    if init in _FROM_DATA:
        raise ValueError(f"init={init!r} cannot be made from a weight alone; {_FROM_DATA[init]}")
    if init not in {**_DENSE, **_QUANTISED}:
        names = ", ".join(map(repr, (*FIRST_VALUES, *_DENSE, *_QUANTISED)))
        raise ValueError(f"unknown init {init!r}: one of {names}")
    if quant is None:
        raise ValueError(f'init={init!r} splits W into a quantised base and an adapter: give quant="nf4", or another')
    raise ValueError(
        f"init={init!r} is for a dense base, and quant={quant!r}: take {' or '.join(map(repr, _QUANTISED))}"
    )
