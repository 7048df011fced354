"""The kinds of fused layer, as keywords of `FusedLoRALinear.from_linear`, for tests that hold for each of them."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dora": {"use_dora": True},
    "nf4": {"quant": "nf4"},
    "double": {"quant": "nf4", "double_quant": True},
    "int8": {"quant": "int8"},
    "fp8": {"quant": "fp8"},
}
