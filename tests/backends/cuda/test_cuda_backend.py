"""The calls that the `cuda` back-end refuses, checked on a machine without a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch
from lora_kernels.core.operands import Adapter, Base, Call
from lora_kernels.plans.sm90 import BY_RULE

SERVED = Call("forward", torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 100, 64, 72, 12, True)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    info = {"nvcc": "13.0", "driver": "580"}
    monkeypatch.setattr(launch, "extension", lambda: SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)


@pytest.mark.usefixtures("hopper")
def test_a_hopper_call_is_served() -> None:
    assert cuda.why_not(SERVED) == []
    assert cuda.why_not(SERVED._replace(M=0, R=256)) == []


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "not on cpu"),
        ({"dtype": torch.float32, "adapter_dtype": torch.float32}, "not torch.float32"),
        ({"adapter_dtype": torch.float16}, "not torch.float16"),
        ({"adapter_dtype": torch.float32}, "not torch.float32 beside torch.bfloat16: it keeps h and g in 16 bits"),
        ({"N": 100}, "N must be a multiple of 8, got 100"),
        ({"K": 4}, "K must be a multiple of 8, got 4"),
        ({"R": 257}, "got 257"),
        ({"N": 2**28, "R": 8}, "got 2147483648"),
        ({"M": 2**31}, "got 2147483648"),
    ],
)
def test_every_refusal_says_why(change: dict, reason: str) -> None:
    reasons = cuda.why_not(SERVED._replace(**change))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_other_architectures_are_refused(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert cuda.why_not(SERVED) == ["serves Hopper (sm_90), not sm_100"]


@pytest.mark.parametrize(
    ("nvcc", "driver", "speaks", "said"),
    [
        ("13.0", "580", 12040, ("nvcc 13.0 and needs driver 580", "here is for CUDA 12.4", "a toolkit of CUDA 12")),
        ("12.9", "525", 11080, ("nvcc 12.9 and needs driver 525", "here is for CUDA 11.8")),
        ("13.1", "580", 13000, ()),
        ("12.9", "525", 12000, ()),
        ("12.4", "525", 13000, ()),
    ],
)
def test_a_driver_of_an_older_major_version_is_refused_with_the_way_out(
    nvcc: str, driver: str, speaks: int, said: tuple[str, ...], hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"nvcc": nvcc, "driver": driver}
    monkeypatch.setattr(launch, "extension", lambda: SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: speaks, raising=False)
    reasons = cuda.why_not(SERVED)
    assert len(reasons) == bool(said)
    assert all(part in reasons[0] for part in said)


def test_all_reasons_are_given_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing driver and a missing extension are reasons like any other, not exceptions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "lora_kernels._cuda", None)
    reasons = cuda.why_not(SERVED._replace(N=9, dtype=torch.float64, adapter_dtype=torch.float64))
    parts = ("driver", "_cuda is not there", "float64", "N must")
    assert len(reasons) == len(parts)
    assert all(any(part in reason for reason in reasons) for part in parts)


def test_a_launch_without_a_device_names_the_cuda_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch without a driver or a device raises RuntimeError with the name of the CUDA error."""
    extension = pytest.importorskip("lora_kernels._cuda")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    memory = torch.zeros(1024)
    x, w, a, b = (torch.zeros(8, 8, dtype=torch.bfloat16) for _ in "xwab")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    operands = launch.operands(BY_RULE, 8, x, Base(w), Adapter(a, b, 1.0))
    call = extension.Sm90Forward(**operands | {"device": 0})
    with pytest.raises(RuntimeError, match=r"cudaError(InsufficientDriver|NoDevice|StubLibrary)"):
        call.workspace()
    with pytest.raises(RuntimeError, match="cudaError"):
        call.launch(memory.data_ptr(), memory.data_ptr())
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        extension.Sm90Forward(**operands | {"device": 0, "N": 12}).workspace()
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):  # no kernel is compiled for this plan
        extension.Sm90Forward(**operands | {"device": 0, "columns": 128, "cluster": 2}).workspace()
