"""The kernels of `composite` for experts, compiled for their architectures with no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lora_kernels.backends.composite", exc_type=ImportError)
from support.compile_report import compile_report, specialise
from support.composite_many_launches import launches

pytestmark = pytest.mark.slow

BF16, SINGLE = torch.bfloat16, torch.float32
DROPOUT = {"forward down": 0, "backward up": 3, "da parts": 4}
"""The launches that draw the mask: alone they differ from those of many adapters."""


@pytest.mark.parametrize(("arch", "adapter_dtype"), [("sm_80", BF16), ("sm_90", SINGLE)])
@pytest.mark.parametrize("name", DROPOUT)
def test_a_launch_fits_its_architecture(arch: str, adapter_dtype: torch.dtype, name: str) -> None:
    compile_report(launches(arch, BF16, adapter_dtype, segments=True)[DROPOUT[name]], arch).check(arch)


def test_neither_rows_nor_experts_compile_again() -> None:
    keys = []
    for M, n in ((8192, 16), (4097, 3), (1, 1)):
        found = launches("sm_80", BF16, BF16, M=M, n=n, segments=True)
        keys.append([repr(specialise(each.kernel, each.arguments)) for each in found])
    assert keys[0] == keys[1] == keys[2]
