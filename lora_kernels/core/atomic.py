"""Files that are replaced as a whole or not at all.

A save writes into a folder of its own inside the target's folder, marks it as ready, and renames what it has written.
If the process is killed before the mark, the next save removes the folder. If it is killed after it, the next save or
`finish` makes the renames that are missing. Nothing follows a symbolic link: a link in a file's place is replaced, and
the file that it names stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_kernels.core.locks import locked, release, try_lock

_SUFFIX = ".lora_kernels.tmp"
"""The end of the name of every temporary folder."""
_LOCK, _READY = "lock", "ready"
"""Files in it: one that is locked as long as its process lives, and one that says that every new file is complete."""
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
"""The errors of opening what has the name of a temporary folder: it was just removed, is a file or a link, or nobody
may look into it. None is what a save leaves."""
_MOST_BYTES = 64 << 20
"""The size of the largest file of settings or findings that is read. Real ones have some kilobytes."""


def replace(files: Mapping[Path, bytes]) -> None:
    """Replace files of one folder by these contents, in this order, and flush them to the disk.

    A reader of one file sees the old content or the new, never a part. A reader that holds `locked(folder,
    shared=True)` sees all files old or all new. Temporary folders that killed processes have left are removed. The new
    files have the permissions that the process's umask gives.

    Raises:
        OSError: the folder cannot be written, the disk is full, or another process has held the folder's lock for a
            minute. Every file is then as it was before.
    """
    folder = next(iter(files)).parent
    try:
        with _workspace(folder) as space:
            for path, content in files.items():
                with open(space / f"{path.name}.new", "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            with locked(folder):
                _swap(list(files), space)
    except OSError as error:
        if error.errno is None or isinstance(error, TimeoutError):
            raise
        names = " and ".join(path.name for path in files)
        why = f"{error.strerror}, so {names} could not be written; nothing was changed"
        raise OSError(error.errno, why, str(folder)) from error


def contents(path: Path) -> bytes:
    """Return what a small file holds.

    Raises:
        ValueError: it is no regular file, so that reading might never end, or it has more than 64 MiB.
        OSError: it cannot be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"it has {status.st_size:,} bytes, and at most {_MOST_BYTES:,} are read")
        return file.read(_MOST_BYTES)


def finish(folder: Path) -> None:
    """Finish a save of `replace` that was killed between its renames, so that a folder's files belong together.

    Raises:
        OSError: the renames cannot be made, as in a folder that may only be read.
    """
    if any(folder.glob(f".*{_SUFFIX}")):
        with locked(folder) as alone:
            if alone:
                _settle(folder)


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """Make a temporary folder in `folder`, and remove it at the end. Those of killed processes are settled first.

    The lock of `folder` is held while one is made, so that one whose own lock nobody holds is abandoned.
    """
    descriptor = None
    with locked(folder) as alone:
        if alone:
            _settle(folder)
        space = Path(tempfile.mkdtemp(prefix=".", suffix=_SUFFIX, dir=folder))
        try:
            descriptor = os.open(space / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try_lock(descriptor)
        except BaseException:
            shutil.rmtree(space, ignore_errors=True)
            raise
    try:
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)
        release(descriptor)


def _settle(folder: Path) -> None:
    """Finish, or else remove, what killed processes of this user have left in `folder`, whose lock is held.

    A folder that no save of this user can have left is not finished: its files are removed where that is possible.

    Raises OSError where new files are complete but cannot be put in their places."""
    for space in folder.glob(f".*{_SUFFIX}"):
        with contextlib.ExitStack() as opened:
            try:
                inside = os.open(space, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in _NO_FOLDER:
                    continue
                raise
            opened.callback(os.close, inside)
            if os.fstat(inside).st_uid != os.geteuid():
                continue
            lock = _lock_in(inside)
            if isinstance(lock, int):
                opened.callback(release, lock)
                if not try_lock(lock):
                    continue
            # Without a lock file its process was killed before it made the file, or after it had put the files in place
            # and removed it.
            try:
                for name in _unrenamed(inside, folder) if isinstance(lock, int) else ():
                    os.replace(f"{name}.new", folder / name, src_dir_fd=inside)
            except OSError as error:
                why = (
                    f"{error.strerror}: what a killed save has left in {space} cannot be put in place (make both "
                    "folders writable, or remove it to keep the other files)"
                )
                raise OSError(error.errno, why, str(folder)) from error
            shutil.rmtree(space, ignore_errors=True)  # it follows no links


def _lock_in(space: int) -> int | None:
    """Return a descriptor of the lock in a temporary folder; None where there is no file that a save has made."""
    status = _regular(space, _LOCK)
    if status is None:
        return None
    for mode in (os.O_RDWR, os.O_RDONLY):  # a network file system locks what is open for writing only
        with contextlib.suppress(OSError):  # it is only readable, or not even that
            return os.open(_LOCK, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=space)
    return None


def _regular(space: int, name: str) -> os.stat_result | None:
    """Return the status of a file in a folder; None where there is no regular file of this name."""
    try:
        status = os.stat(name, dir_fd=space, follow_symlinks=False)
    except (FileNotFoundError, PermissionError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _unrenamed(space: int, folder: Path) -> list[str]:
    """Return the names of the files that are still to be renamed from a temporary folder into `folder`.

    There are none if the new files are not complete, if another program has written a newer file or made a folder in
    the place of one of them, or if something is among them that no save makes."""
    ready = _regular(space, _READY)
    if ready is None:
        return []
    names = sorted(name.removesuffix(".new") for name in os.listdir(space) if name.endswith(".new"))
    for name in names:
        if name in ("", ".", "..") or _regular(space, f"{name}.new") is None:
            return []
        with contextlib.suppress(FileNotFoundError):
            place = os.lstat(folder / name)
            if stat.S_ISDIR(place.st_mode) or place.st_mtime_ns > ready.st_mtime_ns:
                return []
    return names


def _swap(paths: list[Path], space: Path) -> None:
    """Rename the new files in `space` into the places of `paths`. On an error the old files are put back."""
    new = {path: space / f"{path.name}.new" for path in paths}
    old = {path: space / f"{path.name}.old" for path in paths if os.path.lexists(path)}
    for path, kept in old.items():
        try:
            os.link(path, kept, follow_symlinks=False)
        except OSError:  # not every file system has links, and a file of another user may not be linked
            shutil.copyfile(path, kept, follow_symlinks=False)
    ready = space / _READY
    try:
        ready.touch()
        for path in paths:
            os.replace(new[path], path)
        _sync(paths[0].parent)
    except BaseException:
        ready.unlink(missing_ok=True)
        for path in paths:
            if os.path.lexists(new[path]):
                continue  # this one was not replaced
            if path in old:
                os.replace(old[path], path)
            else:
                path.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, where its file system can."""
    with contextlib.suppress(OSError):  # the files themselves are whole and in place, whatever happens here
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
