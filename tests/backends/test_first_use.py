"""The check at the first use of a class of composite's kernels: right kernels are switched on, wrong ones are not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fake_gpu import CPU, backend, call, fake_gpu, restart
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.backends import dispatch, eager, first_use
from lora_kernels.core.many import AdapterStack
from lora_kernels.evidence import file, find

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def verdict_of(module: Any, home: Any, asked=None) -> file.Verdict:
    with fake_gpu(home, module):
        return first_use.verdict(module, asked or call())


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "dropout"), list(itertools.product(("forward", "backward"), (False, True))))
@pytest.mark.parametrize("M", [1, 40, 4096])
def test_right_results_pass(tmp_path, dtypes, op, dropout, M) -> None:
    asked = call(op, M=M, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout=dropout)
    assert verdict_of(backend("composite"), tmp_path, asked)[:2] == (file.RIGHT, "")


@pytest.mark.parametrize("w_format", ["nf4", "fp4", "int8", "fp8"])
def test_right_results_over_a_quantised_weight_pass(tmp_path, w_format) -> None:
    assert verdict_of(backend("composite"), tmp_path, call(w_format=w_format)).result == file.RIGHT


def spoiled(which: str) -> Any:
    """Return a back-end with one wrong result: a hundredth of its elements are off by a few per cent."""

    def spoil(t: torch.Tensor) -> torch.Tensor:
        t.flatten()[::97] *= 1.05
        return t

    def forward(*args: Any) -> Any:
        ys, hs = eager.forward(*args)
        return ([spoil(ys[0])] if which == "y" else ys), ([spoil(hs[0])] if which == "h" else hs)

    def backward(*args: Any) -> Any:
        dx, das, dbs = eager.backward(*args)
        if which == "dx":
            dx = spoil(dx)
        return dx, [spoil(das[0])] if which == "da" else das, [spoil(dbs[0])] if which == "db" else dbs

    return backend("composite", forward, backward)


@pytest.mark.parametrize("which", ["y", "h", "dx", "da", "db"])
def test_a_wrong_result_is_found_and_named(tmp_path, which) -> None:
    op, name = ("forward", {"h": "db"}.get(which, which)) if which in ("y", "h") else ("backward", which)
    with pytest.warns(RuntimeWarning, match="is not used for .* wrong"):
        result = verdict_of(spoiled(which), tmp_path, call(op))
    assert result.result == file.WRONG and result.why.startswith(f"{name}: ")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["forward_multi", "backward_multi"])
@pytest.mark.parametrize("dropout", [False, True])
def test_right_results_of_many_adapters_pass(tmp_path, dtypes, op: str, dropout: bool) -> None:
    asked = call(op, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout=dropout)
    assert verdict_of(backend("composite"), tmp_path, asked)[:2] == (file.RIGHT, "")


@pytest.mark.parametrize("which", ["y", "y of a stack", "h", "dx", "da", "db"])
def test_a_wrong_result_of_one_of_many_adapters_is_found_and_named(tmp_path, which: str) -> None:
    """What is wrong belongs to the adapter that comes last."""

    def spoil(t: torch.Tensor) -> torch.Tensor:
        t.flatten()[::97] *= 1.05
        return t

    def forward_multi(x, base, adapters, rows, save_h) -> Any:
        y, h = eager.forward_multi(x, base, adapters, rows, save_h)
        if (which == "y of a stack") if isinstance(adapters, AdapterStack) else (which == "y"):
            y[rows.index(3)] = spoil(y[rows.index(3)])
        if which == "h" and h is not None:
            spoil(h[-45 * 24 :])
        return y, h

    def backward_multi(*args: Any) -> Any:
        dx, das, dbs = eager.backward_multi(*args)
        if which == "dx":
            dx[args[4].index(3)] = spoil(dx[args[4].index(3)])
        elif which in ("da", "db"):
            spoil((das if which == "da" else dbs)[3])
        return dx, das, dbs

    module = backend("composite")
    module.forward_multi, module.backward_multi = forward_multi, backward_multi
    op = "backward_multi" if which[0] == "d" else "forward_multi"
    with pytest.warns(RuntimeWarning, match="is not used for .* wrong"):
        result = verdict_of(module, tmp_path, call(op))
    name = {"h": "db of adapter 3", "da": "da of adapter 3", "db": "db of adapter 3"}.get(which, which)
    assert result.result == file.WRONG and result.why.startswith(f"{name}: ") and ";" not in result.why


def not_finite(*args: Any) -> Any:
    ys, hs = eager.forward(*args)
    ys[0][0, 0] = torch.nan
    return ys, hs


def raising(*args: Any) -> Any:
    raise RuntimeError("no compiler\nmore lines")


@pytest.mark.parametrize(
    ("forward", "result", "why"),
    [(not_finite, file.WRONG, "y: not finite"), (raising, file.BROKEN, "RuntimeError: no compiler")],
)
def test_other_failures_are_told(tmp_path, forward: Callable[..., Any], result: str, why: str) -> None:
    with pytest.warns(RuntimeWarning):
        found = verdict_of(backend("composite", forward), tmp_path)
    assert found[:2] == (result, why)


def test_a_wrong_class_leaves_eager_and_says_so_once(tmp_path) -> None:
    with fake_gpu(tmp_path, spoiled("y")):
        with pytest.warns() as caught:
            assert [dispatch.automatic(call(M=M)) for M in (512, 1024, 4096)] == ["eager"] * 3
        assert len([each for each in caught if "is not used" in str(each.message)]) == 1
        assert "wrong here on" in str(lora_kernels.explain(*operands())) and "y: " in str(
            lora_kernels.explain(*operands())
        )


def operands() -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(shape).bfloat16() for shape in ((512, 64), (48, 64), (16, 64), (48, 16)))


def test_the_check_is_made_once_and_kept_for_other_processes(tmp_path) -> None:
    module = backend("composite")
    with fake_gpu(tmp_path, module):
        assert first_use.verdict(module, call()).result == file.RIGHT
        count = module.calls
        assert count > 0
        first_use.verdict(module, call(M=512))
        restart()
        assert first_use.verdict(module, call()).result == file.RIGHT
        assert module.calls == count
        first_use.verdict(module, call(dropout=True))
        assert module.calls > count


def test_an_error_that_may_be_this_processes_own_is_not_kept(tmp_path) -> None:
    module = backend("composite", raising)
    with fake_gpu(tmp_path, module):
        with pytest.warns(RuntimeWarning):
            assert first_use.verdict(module, call()).result == file.BROKEN
        first_use.verdict(module, call())
        assert module.calls == 1
        restart()
        assert find.of(CPU).verdicts == {}


def test_an_error_that_lost_the_device_is_kept(tmp_path, monkeypatch) -> None:
    module = backend("composite", raising)
    monkeypatch.setattr(first_use, "_answers", lambda device: False)
    with fake_gpu(tmp_path, module):
        with pytest.warns(RuntimeWarning):
            first_use.verdict(module, call())
        restart()
        assert [verdict.result for verdict in find.of(CPU).verdicts.values()] == [file.BROKEN]


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), ("LORA_KERNELS_EVIDENCE", "off")])
def test_other_ranks_and_off_write_nothing(tmp_path, monkeypatch, name, value) -> None:
    module = backend("composite")
    with fake_gpu(tmp_path, module):
        monkeypatch.setenv(name, value)
        assert first_use.verdict(module, call()).result == file.RIGHT
    assert not list(tmp_path.rglob("*.json"))


def test_a_home_that_cannot_be_written_keeps_nothing_for_other_processes(tmp_path, monkeypatch) -> None:
    module = backend("composite")

    def fail(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(file, "_write", fail)
    with fake_gpu(tmp_path, module):
        assert first_use.verdict(module, call()).result == file.RIGHT
        count = module.calls
        assert first_use.verdict(module, call()).result == file.RIGHT and module.calls == count


def test_during_a_capture_the_first_call_raises_and_the_next_is_checked(tmp_path, monkeypatch) -> None:
    module = backend("composite")
    x, w, a, b = operands()
    with fake_gpu(tmp_path, module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(first_use, "capturing", lambda: True)
        with pytest.raises(first_use.NotNow, match="call the layer once before the capture"):
            lora_kernels.lora_linear(x, w, a, b, scale=1.0)
        monkeypatch.setattr(first_use, "capturing", lambda: False)
        lora_kernels.lora_linear(x, w, a, b, scale=1.0)
        monkeypatch.setattr(first_use, "capturing", lambda: True)
        restart()
        lora_kernels.lora_linear(x, w, a, b, scale=1.0)


def test_nothing_of_the_callers_modes_sees_or_changes_the_check(tmp_path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module = backend("composite")
    before = torch.get_rng_state()
    with fake_gpu(tmp_path, module), Watch(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert (
            first_use.verdict(module, call("backward", dtype=torch.float32, adapter_dtype=torch.float32))[0] == "right"
        )
    assert seen == [] and torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_does_not_count_the_tensors_of_the_check(tmp_path) -> None:
    """It counts what is saved in the forward and in the recomputation, and only the first of them makes a check."""
    x, w, a, b = operands()
    with fake_gpu(tmp_path, backend("composite")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = checkpoint(lora_kernels.lora_linear, x, w, a.requires_grad_(), b, scale=1.0, use_reentrant=False)
        y.sum().backward()
        assert {verdict.result for verdict in find.of(CPU).verdicts.values()} == {file.RIGHT}


def test_the_check_is_made_where_torch_forbids_hooks_on_saved_tensors(tmp_path) -> None:
    with fake_gpu(tmp_path, backend("composite")), disable_saved_tensors_hooks("no hooks here"):
        assert first_use.verdict(backend("composite"), call("backward")).result == file.RIGHT


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_list_of_layers_is_checked_as_a_list(tmp_path, op, dropout) -> None:
    sizes = []

    def forward(x: Any, bases: Any, *rest: Any) -> Any:
        sizes.append(len(bases))
        return eager.forward(x, bases, *rest)

    assert verdict_of(backend("composite", forward), tmp_path, call(op, dropout=dropout, layers=4)).result == file.RIGHT
    assert set(sizes) == {4}


def test_a_group_asks_for_the_class_of_its_list(tmp_path, monkeypatch) -> None:
    asked = []
    module = backend("composite")
    module.kernel_class = lambda call: asked.append(call.layers) or f"r16 of {call.layers}"
    x, w, a, b = operands()
    with fake_gpu(tmp_path, module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora_kernels.lora_linear_group(x, [lora_kernels.group.Layer(w, a, b, 1.0)] * 2)
        assert set(asked) == {2}
        assert {key.split(" of ")[1][0] for key in find.of(CPU).verdicts} == {"2"}
