"""A fused PEFT model on a GPU that the CPU plays: `composite` serves its layers once its kernels were right there."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("peft", reason="PEFT is not installed")
from support.fake_gpu import CPU, backend, call, fake_gpu
from support.old_torch import compiles_whole_models
from support.peft_models import fused_layers, make, run, same

import lora_kernels
from lora_kernels.backends import eager
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import Timing

TIMING = Timing(1e-3, {"composite": (1.0, 1.1, 1.2), "eager": (2.0, 2.0, 2.0)}, "2026-11-28")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_served_by_composite(tmp_path, dtype) -> None:
    model, x = make(dtype, lora_dropout=0.3).train(), torch.randn(7, 24, dtype=dtype)
    with fake_gpu(tmp_path, composite := backend("composite")):
        lora_kernels.fuse(model, strict=True)
        run(model, x)
        before = composite.calls
        run(model, x)
        assert composite.calls == before + 2
    assert [layer.fused_calls for layer in fused_layers(model)] == [2, 2]


def test_dropout_is_left_to_peft_where_composite_is_wrong(tmp_path) -> None:
    def wrong(*args):
        ys, hs = eager.forward(*args)
        return [2 * y for y in ys], hs

    model, x = make(lora_dropout=0.3).train(), torch.randn(7, 24)
    torch.manual_seed(5)
    want = run(model, x)
    with fake_gpu(tmp_path, backend("composite", wrong)):
        lora_kernels.fuse(model, strict=True)
        torch.manual_seed(5)
        same(run(model, x), want, rtol=0)  # equal bits, since PEFT computes them
    assert [layer.fused_calls for layer in fused_layers(model)] == [0, 0]


@compiles_whole_models
def test_the_first_use_may_be_inside_a_compiled_model(tmp_path) -> None:
    model, x = make(lora_dropout=0.3).train(), torch.randn(7, 24)
    with fake_gpu(tmp_path, composite := backend("composite")):
        lora_kernels.fuse(model, strict=True)
        torch.manual_seed(5)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        got.sum().backward()
        assert composite.calls > 0
        torch.manual_seed(5)
        torch.testing.assert_close(got, model(x))


def test_the_report_says_what_serves_the_layers_and_on_what_evidence(tmp_path) -> None:
    model = make(lora_dropout=0.3).train()
    with fake_gpu(tmp_path, backend("composite")):
        line = str(lora_kernels.fuse(model, strict=True)).splitlines()[-1]
        assert line.startswith("on cpu, for 2048 rows: forward composite, backward composite (right here on ")
        assert "not measured here" in line and "`python -m lora_kernels verify` finds the fastest" in line
        line = str(lora_kernels.fuse(model, backend="eager")).splitlines()[-1]
        assert line == "on cpu, for 2048 rows: eager, which was asked for by name"
    assert "rows" not in str(lora_kernels.fuse(model)), "a CPU needs no evidence"


def test_the_report_names_the_command_no_more_once_something_was_measured(tmp_path) -> None:
    model = make().train()
    with fake_gpu(tmp_path, backend("composite")):
        find.add(CPU, timings={file.bucket_of(call(dtype=torch.float32, adapter_dtype=torch.float32)): TIMING})
        line = str(lora_kernels.fuse(model, strict=True)).splitlines()[-1]
    assert "composite" in line and "verify" not in line
