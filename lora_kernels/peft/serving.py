"""Which back-ends serve the layers of a model on a GPU, in one line for the report of `fuse`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.backends import dispatch
from lora_kernels.backends.proven import COMMAND
from lora_kernels.core.operands import Call
from lora_kernels.evidence import find
from lora_kernels.peft.reading import ROWS, PeftAdapter
from lora_kernels.quant.weight import QuantizedWeight


def call_of_layer(w: Tensor | QuantizedWeight, adapter: PeftAdapter) -> Call | None:
    """Return the forward of a layer of PEFT, for `ROWS` rows in the dtype of its base. None where the choice of a
    back-end needs no evidence, as on a CPU."""
    a = adapter.a
    if a.device.type not in dispatch.BY_EVIDENCE:
        return None
    w_format = w.format if isinstance(w, QuantizedWeight) else "dense"
    adapter_dtype = a.dtype if a.dtype == torch.float32 else w.dtype
    (N, K), R = w.shape, a.shape[0]
    return Call("forward", a.device, w.dtype, adapter_dtype, ROWS, N, K, R, adapter.p > 0, w_format)


def line(calls: Sequence[Call], backend: str | None) -> str:
    """Return what serves the calls, and on what evidence; empty for none. The check of `composite` at its first use may
    run here, and no other kernel."""
    if not calls:
        return ""
    device = calls[0].device
    where = f"on {device}, for {ROWS} rows: "
    if backend is not None:
        return f"{where}{backend}, which was asked for by name"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line says what the warnings would
        answers = [dispatch.explain(call, None) for call in calls]
    passes = {"forward": [each.forward for each in answers], "backward": [each.backward for each in answers]}
    told = [f"{op} {_counted(names)}" for op, names in passes.items()]
    evidence = Counter(text for each in answers for text in each.evidence.values()).most_common(1)
    why = f" ({evidence[0][0]})" if evidence else ""
    unmeasured = not find.off() and not find.of(device).timings
    return where + ", ".join(told) + why + (f". `{COMMAND}` finds the fastest" if unmeasured else "")


def _counted(names: list[str]) -> str:
    counts = Counter(names).most_common()
    return counts[0][0] if len(counts) == 1 else " and ".join(f"{name} ({count} layers)" for name, count in counts)
