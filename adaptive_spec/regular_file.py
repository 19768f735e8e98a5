"""Reading a file that another user may have written: regular files only, never waiting, never more than a bound."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple


class FileContent(NamedTuple):
    """data: the whole file. owner: user id. mode: permission bits, 0..0o7777."""

    data: bytes
    owner: int
    mode: int


def read_regular_file(path: Path, largest_bytes: int, *, follow_links: bool = False) -> FileContent:
    """Read a whole file. follow_links: also when the last part of the path is a symbolic link.

    Opening does not block, so a FIFO is refused and not waited for. Raises OSError: ELOOP for a link, EISDIR for a folder,
    EINVAL for any other file that is not regular, EFBIG for one longer than largest_bytes; ValueError for a path with a NUL.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        # The size may change while the file is read, so the bound is on what is read and not on st_size.
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(largest_bytes + 1)
        if len(data) > largest_bytes:
            raise OSError(errno.EFBIG, f"longer than {largest_bytes} bytes", str(path))
        return FileContent(data, status.st_uid, stat.S_IMODE(status.st_mode))
    finally:
        os.close(descriptor)


def read_key(path: Path, largest_bytes: int) -> bytes:
    """Read a file that holds a key, also when the last part of the path is a symbolic link, as in a mounted Secret.

    Raises OSError as `read_regular_file`, and PermissionError, with what must be as strerror, for one that others can read or the
    group can write. The group may read: Kubernetes gives a mounted Secret to the pod's fsGroup.
    """
    return _secret(path, largest_bytes, 0o027, "must not be readable by others nor writable by its group")


def read_token(path: Path, largest_bytes: int) -> bytes:
    """Read a file that holds a token, as `read_key`, but others may read it: many are made with the usual mode 0644."""
    return _secret(path, largest_bytes, 0o022, "must not be writable by others or its group")


def _secret(path: Path, largest_bytes: int, refused: int, wanted: str) -> bytes:
    content = read_regular_file(path, largest_bytes, follow_links=True)
    if content.mode & refused:
        raise PermissionError(errno.EACCES, f"{wanted}, got mode {content.mode:04o}", str(path))
    return content.data
