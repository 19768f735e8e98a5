"""Files that two processes map: complete from the moment they are visible, and private to the user.

A file is filled under a temporary name in the same folder and renamed, so that no process maps an incomplete header. Its pages
are allocated and touched at creation: a full /dev/shm is then an OSError here and not a SIGBUS at the first write, and a decode
step has no page fault. A process that truncates a file while others map it would crash them; nothing in this package does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from adaptive_spec.runtime_folder import check_own_file

WEAKLY_ORDERED = platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686")
"""Whether this machine may reorder stores (ARM does): then a sequence lock needs a fence between sequence and content."""

_fence_lock = threading.Lock()


class Closeable(ABC):
    """Base of what a `with` block closes at its end."""

    @abstractmethod
    def close(self) -> None:
        """Release the mapping."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Identity(NamedTuple):
    """Which file a path leads to. The inode of a mapped file is not reused while it is mapped."""

    device: int
    inode: int


def fence() -> None:
    """Order the memory accesses before and after: releasing and then acquiring a lock is a full barrier."""
    with _fence_lock:
        pass
    with _fence_lock:
        pass


def create_mapped(path: Path, size: int, fill: Callable[[mmap.mmap], None], *, lock: bool = False) -> tuple[mmap.mmap, Identity]:
    """Create or replace a file of `size` zero bytes, mode 0600, and fill it before it is visible under its name.

    lock: hold an exclusive lock on it while it is mapped. Raises OSError and then leaves no file behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
        if lock:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        fill(mapping)
        os.replace(temporary, path)
        return mapping, _identity(os.fstat(fd))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)  # the mapping has a duplicate of the descriptor, which keeps the lock


def open_mapped(path: Path, *, writable: bool = False, lock: bool = False) -> tuple[mmap.mmap, Identity]:
    """Map a whole existing file.

    Raises FileNotFoundError, BlockingIOError (another process holds the lock), PermissionError (another user could have written
    it), another OSError, or ValueError (not a regular file, or empty). O_NONBLOCK: opening a pipe must not block the engine.
    """
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        check_own_file(fd, path)
        if lock:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mapping = mmap.mmap(fd, status.st_size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        return mapping, _identity(status)
    finally:
        os.close(fd)


def identity_at(path: Path | str) -> Identity | None:
    """Return the identity of the file at a path, None when there is no file. Raises no OSError."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _identity(status)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `NAME.damaged-N` (first free N) in its folder and return the new path. Raises OSError."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.rename(path, target)
    return target


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino)
