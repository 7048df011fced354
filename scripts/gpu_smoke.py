"""Call the kernels of one back-end a few times, and nothing else. compute-sanitizer can watch this process.

    python scripts/gpu_smoke.py BACKEND [DEVICE] [CASE ...]

Every line is printed before the wait that it announces, so the last line names what hangs. The exit status is 1 if a
result is wrong, and 2 if the back-end does not serve the device. Without CASE, the cases of `WATCHED` run.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Case(NamedTuple):
    """One forward and one backward. dtypes are names, because gpu_check.py reads this file without torch."""

    M: int
    N: int
    K: int
    R: int
    p: float = 0.0
    dtype: str = "bfloat16"
    adapter_dtype: str = "bfloat16"
    quant: str = ""
    """The format of w, for `triton` only. Empty for a dense w."""
    plan: tuple[int, int] = (0, 0)
    """(columns, cluster) of a `plans.sm90.Sm90Plan`, for `cuda` only. (0, 0) is `BY_RULE`."""

    def runs_on(self, backend: str) -> bool:
        """Return whether the back-end has kernels for this case."""
        if backend == "cuda":
            return not self.quant and self.dtype != "float32"
        return not any(self.plan) and (backend == "triton" or not self.quant)


CASES = {
    "decode-1": Case(1, 4096, 4096, 16),
    "decode-16": Case(16, 256, 512, 16),
    "decode-64": Case(64, 1024, 1024, 64),
    "small": Case(200, 264, 136, 16, 0.1),
    "odd-rank": Case(130, 136, 264, 40),
    "many-rows": Case(2048, 1024, 1024, 16),
    "dropout": Case(2048, 1024, 1024, 16, 0.1),
    "rank-64": Case(1024, 1024, 2048, 64, 0.1),
    "rank-256": Case(1024, 1024, 1024, 256),
    "fp16": Case(512, 512, 512, 16, 0.1, "float16", "float16"),
    "fp32-adapters": Case(512, 512, 512, 16, 0.1, "bfloat16", "float32"),
    "llama": Case(8192, 4096, 4096, 16, 0.05),
    "128-columns": Case(1024, 1024, 1024, 16, 0.1, plan=(128, 1)),
    "256-columns": Case(1024, 1024, 1024, 16, 0.1, plan=(256, 1)),
    "clusters": Case(1024, 1024, 1024, 16, 0.1, plan=(256, 2)),
    "fp32": Case(512, 512, 512, 16, 0.1, "float32", "float32"),
    "nf4-decode": Case(4, 1024, 1024, 16, quant="nf4"),
    "nf4-rows": Case(1024, 1024, 1024, 16, 0.1, quant="nf4"),
    "int8-decode": Case(4, 1024, 1024, 16, quant="int8"),
    "fp8-decode": Case(4, 1024, 1024, 16, quant="fp8"),
}
WATCHED = ("small", "odd-rank", "decode-16")


def main(backend: str, device: str = "cuda", *names: str) -> int:
    import torch

    from lora_kernels.backends import dispatch
    from lora_kernels.core.operands import Call
    from lora_kernels.quant.weight import quantize_weight
    from lora_kernels.testing import judge, one_layer

    on, status = torch.device(device), 0
    for name in names or WATCHED:
        case = CASES[name]
        said = " ".join(f"{key}={value}" for key, value in case._asdict().items() if value not in (0, "", (0, 0)))
        print(f"{backend} {name}: {said}", flush=True)
        dtype, adapter_dtype = getattr(torch, case.dtype), getattr(torch, case.adapter_dtype)
        sizes = case.M, case.N, case.K, case.R
        call = Call("forward", on, dtype, adapter_dtype, *sizes, case.p > 0, case.quant or "dense")
        reasons = [why for op in ("forward", "backward") for why in dispatch.refusals(backend, call._replace(op=op))]
        if reasons:
            print(f"{backend} {name}: not called: {'; '.join(dict.fromkeys(reasons))}", flush=True)
            status = 2
            continue
        module = importlib.import_module(f"lora_kernels.backends.{backend}")
        if any(case.plan):
            from lora_kernels.plans.sm90 import Sm90Plan

            plan = Sm90Plan(*case.plan)
            module._plan = lambda *_, plan=plan: plan
        q = judge.problem(*sizes, dtype=dtype, adapter_dtype=adapter_dtype, p=case.p, device=device)
        w = quantize_weight(q.w, case.quant) if case.quant else q.w
        judged, plain = judge.over_codes(q, w) if case.quant else (q, None)

        def done(what: str, start: float, name: str = name) -> None:
            print(f"{backend} {name}: {what} launched", flush=True)
            if on.type == "cuda":
                torch.cuda.synchronize()
            print(f"{backend} {name}: {what} done, {time.monotonic() - start:.2f} s", flush=True)

        start = time.monotonic()
        y, h = one_layer.forward(module, q.x, w, q.a, q.b, q.bias, q.scale, q.p, q.seed, True)
        done("forward", start)
        start = time.monotonic()
        dx, da, db = one_layer.backward(module, q.dy, q.x, w, q.a, q.b, h, q.scale, q.p, q.seed, True, True, True)
        done("backward", start)
        results = {"y": y, "dx": dx, "da": da, "db": db}
        wrong = [verdict.fault for verdict in judge.judge(results, judged, plain=plain) if verdict.fault]
        print(f"{backend} {name}: {'wrong: ' + '; '.join(wrong) if wrong else 'right'}", flush=True)
        status = max(status, int(bool(wrong)))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
