"""From tensors to launches of the extension `lora_kernels._cuda`: copies where a layout cannot be read, the named
arguments, and the workspace."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends import workspace as memory
from lora_kernels.backends.current import current
from lora_kernels.core import dropout
from lora_kernels.core.operands import Adapter, Base
from lora_kernels.plans.sm90 import Sm90Plan

MULTIPLE = 8
"""TMA needs rows and base addresses at multiples of 16 bytes, which are 8 elements of 16 bits."""


class GradientBuffers(NamedTuple):
    """The contiguous tensors that a backward fills. None where a gradient is not needed."""

    dx: Tensor | None
    """[M, K]."""
    da: Tensor | None
    """[R, K]."""
    db: Tensor | None
    """[N, R]."""


def extension() -> ModuleType:
    """Return the module `lora_kernels._cuda`. Raises ImportError where it was not built."""
    return importlib.import_module("lora_kernels._cuda")


def driver_fault() -> str | None:
    """Return why the driver is too old for the extension, and the way out, or None. Needs a GPU of NVIDIA's.

    The extension has a CUDA runtime of its own, which runs on drivers for its major version of CUDA and on later ones
    ("minor version compatibility", https://docs.nvidia.com/deploy/cuda-compatibility).
    """
    info = extension().build_info()
    speaks: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    if speaks // 1000 >= int(info["nvcc"].partition(".")[0]):
        return None
    return (
        f"the extension was built by nvcc {info['nvcc']} and needs driver {info['driver']} or later, but the driver "
        f"here is for CUDA {speaks // 1000}.{speaks % 1000 // 10}: update it, or install from source with CUDA_HOME at "
        f"a toolkit of CUDA {speaks // 1000}"
    )


def launch_forward(plan: Sm90Plan, x: Tensor, base: Base, adapter: Adapter, y: Tensor, h: Tensor | None) -> None:
    """Launch the forward kernel, which fills contiguous y [M, N] and, unless it is None, h [M, R]. Needs M ≥ 1."""
    x, base, adapter = _addressable(x), _readable_base(base), _readable_adapter(adapter)
    with current(x.device):
        call = extension().Sm90Forward(**operands(plan, x.shape[0], x, base, adapter))
        call.results(bias=_address(base.bias), y=_address(y), h=_address(h))
        _run(call, x.device)


def launch_backward(
    plan: Sm90Plan, dy: Tensor, x: Tensor | None, base: Base, adapter: Adapter, h: Tensor | None, out: GradientBuffers
) -> None:
    """Launch the backward kernel, which fills every tensor of `out`. Needs M ≥ 1 and at least one such tensor.

    x is read only for da, and h only for db.
    """
    dy, base, adapter = _addressable(dy), _readable_base(base._replace(bias=None)), _readable_adapter(adapter)
    x = _addressable(x) if out.da is not None and x is not None else None
    h = h.contiguous() if out.db is not None and h is not None else None
    with current(dy.device):
        call = extension().Sm90Backward(**operands(plan, dy.shape[0], x, base, adapter))
        gradients = {name: _address(t) for name, t in out._asdict().items()}
        call.results(dy=_address(dy), lddy=_row_stride(dy), h=_address(h), **gradients)
        _run(call, dy.device)


def launch_keep_mask(mask: Tensor, p: float, seed: Tensor) -> None:
    """Launch the kernel that fills a contiguous mask [M, K], K a multiple of 8, with 1 where dropout keeps and 0
    elsewhere."""
    M, K = mask.shape
    with current(mask.device):
        extension().keep_mask(
            device=mask.device.index, M=M, K=K, bf16=mask.dtype == torch.bfloat16, seed=_address(seed),
            threshold=dropout.threshold(p), mask=_address(mask), stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def workspace(device: torch.device, counters: int, scratch: int) -> memory.Workspace:
    """Return the memory of a launch on the current stream of `device`: `counters` int32 zeros and `scratch` bytes."""
    stream = torch.cuda.current_stream().cuda_stream
    return memory.workspace(device, stream, torch.cuda.is_current_stream_capturing(), counters, -(-scratch // 4))


def operands(plan: Sm90Plan, M: int, x: Tensor | None, base: Base, adapter: Adapter) -> dict[str, Any]:
    """Return the arguments that both passes take, under the names that the extension gives them."""
    (w, _), (a, b, scale, p, seed) = base, adapter
    assert isinstance(w, Tensor), "dispatch asks why_not first"
    return {
        "device": w.device.index,
        "M": M,
        "N": w.shape[0],
        "K": w.shape[1],
        "R": a.shape[0],
        "bf16": w.dtype == torch.bfloat16,
        "x": _address(x),
        "w": _address(w),
        "a": _address(a),
        "b": _address(b),
        "ldx": 0 if x is None else _row_stride(x),
        "ldw": _row_stride(w),
        "lda": _row_stride(a),
        "ldb": _row_stride(b),
        "scale": scale,
        "seed": _address(seed),
        "threshold": dropout.threshold(p),
        "rescale": dropout.rescale(p),
        "stream": torch.cuda.current_stream().cuda_stream,
        **plan._asdict(),
    }


def _run(call: Any, device: torch.device) -> None:
    """Give a prepared call its workspace and launch it."""
    shared = workspace(device, *call.workspace())
    call.launch(_address(shared.counters), _address(shared.scratch))


def _readable_base(base: Base) -> Base:
    """Return the base with copies where the kernels cannot read w by TMA, or the bias two elements at a time."""
    w, bias = base
    assert isinstance(w, Tensor), "dispatch asks why_not first"
    if bias is not None and not (bias.is_contiguous() and bias.data_ptr() % 4 == 0):
        bias = bias.clone(memory_format=torch.contiguous_format)
    return Base(_addressable(w), bias)


def _readable_adapter(adapter: Adapter) -> Adapter:
    """Return the adapter with copies of a and b where neighbours in a row are not neighbours in memory."""
    return adapter._replace(a=_unit_stride(adapter.a), b=_unit_stride(adapter.b))


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _addressable(t: Tensor) -> Tensor:
    """Return x, w or dy, as a contiguous copy where a tensor map cannot describe it."""
    row_stride = _row_stride(t)
    aligned = row_stride % MULTIPLE == 0 and row_stride >= t.shape[1] and t.data_ptr() % 16 == 0
    return t if t.stride(1) == 1 and aligned else t.clone(memory_format=torch.contiguous_format)


def _row_stride(t: Tensor) -> int:
    """Return the row stride in elements. A single row may have any stride, so it counts as contiguous."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
