"""The automatic choice on a GPU follows the evidence: only what was right on this device, and the fastest of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.fake_gpu import CPU, backend, call, fake_gpu, restart

import lora_kernels
from lora_kernels.backends import dispatch
from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import Timing, Verdict

COMPOSITE, TRITON, CUDA = (backend(name) for name in ("composite", "triton", "cuda"))
OPERANDS = torch.ones(32, 64), torch.ones(48, 64), torch.ones(16, 64), torch.ones(48, 16)


@pytest.fixture(autouse=True)
def gpu(tmp_path):
    with fake_gpu(tmp_path, CUDA, TRITON, COMPOSITE):
        yield


def judged(**results: str) -> None:
    """Put verdicts on record: a result for each back-end by name."""
    verdicts = {}
    for name, result in results.items():
        for op in ("forward", "backward"):
            why = "" if result == "right" else "as the test says"
            verdicts[file.class_key(name, "r16", call(op))] = Verdict(result, why, "2026-11-28")
    find.add(CPU, verdicts)


def timed(at: dict = {}, **medians: float) -> None:  # noqa: B006
    """Put times on record, with quartiles 1 % away from the median."""
    ratios = {name: (0.99 * median, median, 1.01 * median) for name, median in medians.items()}
    find.add(CPU, timings={file.bucket_of(call(**at)): Timing(1e-3, ratios, "2026-11-28")})


def chosen(op: str = "forward", **changes) -> str:
    dispatch.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dispatch.automatic(call(op, **changes))


def test_without_times_composite_is_chosen_where_it_is_right() -> None:
    judged(composite="right", triton="right", cuda="right")
    assert chosen() == "composite"


@pytest.mark.parametrize("result", ["wrong", "stuck", "broken"])
def test_what_is_not_right_is_not_chosen(result) -> None:
    judged(composite=result, triton=result, cuda="right")
    timed(cuda=1.08, triton=1.0, composite=1.01, eager=1.2)
    assert chosen() == "cuda"
    assert chosen(M=2**20) == "eager"


def test_what_was_not_judged_is_not_chosen() -> None:
    judged(composite="right", cuda="right")
    timed(cuda=1.08, triton=1.0, composite=1.10, eager=1.2)
    assert chosen() == "cuda"


def test_the_fastest_in_the_bucket_is_chosen_for_each_pass() -> None:
    judged(composite="right", triton="right", cuda="right")
    timed(cuda=1.05, triton=1.30, composite=1.10, eager=1.2)
    timed({"op": "backward"}, cuda=1.25, triton=1.40, composite=1.15, eager=1.3)
    timed({"M": 16}, cuda=1.5, triton=1.05, composite=1.6, eager=1.7)
    assert (chosen(), chosen("backward"), chosen(M=16)) == ("cuda", "composite", "triton")


def test_eager_is_chosen_where_nothing_beats_it() -> None:
    judged(composite="right", triton="right", cuda="right")
    timed(cuda=1.25, triton=1.30, composite=1.199, eager=1.2)  # composite's upper quartile is above eager's median
    assert chosen() == "eager"


def test_a_back_end_that_was_not_timed_is_not_chosen_in_that_bucket() -> None:
    judged(composite="right", triton="right")
    timed(composite=1.1, eager=1.2)
    assert chosen() == "composite"


def test_a_bucket_too_far_away_leaves_the_choice_to_composite() -> None:
    judged(composite="right", cuda="right")
    timed(cuda=1.05, composite=1.10, eager=1.2)
    assert chosen(M=2**16) == "composite"


def test_a_new_number_of_rows_is_no_new_kind_of_call() -> None:
    judged(composite="right")
    x, w, a, b = (t.bfloat16() for t in OPERANDS)
    restart()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in range(17, 33):
            lora_kernels.lora_linear(x[:rows], w, a, b, scale=1.0)
    assert dispatch.pick.cache_info().misses == 1


def test_explain_tells_what_is_known_of_every_back_end() -> None:
    judged(composite="right", triton="stuck", cuda="right")
    x, w, a, b = (t.bfloat16() for t in OPERANDS)
    at = {"M": 32, "N": 48, "K": 64}
    timed(at, cuda=1.05, composite=1.12, eager=1.3, addmm_=1.24, PEFT=1.43)
    answer = lora_kernels.explain(x, w, a, b)
    assert (answer.forward, answer.backward) == ("cuda", "composite")
    text = str(answer)
    assert "forward   cuda: right here on 2026-11-28, 1.05 of the frozen layer (addmm_ 1.24, PEFT 1.43)" in text
    assert "bucket M 32 N 48 K 64 R 16" in text
    assert "backward  composite: right here on 2026-11-28, not measured" in text
    assert any("stuck here on 2026-11-28: as the test says" in reason for reason in answer.passed_over["triton"])
    assert any("1.30 of the frozen layer" in reason for reason in answer.passed_over["eager"])


def test_explain_names_the_command_for_what_was_not_run() -> None:
    judged(composite="right")
    x, w, a, b = (t.bfloat16() for t in OPERANDS)
    with pytest.warns(UserWarning):
        answer = lora_kernels.explain(x, w, a, b)
    assert all(
        "not yet run on this GPU (python -m lora_kernels verify runs it)" in r for r in answer.passed_over["cuda"]
    )


def test_one_warning_in_a_process_names_the_command() -> None:
    judged(composite="right")
    with pytest.warns(UserWarning, match="python -m lora_kernels verify"):
        dispatch.automatic(call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.automatic(call(M=1))
        dispatch.automatic(call("backward"))


@pytest.mark.parametrize(("name", "value"), [("RANK", "3"), ("LORA_KERNELS_EVIDENCE", "off")])
def test_other_ranks_and_off_do_not_warn(name, value, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.automatic(call()) == "composite"


def test_no_warning_where_something_was_measured() -> None:
    judged(composite="right")
    timed({"M": 1}, composite=1.1, eager=1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.automatic(call()) == "composite"
