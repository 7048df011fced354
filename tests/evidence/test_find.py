"""The evidence that holds on a device: where it is looked for, which place counts, and what makes it stale."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support.fake_gpu import CPU, IDENTITY, backend, call, fake_gpu, restart

from lora_kernels.evidence import file, find, identity
from lora_kernels.evidence.file import Evidence, Timing, Verdict
from lora_kernels.evidence.identity import Identity

RIGHT, WRONG = Verdict(file.RIGHT, "", "2026-11-28"), Verdict(file.WRONG, "y: far off", "2026-11-28")
TIMING = Timing(1e-3, {"eager": (1.0, 1.1, 1.2)}, "2026-11-28")


@pytest.fixture
def gpu(tmp_path: Path):
    with fake_gpu(tmp_path / "home", backend("composite")):
        yield


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the files that come with the package."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(find, "SHIPPED", folder)
    return folder


def test_without_files_nothing_is_known(gpu, shipped) -> None:
    assert find.found(CPU) == find.Found(Evidence(IDENTITY), [], [])


def test_the_places_count_in_their_order(gpu, shipped, tmp_path, monkeypatch) -> None:
    named = [tmp_path / "one.json", tmp_path / "two.json"]
    cache = find.cache_path(IDENTITY)
    for path, verdicts in (
        (named[0], {"a": RIGHT}),
        (named[1], {"a": WRONG, "b": RIGHT}),
        (cache, {"b": WRONG, "c": RIGHT}),
        (shipped / "fake.json", {"c": WRONG, "d": RIGHT}),
    ):
        file.add(path, Evidence(IDENTITY, verdicts))
    monkeypatch.setenv(find.VARIABLE, ":".join(map(str, named)))
    assert find.of(CPU).verdicts == dict.fromkeys("abcd", RIGHT)
    assert find.found(CPU).used == [*named, cache, shipped / "fake.json"]


def test_the_cache_is_named_after_the_device_and_its_size(gpu) -> None:
    slice_of_it = IDENTITY._replace(multiprocessors=16)
    assert find.cache_path(IDENTITY).name == "evidence-fake-gpu-132.json"
    assert find.cache_path(slice_of_it).name == "evidence-fake-gpu-16.json"


@pytest.mark.parametrize("relative", ["", "cache"])
def test_without_a_usable_setting_the_home_directory_serves(gpu, relative, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", "/home/someone")
    assert find.cache_path(IDENTITY) == Path("/home/someone/.cache/lora_kernels/evidence-fake-gpu-132.json")


def test_off_reads_nothing(gpu, monkeypatch) -> None:
    file.add(find.cache_path(IDENTITY), Evidence(IDENTITY, {"a": RIGHT}))
    monkeypatch.setenv(find.VARIABLE, "off")
    assert find.of(CPU).verdicts == {}


@pytest.mark.parametrize("field", [name for name in Identity._fields if name not in ("device", "multiprocessors")])
def test_a_file_of_other_software_is_stale_and_says_why(gpu, field) -> None:
    other = IDENTITY._replace(**{field: "another"})
    file.add(find.cache_path(IDENTITY), Evidence(other, {"a": RIGHT}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find.found(CPU)
    assert found.evidence.verdicts == {} and found.used == []
    (passed,) = found.passed
    assert passed.why == [f"{field} another then, {getattr(IDENTITY, field) or 'none'} now"]


@pytest.mark.parametrize(("field", "holds"), [("driver", True), ("torch", True), ("triton", False), ("sources", False)])
def test_a_shipped_file_may_differ_in_driver_and_torch(gpu, shipped, field, holds) -> None:
    file.add(shipped / "fake.json", Evidence(IDENTITY._replace(**{field: "another"}), {"a": RIGHT}))
    assert bool(find.of(CPU).verdicts) == holds


def test_files_about_other_devices_are_not_mentioned(gpu, shipped) -> None:
    file.add(shipped / "other.json", Evidence(IDENTITY._replace(device="Another GPU"), {"a": RIGHT}))
    file.add(shipped / "slice.json", Evidence(IDENTITY._replace(multiprocessors=16), {"a": RIGHT}))
    assert find.found(CPU) == find.Found(Evidence(IDENTITY), [], [])


def test_a_damaged_or_missing_file_is_named_in_a_warning(gpu, tmp_path, monkeypatch) -> None:
    broken = find.cache_path(IDENTITY)
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    monkeypatch.setenv(find.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.warns(RuntimeWarning) as caught:
        assert find.of(CPU).verdicts == {}
    told = [str(each.message) for each in caught]
    assert len(told) == 2 and "nowhere.json" in told[0] and str(broken) in told[1] and "verify" in told[1]


def test_files_are_read_once_and_additions_are_known_at_once(gpu) -> None:
    assert find.of(CPU).verdicts == {}
    file.add(find.cache_path(IDENTITY), Evidence(IDENTITY, {"by another process": RIGHT}))
    assert find.of(CPU).verdicts == {}
    assert find.add(CPU, {"by this process": WRONG}) == find.cache_path(IDENTITY)
    assert find.of(CPU).verdicts == {"by this process": WRONG}
    restart()
    assert find.of(CPU).verdicts == {"by another process": RIGHT, "by this process": WRONG}


@pytest.mark.parametrize(
    ("changes", "speaks"),
    [
        ({}, True),
        ({"M": 8192}, True),
        ({"M": 16384}, True),
        ({"M": 32768}, False),
        ({"N": 14336}, True),
        ({"N": 14336, "M": 8192}, False),
        ({"R": 64}, True),
        ({"op": "backward"}, False),
        ({"dropout": True}, False),
        ({"dtype": torch.float16}, False),
        ({"w_format": "nf4"}, False),
    ],
)
def test_a_bucket_speaks_for_those_nearby(gpu, changes, speaks) -> None:
    bucket = file.bucket_of(call())
    find.add(CPU, timings={bucket: TIMING})
    assert find.nearest(call(**changes)) == ((bucket, TIMING) if speaks else None)


def test_few_rows_and_many_do_not_speak_for_each_other(gpu) -> None:
    find.add(CPU, timings={file.bucket_of(call(M=64)): TIMING})
    assert find.nearest(call(M=32)) is not None and find.nearest(call(M=128)) is None


def test_the_nearest_of_several_buckets_speaks(gpu) -> None:
    near, far = Timing(1.0, {"eager": (1, 1, 1)}, ""), Timing(2.0, {"eager": (2, 2, 2)}, "")
    find.add(CPU, timings={file.bucket_of(call(M=1024)): far, file.bucket_of(call(M=2048)): near})
    found = find.nearest(call(M=3000))
    assert found is not None and found[1] is near


def test_the_hash_of_the_sources_changes_with_them(tmp_path, monkeypatch) -> None:
    before = identity.source_hash()
    for name in identity._SOURCES:
        place = tmp_path / name
        (place if not name.endswith(".py") else place.parent).mkdir(parents=True, exist_ok=True)
        (place if name.endswith(".py") else place / "kernel.py").write_text("x = 1\n")
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    seen = {before, identity.source_hash()}
    for name in identity._SOURCES:
        place = tmp_path / name if name.endswith(".py") else tmp_path / name / "kernel.py"
        place.write_text("x = 2\n")
        seen.add(identity.source_hash())
    assert len(seen) == 2 + len(identity._SOURCES)


def test_the_driver_is_read_from_its_own_file(monkeypatch) -> None:
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.1.0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert identity._driver() == "580.65.06"
