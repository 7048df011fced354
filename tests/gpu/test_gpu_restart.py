"""A restart on a GPU writes the exact sum into W, also where products of fp32 are allowed to be made in TF32.

``--device cpu`` runs the same tests on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lora_kernels import FusedLoRALinear
from lora_kernels.train import restart

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_becomes_the_exact_sum_rounded_once(
    device: torch.device, precision: str, dtype: torch.dtype
) -> None:
    layer = FusedLoRALinear(1024, 520, r=64, device=device, dtype=dtype)
    nn.init.normal_(layer.lora_B, std=0.1)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B])
    layer(torch.randn(8, 1024, device=device, dtype=dtype)).float().square().mean().backward()
    optimizer.step()
    change = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    want, address = layer.weight.double() + change, layer.weight.data_ptr()
    report = restart(layer, optimizer, prune=0.9)
    assert layer.weight.data_ptr() == address
    info = torch.finfo(dtype)  # fp16 has no finer steps below its smallest normal number
    bound = 0.51 * info.eps * want.abs().clamp(min=info.tiny) + 1e-6 * change.abs().max()
    assert (layer.weight.double() - want).abs().le(bound).all()
    assert report.moments == 2 * (layer.lora_A.numel() + layer.lora_B.numel())
    assert report.zeros >= 0.89 * report.moments and not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= 1 / 1024**0.5
