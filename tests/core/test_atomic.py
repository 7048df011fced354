"""Files are replaced as a whole or not at all, whoever else writes, reads, is killed or has planted something there."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from lora_kernels.core import atomic, locks

NAMES = ("a", "b")


def write(folder: Path, content: bytes) -> None:
    atomic.replace({folder / name: content for name in NAMES})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(content: bytes) -> dict[str, bytes]:
    return dict.fromkeys(NAMES, content)


def _write_many(folder: Path, number: int, times: int) -> None:
    for _ in range(times):
        write(folder, bytes([number]) * 70_000)


def test_readers_see_one_writer_only_while_threads_and_processes_write(tmp_path: Path) -> None:
    write(tmp_path, b"\0" * 70_000)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(tmp_path, n, 20)) for n in (1, 2, 3)]
    for process in processes:
        process.start()
    threads = [threading.Thread(target=_write_many, args=(tmp_path, n, 20)) for n in (4, 5, 6)]
    for thread in threads:
        thread.start()
    pairs = 0
    while any(each.is_alive() for each in (*threads, *processes)):
        for name in NAMES:  # without the lock, each file alone is whole
            text = (tmp_path / name).read_bytes()
            assert text == text[:1] * 70_000
        with locks.locked(tmp_path, shared=True):  # with the lock, both are of one writer
            a, b = ((tmp_path / name).read_bytes() for name in NAMES)
        assert a == b
        pairs += 1
    for each in (*threads, *processes):
        each.join()
    assert pairs and [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path).keys() == set(NAMES)


def test_a_link_in_a_files_place_is_replaced_and_what_it_names_is_kept(tmp_path: Path) -> None:
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes(b"precious")
    (folder / "a").symlink_to(victim)
    (folder / "b").symlink_to(tmp_path / "nowhere")
    write(folder, b"new")
    assert contents(folder) == whole(b"new") and not any(path.is_symlink() for path in folder.iterdir())
    assert victim.read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()


def test_a_failed_write_puts_links_back_as_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes(b"precious")
    (folder / "a").symlink_to(victim)
    monkeypatch.setattr(os, "replace", _failing(os.replace, 2))
    with pytest.raises(OSError, match="no space"):
        write(folder, b"new")
    assert os.readlink(folder / "a") == str(victim) and victim.read_bytes() == b"precious"
    assert os.listdir(folder) == ["a"]


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            write(tmp_path, b"new")
        finally:
            os.umask(before)
        assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o666 & ~mask] * 2


def _failing(real, count: int, error: BaseException | None = None):
    calls = [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            raise error or OSError(errno.ENOSPC, "no space left on device")
        return real(*args, **kwargs)

    return function


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["disk full", "interrupted"])
@pytest.mark.parametrize(("module", "name", "count"), [(os, "fsync", 2), (os, "replace", 1), (os, "replace", 2)])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_after_an_error_everything_is_as_it_was(tmp_path, monkeypatch, module, name, count, links, old, error) -> None:
    if old:
        write(tmp_path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, _failing(getattr(module, name), count, error))
        if not links:
            patch.setattr(os, "link", _failing(os.link, 1))
        with pytest.raises(KeyboardInterrupt if error else OSError) as raised:
            write(tmp_path, b"new")
    assert error or "a and b could not be written; nothing was changed" in str(raised.value)
    assert contents(tmp_path) == (whole(b"old") if old else {})
    write(tmp_path, b"newer")
    assert contents(tmp_path) == whole(b"newer")


def test_a_folder_in_a_files_place_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="nothing was changed"):
        write(tmp_path, b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def _killed_at(folder: Path, name: str, count: int) -> None:
    """Write, and die without any cleaning up at the call `count` of the function `name` of the module os."""
    real, calls = getattr(os, name), [0]

    def function(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, function)
    write(folder, b"half")


@pytest.mark.parametrize(
    ("name", "count", "left"),
    [("fsync", 1, b"old"), ("fsync", 2, b"old"), ("link", 1, b"old"), ("replace", 1, b"half"), ("replace", 2, b"half")],
)
def test_what_a_killed_write_leaves_is_finished_or_removed(tmp_path: Path, name: str, count: int, left: bytes) -> None:
    for settle, expected in ((atomic.finish, left), (lambda folder: write(folder, b"new"), b"new")):
        write(tmp_path, b"old")
        process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(tmp_path, name, count))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 3
        settle(tmp_path)
        assert contents(tmp_path) == whole(expected)


def test_a_killed_write_is_not_finished_over_what_another_program_has_written(tmp_path: Path) -> None:
    write(tmp_path, b"old")
    process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(tmp_path, "replace", 2))
    process.start()
    process.join()
    time.sleep(0.02)
    for name in NAMES:
        (tmp_path / name).write_bytes(b"newer")
    atomic.finish(tmp_path)
    assert contents(tmp_path) == whole(b"newer")


def test_the_temporaries_of_a_living_writer_and_of_others_are_left(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").mkdir()
    (tmp_path / f".planted{atomic._SUFFIX}").symlink_to(tmp_path / ".notes.tmp")
    with atomic._workspace(tmp_path) as space:
        (space / "a.new").write_bytes(b"unfinished")
        write(tmp_path, b"new")
        assert (space / "a.new").read_bytes() == b"unfinished"
    assert sorted(os.listdir(tmp_path)) == [".notes.tmp", f".planted{atomic._SUFFIX}", *NAMES]


def _planted(folder: Path, elsewhere: Path, what: str) -> Path:
    """Make a temporary folder, as a save killed between its renames leaves it but for `what`."""
    space = folder / f".planted{atomic._SUFFIX}"
    if what == "a link to a folder":
        space.symlink_to(elsewhere)
        return space
    space.mkdir(mode=0o700)
    (space / atomic._LOCK).touch()
    (space / "a.new").write_bytes(b"planted")
    (space / atomic._READY).touch()
    lock, new = space / atomic._LOCK, space / "a.new"
    if what in ("a folder as the lock", "a link as the lock", "a pipe as the lock", "no lock"):
        lock.unlink()
        if what == "a folder as the lock":
            lock.mkdir()
        elif what == "a link as the lock":
            lock.symlink_to(elsewhere / "lock")
        elif what == "a pipe as the lock":
            os.mkfifo(lock)
    elif what == "a lock that nobody may open":
        lock.chmod(0)
    elif what in ("a folder as a new file", "a link as a new file"):
        new.unlink()
        if what == "a folder as a new file":
            new.mkdir()
        else:
            new.symlink_to(elsewhere / "lock")
    elif what == "a link as the mark":
        (space / atomic._READY).unlink()
        (space / atomic._READY).symlink_to(elsewhere / "lock")
    elif what.startswith("a new file named "):
        new.rename(space / what.split()[-1])
    elif what.startswith("mode "):
        space.chmod(int(what.split()[-1], 8))
    return space


@pytest.mark.parametrize(
    "what",
    [
        "a link to a folder",
        "a folder as the lock",
        "a link as the lock",
        "a pipe as the lock",
        "no lock",
        pytest.param(
            "a lock that nobody may open", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may open it")
        ),
        "a folder as a new file",
        "a link as a new file",
        "a link as the mark",
        "a new file named .new",
        "a new file named ..new",
        "a new file named ...new",
        pytest.param("mode 000", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may look into it")),
        pytest.param("mode 400", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may look into it")),
    ],
)
def test_what_no_save_has_left_stops_neither_readers_nor_writers(tmp_path: Path, what: str) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for name in (atomic._LOCK, atomic._READY, "a.new"):
        (elsewhere / name).write_bytes(b"precious")
    write(folder, b"old")
    space = _planted(folder, elsewhere, what)
    try:
        atomic.finish(folder)
        assert {name: (folder / name).read_bytes() for name in NAMES} == whole(b"old")
        write(folder, b"new")
        assert {name: (folder / name).read_bytes() for name in NAMES} == whole(b"new")
        assert not (folder / "a").is_symlink()
        assert space.is_symlink() or what.startswith("mode") or not space.exists()
    finally:
        if not space.is_symlink() and space.exists():
            space.chmod(0o700)
    assert all(path.read_bytes() == b"precious" for path in elsewhere.iterdir()) and len(os.listdir(elsewhere)) == 3


@pytest.mark.parametrize("made", [True, False], ids=["a folder in the place", "complete"])
def test_a_killed_save_is_finished_unless_a_folder_is_in_the_place(tmp_path: Path, made: bool) -> None:
    space = _planted(tmp_path, tmp_path, "nothing")
    if made:
        (tmp_path / "a").mkdir()
        os.utime(tmp_path / "a", (0, 0))
    atomic.finish(tmp_path)
    assert not space.exists() and (tmp_path / "a").is_dir() == made
    assert made or contents(tmp_path) == {"a": b"planted"}


def test_a_killed_save_that_cannot_be_finished_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, b"old")
    space = _planted(tmp_path, tmp_path, "nothing")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _failing(os.replace, 1, OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(OSError, match=f"Read-only file system.*{space.name}.*remove it"):
            atomic.finish(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _failing(os.replace, 1, OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(OSError, match=f"{space.name}.*remove it.*a and b could not be written"):
            write(tmp_path, b"new")
    atomic.finish(tmp_path)
    assert contents(tmp_path) == {"a": b"planted", "b": b"old"}


def test_a_lock_that_is_never_given_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WAIT", 0.1)
    with locks.locked(tmp_path, shared=True):
        with locks.locked(tmp_path, shared=True):
            pass
        with pytest.raises(TimeoutError, match="another process has held the lock"):
            write(tmp_path, b"new")
    write(tmp_path, b"new")
    assert contents(tmp_path) == whole(b"new")


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks, "_WAIT", 0.5)
    with locks.locked(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    try:
        write(tmp_path, b"new")
    finally:
        child.kill()
        child.join()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match="cannot be locked"):
        write(tmp_path, b"new")
    assert contents(tmp_path) == whole(b"new")


def test_a_file_as_a_lock_is_made_and_no_link_is_followed(tmp_path: Path) -> None:
    with locks.locked(tmp_path / "x.lock") as held:
        assert held
    (tmp_path / "y.lock").symlink_to(tmp_path / "victim")
    told = r"cannot serve as a lock.*remove what is there.*y\.lock"
    with pytest.raises(OSError, match=told), locks.locked(tmp_path / "y.lock"):
        pass
    assert not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, b"old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="nothing was changed"):
            write(tmp_path, b"new")
    finally:
        tmp_path.chmod(0o755)
    with contextlib.suppress(OSError):
        assert contents(tmp_path) == whole(b"old")
