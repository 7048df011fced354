"""The plug-in in the vLLM that is installed. Skipped without one, and on a platform that is no CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.vllm_contract import Layer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("vLLM's platform here is no CPU", allow_module_level=True)

from lora_kernels.serving.vllm import OURS, THEIRS, VARIABLE, register, why_not  # noqa: E402
from lora_kernels.testing.judge import against_plain  # noqa: E402

IDS = [0, 2, -1, 1, 1, -1, 0, 0, 0, 2, 2, -1, 1, 0] * 2
"""The last slot is left empty: up to 0.32, vLLM's operators give its adapter to the rows without one."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in is on during the test."""
    platform = type(platforms.current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda cls: THEIRS))
    monkeypatch.delenv(VARIABLE, raising=False)
    register()


def wrapper(prompts: list[int], ids: list[int] = IDS):
    """Return the wrapper that vLLM makes for its platform, in a step whose rows have the slots `ids`."""
    from vllm.lora.punica_wrapper import get_punica_wrapper

    made = get_punica_wrapper(256, max_batches=64, device="cpu", lora_config=None)
    mapping = SimpleNamespace(
        index_mapping=tuple(i + 1 for i in ids), prompt_mapping=tuple(i + 1 for i in prompts), is_prefill=True
    )
    made.update_metadata(mapping, [1, 2, 3, 4], 5, 1000)
    return made


def layer(dtype: torch.dtype, outputs: tuple[int, ...]) -> Layer:
    made = Layer(64, outputs, dtype=dtype)
    for slot, R in enumerate((1, 8, 32)):
        made.set(slot, R)
    return made


def test_this_version_is_known():
    assert why_not(vllm, SimpleNamespace(get_punica_wrapper=lambda: THEIRS)) is None


def test_vllm_makes_our_wrapper(registered):
    made = wrapper([0])
    assert f"{type(made).__module__}.{type(made).__name__}" == OURS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_is_as_right_as_with_vllms_own_wrapper(registered, dtype):
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    own, x = layer(dtype, (64, 24, 24)), torch.randn(len(IDS), 64).to(dtype)
    before = torch.randn(len(IDS), 112).to(dtype)
    ours, theirs = wrapper([0]), PunicaWrapperCPU(256, 64, "cpu")
    theirs.update_metadata(
        SimpleNamespace(index_mapping=tuple(i + 1 for i in IDS), prompt_mapping=(1,), is_prefill=True),
        [1, 2, 3, 4],
        5,
        1,
    )
    y, plain = before.clone(), before.clone()
    own.add(ours, y, x)
    own.add(theirs, plain, x)
    exact = own.expected(before, x, IDS, torch.float64)
    verdict = against_plain("y", y.double(), exact, plain.double())
    assert verdict.fault is None, verdict.fault


def test_logits_take_the_slots_of_the_rows_that_are_sampled_from(registered):
    own, x, before = layer(torch.float32, (96,)), torch.randn(3, 64), torch.randn(3, 128)
    y = before.clone()
    wrapper([1, -1, 2]).add_lora_logits(y, x, own.a[0], own.b[0], 1.0)
    torch.testing.assert_close(y, own.expected(before, x, [1, -1, 2], torch.float32))
