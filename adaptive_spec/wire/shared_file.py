"""Files that two processes share: complete from the moment they are visible, private to the user, used by pread and pwrite.

They are not mapped. A mapped page beyond the end of a file that somebody truncates (`cp x policy.page` does) ends the process
that touches it, here the LLM server; a pread of it is short, and that is an error like any other.

A file is filled under a temporary name in the same folder and then gets its own, so that no process sees an incomplete header.
Its blocks are allocated at creation, where there is time for it: a full /dev/shm is an OSError there, not at each record.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import shutil
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from adaptive_spec.runtime_folder import check_own_file

WEAKLY_ORDERED = platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686")
"""Whether this machine may reorder stores (ARM does): then a fence is needed between a content and the word that announces it."""

_fence_lock = threading.Lock()

log = logging.getLogger(__name__)

OWN_MODE = 0o600
KEPT_ASIDE = 3
"""Files set aside of one name: the folder is often in memory."""


class ForeignFileError(ValueError):
    """The file is whole for all that can be known, and was written by another program or another version of this one."""


class Closeable(ABC):
    """Base of what a `with` block closes at its end."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Identity(NamedTuple):
    """Which file a path leads to. The inode of an open file is not reused."""

    device: int
    inode: int


class SharedFile:
    """An open file of a fixed size. descriptor: -1 once it is closed. size: bytes, when it was opened."""

    def __init__(self, descriptor: int, status: os.stat_result) -> None:
        """Own an open descriptor."""
        self.descriptor = descriptor
        self.size = status.st_size
        self.identity = _identity(status)

    def read(self, length: int, offset: int) -> bytes:
        """Return exactly `length` bytes. Raises ValueError when the file has become shorter, OSError."""
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise ValueError(f"file: must have at least {offset + length} bytes, got {offset + len(data)}")
        return data

    def write(self, data: bytes, offset: int) -> None:
        """Write all of `data`. Raises OSError, also when the file system takes only a part."""
        if os.pwrite(self.descriptor, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def is_whole_at(self, path: Path | str) -> bool:
        """Whether the path still leads to this file, which has its size and the mode that others open it with. Raises nothing."""
        try:
            status = os.fstat(self.descriptor)
            whole = status.st_size == self.size and stat.S_IMODE(status.st_mode) == OWN_MODE
            return whole and identity_at(path) == self.identity
        except OSError:
            return False

    def close(self) -> None:
        """Close, and release the lock where there is one."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def fence() -> None:
    """Order the memory accesses before and after: releasing and then acquiring a lock is a full barrier."""
    with _fence_lock:
        pass
    with _fence_lock:
        pass


def create_file(
    path: Path, size: int, parts: Mapping[int, bytes], *, lock: bool = False, replace: bool = True, allocate: bool = True
) -> SharedFile:
    """Create or replace a file of `size` bytes, mode 0600, zero but for `parts`, by offset.

    allocate: take all its blocks now; False: each is taken when it is written, which may fail then. lock: hold an exclusive lock
    on it while it is open. replace: a folder in its place is set aside; False: raise FileExistsError when the path is taken.
    Raises OSError and then leaves no file behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    file = SharedFile(descriptor, os.fstat(descriptor))
    try:
        os.fchmod(descriptor, OWN_MODE)
        if allocate and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        if lock:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.size = size
        for offset, data in parts.items():
            file.write(data, offset)
        if replace:
            replace_file(temporary, path)
        else:
            os.link(temporary, path)
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        file.close()
        raise
    return file


def replace_file(temporary: Path, path: Path) -> None:
    """Give a file its name. A folder that has it is set aside: a file cannot replace it. Raises OSError."""
    try:
        os.replace(temporary, path)
    except IsADirectoryError:
        log.warning("%s: is a folder in place of a file, now %s", path, set_aside(path).name)
        os.replace(temporary, path)


def open_file(path: Path, *, writable: bool = False, lock: bool = False) -> SharedFile:
    """Open an existing file.

    Raises FileNotFoundError (also when it was replaced before it could be locked), BlockingIOError (another process holds the
    lock), PermissionError (another user could have written it), another OSError, or ValueError (not a regular file, or empty).
    O_NONBLOCK: opening a pipe must not block the engine.
    """
    descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        status = check_own_file(descriptor, path)
        if status.st_size == 0:
            raise ValueError("an empty file")
        if lock:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if identity_at(path) != _identity(status):
                raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return SharedFile(descriptor, status)


def identity_at(path: Path | str) -> Identity | None:
    """Return the identity of the file at a path (of a link itself), None when there is no file. Raises no OSError."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return _identity(status)


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a file or folder to `NAME.damaged-N`, N above all others, and return the new path. Raises OSError.

    why: what to call it in place of damaged. The `KEPT_ASIDE` newest stay, the others are deleted.
    """
    prefix = f"{path.name}.{why}-"
    ends = (name.removeprefix(prefix) for name in os.listdir(path.parent) if name.startswith(prefix))
    numbers = sorted(int(end) for end in ends if end.isascii() and end.isdigit() and len(end) < 10)
    target = path.with_name(f"{prefix}{numbers[-1] + 1 if numbers else 1}")
    os.rename(path, target)
    for number in numbers[: -(KEPT_ASIDE - 1)]:
        old = path.with_name(f"{prefix}{number}")
        with suppress(OSError):
            if stat.S_ISDIR(os.lstat(old).st_mode):
                shutil.rmtree(old)
            else:
                old.unlink()
    return target


def make_place(path: Path, *, for_folder: bool = False) -> None:
    """Set a folder aside that lies where a file of ours belongs, which cannot replace it. for_folder: the other way round.

    Raises OSError.
    """
    try:
        folder = stat.S_ISDIR(os.stat(path, follow_symlinks=for_folder).st_mode)
    except OSError:
        if not os.path.lexists(path):
            return
        folder = False  # a link that leads nowhere
    if folder != for_folder:
        log.warning("%s: must be a %s: set aside as %s", path, "folder" if for_folder else "file", set_aside(path).name)


def said_aside(path: Path, why: str = "damaged") -> str:
    """Set a file or folder aside; returns in words, for the log, what was done, or why it could not be. Raises nothing."""
    try:
        return f"set aside as {set_aside(path, why).name}"
    except OSError as error:
        return f"cannot be set aside: {error.strerror or error}"


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino)
