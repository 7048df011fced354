"""The file of evidence: what is written is read again, and a damaged file is told from one of another device."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from support.fake_gpu import CPU, IDENTITY, call, fake_gpu

from lora_kernels.evidence import file, find
from lora_kernels.evidence.file import Evidence, Timing, Unreadable, Verdict

RIGHT = Verdict(file.RIGHT, "", "2026-11-28")
STUCK = Verdict(file.STUCK, "forward launched", "2026-11-28")
TIMING = Timing(1e-3, {"composite": (1.1, 1.12, 1.13), "eager": (1.2, 1.25, 1.3)}, "2026-11-28")
PLAN = {"columns": 256, "cluster": 2}


def test_what_is_added_is_read_again(tmp_path: Path) -> None:
    path, bucket = tmp_path / "deep" / "evidence.json", file.bucket_of(call())
    file.add(path, Evidence(IDENTITY, {"a": RIGHT}))
    file.add(path, Evidence(IDENTITY, {"b": STUCK}, {bucket: TIMING}, {"key": PLAN}))
    kept = file.read(path)
    assert kept == Evidence(IDENTITY, {"a": RIGHT, "b": STUCK}, {bucket: TIMING}, {"key": PLAN})
    file.add(path, Evidence(IDENTITY, {"b": RIGHT}))
    assert file.read(path).verdicts == {"a": RIGHT, "b": RIGHT}


def test_the_message_of_an_error_about_a_path_that_is_no_utf_8_is_kept(tmp_path: Path) -> None:
    broken = Verdict(file.BROKEN, "no such file: /home/caf\udce9", "2026-11-28")
    file.add(tmp_path / "evidence.json", Evidence(IDENTITY, {"a": broken}))
    assert file.read(tmp_path / "evidence.json").verdicts == {"a": broken}


def test_evidence_of_another_identity_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    file.add(path, Evidence(IDENTITY, {"a": RIGHT}))
    newer = IDENTITY._replace(driver="590.1")
    file.add(path, Evidence(newer, {"b": RIGHT}))
    assert file.read(path) == Evidence(newer, {"b": RIGHT})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"stuck"', '"right"'),
        lambda text: json.dumps({"content": json.loads(text)["content"]}),
        lambda text: "\udc80",
        lambda text: "[" * 100_000,
    ],
    ids=["empty", "cut short", "a list", "null", "edited", "no checksum", "no text", "deep"],
)
def test_a_damaged_file_is_unreadable_and_is_replaced(tmp_path: Path, damage) -> None:
    path = tmp_path / "evidence.json"
    file.add(path, Evidence(IDENTITY, {"a": STUCK}))
    text = path.read_text(encoding="utf-8")
    damaged = damage(text)
    assert damaged != text
    path.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    with pytest.raises(Unreadable):
        file.read(path)
    file.add(path, Evidence(IDENTITY, {"b": RIGHT}))
    assert file.read(path).verdicts == {"b": RIGHT}


def test_a_file_of_another_schema_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evidence.json"
    monkeypatch.setattr(file, "SCHEMA", 99)
    file.add(path, Evidence(IDENTITY))
    monkeypatch.undo()
    with pytest.raises(Unreadable, match="schema is 99"):
        file.read(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evidence.json"
    file.add(path, Evidence(IDENTITY, {"a": RIGHT}))
    before = path.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        file.add(path, Evidence(IDENTITY, {"b": RIGHT}))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir() if not each.name.endswith(".lock")] == [path.name]


def _add_ten(path: Path, number: int) -> None:
    for i in range(10):
        file.add(path, Evidence(IDENTITY, {f"{number} {i}": RIGHT}))


def test_nothing_is_lost_where_several_processes_add(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_ten, args=(path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(file.read(path).verdicts) == 40


def test_a_class_is_named_by_everything_that_chooses_its_kernels() -> None:
    assert file.class_key("triton", "tickets", call(dropout=True, w_format="nf4")) == (
        "triton forward tickets bfloat16+bfloat16 dropout nf4"
    )
    assert file.class_key("cuda", "decode", call("backward")) == "cuda backward decode bfloat16+bfloat16"


@pytest.mark.parametrize(("M", "R", "bucket"), [(1, 1, (1, 16)), (3, 16, (4, 16)), (4097, 17, (8192, 32))])
def test_buckets_hold_rows_and_ranks_up_to_powers_of_two(M: int, R: int, bucket: tuple[int, int]) -> None:
    found = file.bucket_of(call(M=M, R=R))
    assert found[3:7] == (bucket[0], 4096, 4096, bucket[1])


def _identity(**odd):
    return lambda content: content["identity"].update(odd)


def _verdict(**odd):
    return lambda content: content["verdicts"]["a"].update(odd)


def _timing(**odd):
    return lambda content: content["timings"][0].update(odd)


def _bucket(**odd):
    return lambda content: content["timings"][0]["bucket"].update(odd)


def _ratio(odd):
    return lambda content: content["timings"][0]["ratios"].update(eager=odd)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_identity(multiprocessors="132"), "multiprocessors is '132'"),
        (_identity(multiprocessors=True), "multiprocessors is True"),
        (_identity(driver=580), "driver is 580"),
        (_identity(triton=["3"]), "triton is .'3'."),
        (_verdict(result="rightish"), "result of 'a' is 'rightish'"),
        (_verdict(result=["right"]), "result of 'a' is .'right'."),
        (_verdict(result=None), "result of 'a' is None"),
        (_verdict(why=0), "reason of 'a' is 0"),
        (_verdict(date=20261128), "date is 20261128"),
        (_verdict(date="x" * 10_000_000), "date is 'xxx"),
        (_verdict(more=1), "more"),
        *[(_bucket(**{size: odd}), f"{size} is ") for size in "MNKR" for odd in ("8", -1, True, 8.0, None, 10**30)],
        (_bucket(M=[1] * 100_000), r"M is \[1, 1, 1"),
        (_bucket(op="sideways"), "op is 'sideways'"),
        (_bucket(op={}), "op is {}"),
        (_bucket(dropout="no"), "dropout is 'no'"),
        (_bucket(dropout=1), "dropout is 1"),
        (_bucket(dtype=None), "dtype is None"),
        (_bucket(w_format=0), "w_format is 0"),
        *[
            (_timing(frozen_seconds=odd), "frozen_seconds is ")
            for odd in ("0.1", -1.0, True, None, float("nan"), float("inf"), [])
        ],
        (_timing(frozen_seconds=10**400), "OverflowError"),
        (_timing(date=None), "date is None"),
        *[
            (_ratio(odd), "ratio of 'eager' is ")
            for odd in (
                "123",
                [1.0, 2.0],
                [1.0] * 100_000,
                ["1", "2", "3"],
                [1.0, float("nan"), 2.0],
                [1.0, 2.0, float("inf")],
                [-1.0, 1.0, 2.0],
                [True, True, True],
                [3.0, 2.0, 1.0],
                {"a": 1, "b": 2, "c": 3},
                None,
                1.0,
            )
        ],
        (lambda content: content.update(verdicts=[]), "AttributeError"),
        (lambda content: content.update(timings={"a": 1}), "TypeError"),
        (lambda content: content["plans"].update(key=[["columns", 256]]), "plan 'key' is "),
        (lambda content: content["plans"].update(key=1), "plan 'key' is 1"),
    ],
)
def test_values_of_odd_kinds_make_a_file_unreadable(tmp_path: Path, change, told: str) -> None:
    """A file with a checksum that matches may still have been made by hand."""
    path = tmp_path / "evidence.json"
    file.add(path, Evidence(IDENTITY, {"a": STUCK}, {file.bucket_of(call()): TIMING}, {"key": PLAN}))
    content = json.loads(path.read_text())["content"]
    change(content)
    path.write_text(json.dumps({"sha256": file._checksum(content), "content": content}))
    with pytest.raises(Unreadable, match=told) as raised:
        file.read(path)
    assert len(str(raised.value)) < 200
    with fake_gpu(tmp_path / "home"), pytest.MonkeyPatch.context() as patch:
        patch.setenv(find.VARIABLE, str(path))
        with pytest.warns(RuntimeWarning, match=rf"{path} is ignored: .*{told}"):
            assert find.of(CPU) == Evidence(IDENTITY)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "endless"])
def test_what_is_no_regular_file_is_unreadable(tmp_path: Path, make) -> None:
    make(tmp_path / "evidence.json")
    with pytest.raises(Unreadable, match="no regular file"):
        file.read(tmp_path / "evidence.json")


def test_a_file_that_is_too_large_is_unreadable(tmp_path: Path) -> None:
    with open(tmp_path / "evidence.json", "wb") as large:
        large.truncate(65 << 20)
    with pytest.raises(Unreadable, match="bytes"):
        file.read(tmp_path / "evidence.json")
