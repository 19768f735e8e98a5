"""The folder that engine and sidecar share: its default path, who may use it, and one lock for each role.

Engine and sidecar obey what they read there, so both check the same: a real folder, owned by the effective user (for root too),
that no other user can enter (mode & 077 = 0). Files in it are opened without following a link, and must be regular, owned by the
same user and closed to others.

A role is held by one process at a time, by an exclusive flock on `{role}.lock`. The lock belongs to the open file: the kernel
releases it when the process ends, however it ends. It works across containers that share the folder, where process ids do not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

Role = Literal["engine", "sidecar"]

MEMORY = Path("/dev/shm")
DEFAULT_SERVER_PORT = 30000
"""SGLang's default port."""
LOCK_ATTEMPTS = 20
LOCK_PAUSE_S = 0.05
"""A process that is killed may need some time to end, and `role_is_held` holds a lock for microseconds: together 1 s."""
LONGEST_NOTE = 64
LONGEST_RANK = 4
"""Digits of a data-parallel rank."""
_DP_RANK = "dp-"
_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def default_runtime_dir(server_port: int = DEFAULT_SERVER_PORT, user: int | None = None) -> Path:
    """Return the default folder of a server, by user id (None: the effective user) and server port."""
    return MEMORY / f"adaptive-spec-{os.geteuid() if user is None else user}-{server_port}"


def server_port_of(flags: Sequence[str], default: int = DEFAULT_SERVER_PORT) -> int:
    """Return the port among the flags of a server, `--port N` or `--port=N`; the last one counts."""
    port = default
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        text = following if flag == "--port" else flag.removeprefix("--port=") if flag.startswith("--port=") else ""
        if text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= 65_535:
            port = int(text)
    return port


def server_port_of_folder(folder: Path) -> int | None:
    """Return the port of the server whose default folder it is; None for another folder."""
    port = folder.name.rpartition("-")[2]
    right = port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65_535
    return int(port) if right and folder == default_runtime_dir(int(port)) else None


def default_runtime_dirs() -> dict[int, Path]:
    """Return the existing default folders of this user, by server port, ascending."""
    prefix = default_runtime_dir().name.removesuffix(str(DEFAULT_SERVER_PORT))
    found: dict[int, Path] = {}
    with suppress(OSError):
        for path in MEMORY.glob(f"{prefix}*"):
            port = server_port_of_folder(path)
            if port is not None:
                found[port] = path
    return dict(sorted(found.items()))


def dp_rank_dir(folder: Path, rank: int) -> Path:
    """Return the folder of a data-parallel rank of the server that has a folder."""
    return folder / f"{_DP_RANK}{rank}"


def dp_rank_dirs(folder: Path) -> dict[int, Path]:
    """Return the existing folders of data-parallel ranks in a server's folder, by rank, ascending. Raises nothing."""
    found: dict[int, Path] = {}
    with suppress(OSError):
        for path in folder.glob(f"{_DP_RANK}*"):
            rank = path.name.removeprefix(_DP_RANK)
            if rank.isascii() and rank.isdigit() and len(rank) <= LONGEST_RANK:
                found[int(rank)] = path
    return dict(sorted(found.items()))


def make_runtime_dir(folder: Path) -> None:
    """Create the folder, mode 0700, with its parents, and check it. Raises OSError, see `check_runtime_dir`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_runtime_dir(folder)


def check_runtime_dir(folder: Path | str) -> None:
    """Raise PermissionError or NotADirectoryError, with the reason as strerror, unless only this user can use the folder."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "another file"
        raise NotADirectoryError(errno.ENOTDIR, f"must be your own folder with mode 0700, got {kind}", str(folder))
    _check_private(status, folder, "folder with mode 0700")


