"""Locks of folders and files, by which processes and threads exclude each other."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

_WAIT = 60.0
"""The seconds after which a lock that another process holds is an error."""


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder, or of a file that is made where there is none. Yields whether it is held.

    Processes and threads exclude each other; those with `shared` do so only with those without. The lock of a folder
    leaves no file behind, but on a network file system it holds between processes of one machine only; a file's holds
    between machines too. Warns and goes on without a lock where the folder cannot be opened for reading, or the file
    system has no locks.

    Raises:
        TimeoutError: another process has held the lock for a minute.
        OSError: what is in the place of the file cannot be opened for writing, or is a link.
    """
    folder = path.is_dir()
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not folder:
            why = f"{error.strerror}, so it cannot serve as a lock: make it writable, or remove what is there"
            raise OSError(error.errno, why, str(path)) from error
        if not isinstance(error, PermissionError):
            raise
        _warn_unlocked(path, error)
        yield False
        return
    try:
        held = True
        try:
            _acquire(descriptor, path, shared)
        except TimeoutError:
            raise
        except OSError as error:
            _warn_unlocked(path, error)
            held = False
        yield held
    finally:
        release(descriptor)


def _acquire(descriptor: int, path: Path, shared: bool) -> None:
    """Wait for a lock. It is asked for again and again, because a wait in the kernel could not be ended by a limit."""
    import fcntl  # only Unix has it

    until, pause = time.monotonic() + _WAIT, 0.001
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(
                    errno.ETIMEDOUT,
                    f"another process has held the lock for {_WAIT:g} s; end it, or wait for it and try again",
                    str(path),
                ) from None
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def release(descriptor: int) -> None:
    """Give the lock of what is open as `descriptor` back, and close it."""
    import fcntl

    with contextlib.suppress(OSError):
        # Closing alone would leave the lock to a process that was forked in the meantime and shares the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _warn_unlocked(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path} cannot be locked ({error.strerror}): do not let several processes write there at once",
        RuntimeWarning,
        stacklevel=5,
    )


def try_lock(descriptor: int) -> bool:
    """Take the lock of what is open as `descriptor`, without waiting, and return whether it could be taken."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or no locks on this file system
        return False
    return True
