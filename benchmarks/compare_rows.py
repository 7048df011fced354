"""The calls that `benchmarks.compare` times, and the process that times them with the package of one checkout.

    python benchmarks/compare_rows.py THREADS

It reads names of rows from its standard input, one a line, and answers each with the median seconds of one call. The
rows use public names only, so that any two versions that have these names can be compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels

Run = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = {"vit": (512, 768, 768, 8), "gpt2": (2048, 768, 3072, 16), "llama": (1024, 2048, 2048, 16)}
"""(M, K, N, R) of layers so large that the kernels take most of the time."""
BUDGET_S = 0.06
"""The seconds that a row is called for in one round. It is called at least once."""


def rows() -> dict[str, Callable[[], Run]]:
    """Return every row by name, as a function that makes the operands and returns the call to time."""
    table: dict[str, Callable[[], Run]] = {}
    for name, (M, K, N, R) in LAYERS.items():
        for dtype in DTYPES:
            for p in (0.0, 0.1):
                row = f"{name} {dtype} p={p:g}"
                table[f"{row} forward"] = lambda s=(M, K, N, R, dtype, p): fused_linear(*s, backward=False)
                table[f"{row} forward + backward"] = lambda s=(M, K, N, R, dtype, p): fused_linear(*s, backward=True)
    for dtype in DTYPES:
        table[f"FusedLoRALinear 128x128 {dtype} M=1 forward"] = lambda d=dtype: fused_linear(
            1, 128, 128, 8, d, 0.0, False
        )
        table[f"FusedLoRALinear 128x128 {dtype} M=8 forward + backward"] = lambda d=dtype: fused_linear(
            8, 128, 128, 8, d, 0.0, True
        )
        for which, M, backward in (("M=1 forward", 1, False), ("M=8 forward + backward", 8, True)):
            for p in (0.0, 0.1):
                table[f"PEFT fused 128x128 {dtype} p={p:g} {which}"] = lambda s=(M, dtype, p, backward): peft_layer(*s)
    for p in (0.0, 0.1):
        table[f"DoRA 128x128 fp32 p={p:g} M=8 forward + backward"] = lambda p=p: fused_linear(
            8, 128, 128, 8, "fp32", p, True, dora=True
        )
        table[f"DoRA 768x768 fp32 p={p:g} M=512 forward + backward"] = lambda p=p: fused_linear(
            512, 768, 768, 8, "fp32", p, True, dora=True
        )
    for dtype in DTYPES:
        table[f"nf4 2048x2048 {dtype} M=1 forward"] = lambda d=dtype: quantised(1, d, False)
        table[f"nf4 2048x2048 {dtype} M=256 forward + backward"] = lambda d=dtype: quantised(256, d, True)
    return table


def fused_linear(M: int, K: int, N: int, R: int, dtype: str, p: float, backward: bool, dora: bool = False) -> Run:
    """Return a function that computes one pass of a `FusedLoRALinear` in training mode, with adapters in fp32."""
    settings = {"r": R, "lora_dropout": p, "use_dora": dora, "adapter_dtype": torch.float32}
    layer = lora_kernels.FusedLoRALinear(K, N, **settings, dtype=DTYPES[dtype])
    nn.init.normal_(layer.lora_B, std=0.02)
    return step(layer, torch.randn(M, K, dtype=DTYPES[dtype]), backward)


def peft_layer(M: int, dtype: str, p: float, backward: bool) -> Run:
    """Return a function that computes one pass of PEFT's LoRA linear after `fuse`."""
    import peft  # heavy and optional: only the rows of PEFT need it

    base = nn.Sequential(nn.Linear(128, 128, dtype=DTYPES[dtype]))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_dropout=p, target_modules=["0"]))
    lora_kernels.fuse(model)
    layer = model.base_model.model[0]
    return step(layer.train(), torch.randn(M, 128, dtype=DTYPES[dtype]), backward)


def quantised(M: int, dtype: str, backward: bool) -> Run:
    """Return a function that computes one pass of a layer over a weight in nf4, with adapters in fp32."""
    linear = nn.Linear(2048, 2048, dtype=DTYPES[dtype])
    layer = lora_kernels.FusedLoRALinear.from_linear(linear, r=16, quant="nf4", adapter_dtype=torch.float32)
    return step(layer, torch.randn(M, 2048, dtype=DTYPES[dtype]), backward)


def step(layer: nn.Module, x: Tensor, backward: bool) -> Run:
    """Return a function that computes y without gradients, or with `backward` the gradients of x and of every trained
    parameter."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward
    x.requires_grad_()
    wanted = [x, *(t for t in layer.parameters() if t.requires_grad)]
    dy = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def main(threads: int) -> None:
    """Answer the names on the standard input. The operands of a row are kept until another row is asked for."""
    torch.set_num_threads(threads)
    table = rows()
    name, run = "", None
    for line in sys.stdin:
        if run is None or line.strip() != name:
            torch.manual_seed(0)
            name = line.strip()
            run = table[name]()
            for _ in range(5):
                run()
        seconds, end = [], time.perf_counter() + BUDGET_S
        while not seconds or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