def check_own_file(descriptor: int, path: Path | str) -> os.stat_result:
    """Return the status of an open file. Raises PermissionError, with a reason, unless it is regular and private."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise PermissionError(errno.EPERM, "must be a regular file", str(path))
    _check_private(status, path, "file with mode 0600")
    return status


def _check_private(status: os.stat_result, path: Path | str, wanted: str) -> None:
    if status.st_uid != os.geteuid():
        reason = f"must be your own {wanted}, got one of user {status.st_uid} (this is user {os.geteuid()})"
        raise PermissionError(errno.EPERM, reason, str(path))
    if status.st_mode & 0o077:
        use = "write to it" if status.st_mode & 0o022 else "read it"
        reason = f"other users can {use}; must be your own {wanted}, got mode {stat.S_IMODE(status.st_mode):04o}"
        raise PermissionError(errno.EPERM, reason, str(path))


class RoleLock:
    """A role that its owner holds until `release`, garbage collection or the process's end. A forked child does not keep it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use a locked file. Callers use `acquire`."""
        self.path = path
        self._descriptor = descriptor
        _held.add(self)

    @classmethod
    def acquire(cls, folder: Path, role: Role, attempts: int = LOCK_ATTEMPTS) -> RoleLock:
        """Take a role in a folder that was checked. attempts: of taking it, LOCK_PAUSE_S apart.

        Raises BlockingIOError, with one line as strerror, when it is held already, also by this process; another OSError when
        the lock file cannot be used.
        """
        path = folder / f"{role}.lock"
        spare = _spare.pop(path.absolute(), None)
        if spare is not None and spare.in_place:
            return spare
        for attempt in range(attempts):
            if attempt:
                time.sleep(LOCK_PAUSE_S)
            try:
                descriptor = _open_lock(path)
            except (
                OSError
            ) as error:  # a link, a folder, a pipe, a file that others can use: the folder itself may be as it must be
                raise OSError(error.errno, f"{path.name}: {error.strerror}", str(path)) from error
            try:
                status = os.fstat(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, status):
                    _note(descriptor)
                    return cls(path, descriptor)
            except BlockingIOError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # held by another process, or deleted before it was locked
        holder = role_holder(folder, role)
        raise BlockingIOError(errno.EAGAIN, f"another {role} uses this folder{f' (pid {holder})' if holder else ''}", str(folder))

    @property
    def in_place(self) -> bool:
        """Whether the locked file is still the one at its path: if it was deleted, another process could take the role.

        Another mode than 0600 is set back: with it, nobody would see that the role is held.
        """
        try:
            status = os.fstat(self._descriptor)
            if stat.S_IMODE(status.st_mode) != 0o600:
                os.fchmod(self._descriptor, 0o600)
            return _is_at(self.path, status)
        except OSError:
            return False

    def release(self) -> None:
        """Give the role up. The file stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def _open_lock(path: Path) -> int:
    """Open a lock file, which must be regular and private; it is made where there is none. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _OPEN, 0o600)
    try:
        check_own_file(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


_held: weakref.WeakSet[RoleLock] = weakref.WeakSet()
"""The locks of this process."""
_spare: dict[Path, RoleLock] = {}
"""Locks that `ensure_role` took, by path. The next `acquire` of the path gets them."""


def ensure_role(folder: Path, role: Role) -> None:
    """Hold a role until the process ends, unless a part of this process holds it already. Waits for nothing.

    Raises BlockingIOError when another process holds it, another OSError, as `RoleLock.acquire`.
    """
    path = (folder / f"{role}.lock").absolute()
    if not any(lock.path.absolute() == path and lock.in_place for lock in list(_held)):
        _spare.pop(path, None)
        _spare[path] = RoleLock.acquire(folder, role, attempts=1)


def _forget_roles() -> None:
    """In a forked child: an flock belongs to the open file, so it would outlive the parent in the child's copy."""
    _spare.clear()
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_roles)


def role_is_held(folder: Path, role: Role) -> bool | None:
    """Return whether a process holds a role; None when the folder has no usable lock file: nobody ever held it there."""
    path = folder / f"{role}.lock"
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    except OSError:
        return None
    try:
        check_own_file(descriptor, path)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def remove_temporary_files(folder: Path, names: tuple[str, ...], older_than_s: float = 0.0) -> int:
    """Delete `.NAME.*.tmp` that a killed process left behind, for some names; return how many. Raises nothing.

    Only for a process that alone writes files of these names, or with an age that no writer reaches.
    """
    removed = 0
    for name in names:
        with suppress(OSError):
            for path in folder.glob(f".{name}.*.tmp"):
                with suppress(OSError):
                    if time.time() - path.lstat().st_mtime >= older_than_s:
                        path.unlink()
                        removed += 1
    return removed


def _is_at(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), status)
    except OSError:
        return False


def _note(descriptor: int) -> None:
    """Leave the process id in the lock file, for the message of a process that is refused."""
    with suppress(OSError):  # a full disk must not keep a process from its role
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)


def role_holder(folder: Path, role: Role) -> int:
    """Return the process id that the last holder of a role noted, in its own PID namespace; 0 when there is none."""
    try:
        descriptor = os.open(folder / f"{role}.lock", os.O_RDONLY | _OPEN)
    except OSError:
        return 0
    try:
        text = os.read(descriptor, LONGEST_NOTE).decode("ascii", "replace").strip()
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return int(text) if text.isascii() and text.isdigit() else 0
