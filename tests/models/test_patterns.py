"""Regular expressions of a config are Python's, and cannot keep a load busy."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import OrderedDict

import pytest
import torch
from support import adapter_models
from support.adapter_models import adapted, assert_unchanged, edit_config, run, state

from lora_kernels import load_adapter, save_adapter
from lora_kernels.models import patterns, targets

peft = pytest.importorskip("peft")
pytest.importorskip("safetensors.torch")


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return adapter_models.net()


BOMB = "([a-z.]+)+!"
"""It takes 2^n steps for a name of n letters. The names of this model have up to 9, so the test makes a longer one."""


def deep() -> torch.nn.Module:
    model = net()
    model.add_module("b", torch.nn.Sequential(OrderedDict({"a" * 40: torch.nn.Identity()})))
    return model


HANGING = {
    "rank_pattern": {"rank_pattern": {BOMB: 4}},
    "target_modules": {"target_modules": BOMB},
    "exclude_modules": {"exclude_modules": BOMB},
    "alpha_pattern": {"alpha_pattern": {BOMB: 4}},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": BOMB, "target_modules": ["fc"]},
}


@pytest.mark.parametrize(
    "fields", [pytest.param(HANGING[k], id=k, marks=[pytest.mark.slow] * (k != "rank_pattern")) for k in HANGING]
)
def test_a_pattern_that_would_hang_is_refused(tmp_path, fields):
    save_adapter(adapted(net()), tmp_path)
    edit_config(tmp_path, **fields)
    model, errors = deep(), []
    before, start = state(model), time.monotonic()

    def load() -> None:
        with pytest.raises(ValueError, match="more than 1 s of processor time") as raised:
            load_adapter(model, tmp_path)
        errors.append(raised.value)

    thread = threading.Thread(target=load)  # no signal could end it there
    thread.start()
    thread.join(60)
    assert errors and "name the layers instead" in str(errors[0]) and time.monotonic() - start < 30
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "target",
    [
        r"(?i).*FC|.*\.(out)|head",
        r"^(?!.*norm).*(fc|out|head)$",
        r"(?:inner\.)?fc|(?P<end>head)|.*(?<=inner\.)out",
        r"(.)*?(fc|out|head)",
        r"[a-z.]{2,9}(?<!norm)(?<!act)(?<!inner)",
    ],
)
def test_what_people_write_means_what_it_means_to_peft(tmp_path, target):
    model = adapted(net())
    save_adapter(model, tmp_path)
    edit_config(tmp_path, target_modules=target)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    again = net()
    assert {layer.name for layer in load_adapter(again, tmp_path).layers} == {
        name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")
    }
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a(", "is no regular expression"),
        ("[", "is no regular expression"),
        ("(" * 20_000 + ")" * 20_000, "is no regular expression"),
        ("a{99999999999999999999}", "is no regular expression"),
        ("(?i)fc", "is no regular expression"),  # as a key it is used in the middle of an expression
        (r"(\d)\2", "is no regular expression"),
    ],
    ids=["a group", "a set", "deep", "a repetition", "flags", "a reference"],
)
def test_a_key_that_is_no_regular_expression_is_named(tmp_path, pattern, words):
    if pattern.startswith("(?i)") and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 takes flags in the middle of an expression, with a DeprecationWarning")
    save_adapter(adapted(net()), tmp_path)
    edit_config(tmp_path, rank_pattern={pattern: 4})
    with pytest.raises(ValueError, match=f"rank_pattern: .*{words}"):
        load_adapter(net(), tmp_path)


def test_plain_names_start_no_process(tmp_path, monkeypatch):
    model = adapted(net(), rank_pattern={"fc": 3}, alpha_pattern={"out": 4})
    save_adapter(model, tmp_path)
    monkeypatch.setattr(patterns.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    for target in (["fc", "out", "head"], r"fc|inner\.fc|inner\.out|head"):
        edit_config(tmp_path, target_modules=target)
        assert len(load_adapter(net(), tmp_path).layers) == 4


@pytest.mark.slow
def test_a_program_that_ignores_the_end_of_processes_is_protected_too(tmp_path):
    save_adapter(adapted(net()), tmp_path)
    edit_config(tmp_path, exclude_modules=BOMB)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match="processor time"):
            load_adapter(deep(), tmp_path)
        edit_config(tmp_path, exclude_modules="(x)+")
        load_adapter(net(), tmp_path)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_where_no_process_can_be_started_the_error_says_so(tmp_path, monkeypatch):
    save_adapter(adapted(net()), tmp_path)
    edit_config(tmp_path, target_modules=".*(fc|out|head)")
    monkeypatch.setattr(patterns.sys, "executable", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="cannot be tried"):
        load_adapter(net(), tmp_path)


def test_too_many_keys_are_refused(tmp_path, monkeypatch):
    save_adapter(adapted(net()), tmp_path)
    edit_config(tmp_path, rank_pattern={f"a{i}": 1 for i in range(5_000)})
    load_adapter(net(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(patterns, "_MOST_MATCHES", 10_000)
        with pytest.raises(ValueError, match="rank_pattern: 5,000 patterns for 8 names are too many"):
            load_adapter(net(), tmp_path)
    edit_config(tmp_path, rank_pattern={f"^a{i}": 1 for i in range(20_000)})
    with pytest.raises(ValueError, match="rank_pattern: 20,000 regular expressions are too many"):
        load_adapter(net(), tmp_path)


def test_many_names_take_no_time(tmp_path):
    model = adapted(net())
    save_adapter(model, tmp_path)
    edit_config(tmp_path, target_modules=[f"a{i}" for i in range(300_000)] + ["fc", "out", "head"])
    start = time.monotonic()
    assert len(load_adapter(net(), tmp_path).layers) == 4
    assert time.monotonic() - start < 10


def test_the_cache_has_room_for_every_pattern_that_a_file_may_have():
    assert targets._compiled.cache_parameters()["maxsize"] >= 3 * patterns._MOST_EXPRESSIONS


def test_names_of_lists_of_blocks_are_patterns_and_may_be_too_many(tmp_path):
    model = adapted(net())
    save_adapter(model, tmp_path)
    edit_config(
        tmp_path, target_modules=["fc"], layers_to_transform=[0], layers_pattern=[f"h{i}" for i in range(10_001)]
    )
    with pytest.raises(ValueError, match="layers_pattern: 10,001 regular expressions are too many"):
        load_adapter(net(), tmp_path)
