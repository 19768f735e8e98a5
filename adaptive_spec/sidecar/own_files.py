"""What the sidecar keeps in its runtime folder while it runs, beside the policy page: its role, its address, the control
token and a heartbeat.

What is lost is made again: cleaners of temporary files delete such folders, and people do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path

from adaptive_spec.client.sidecar import ADDRESS_NAME, HEARTBEAT_NAME, TOKEN_NAME, is_token, own_token
from adaptive_spec.engine_side.tap import PAGE_NAME
from adaptive_spec.errors import BadInput
from adaptive_spec.regular_file import read_regular_file, read_token
from adaptive_spec.runtime_folder import RoleLock, make_runtime_dir, remove_temporary_files
from adaptive_spec.storage.archive import write_atomically
from adaptive_spec.wire.shared_file import make_place

CHECKPOINT_NAME = "checkpoint.npz"
LARGEST_TOKEN = 1 << 14

log = logging.getLogger(__name__)


class OwnFiles:
    """The role `sidecar` in a folder, held until `close`; then the address and the token in it.

    token: what `ctl` must send. A file that cannot be written is logged once, and tried again by `keep`: a full disk must not
    keep a sidecar from running.
    """

    def __init__(self, folder: Path, token_file: Path | None) -> None:
        """Take the role. token_file: holds the token; None: one in the folder, made at the first start and kept.

        Raises BadInput when the folder is not this user's alone or has a sidecar, and when the token file cannot be read.
        """
        self.folder = folder
        self._role = _take_role(folder)
        self._url = ""
        self._certfile: Path | None = None
        self._failed = ""
        self._made: set[str] = set()
        """Files that were in place before."""
        try:
            # Of a sidecar that was killed: another program may use its port now.
            make_place(folder / ADDRESS_NAME)
            (folder / ADDRESS_NAME).unlink(missing_ok=True)
            remove_temporary_files(folder, (PAGE_NAME, CHECKPOINT_NAME, ADDRESS_NAME, TOKEN_NAME))
            self._own_token = token_file is None
            self.token = _read_token(token_file) if token_file else own_token(folder / TOKEN_NAME) or secrets.token_urlsafe(32)
            self._write()
        except BaseException:
            self._role.release()
            raise

    def announce(self, url: str, certfile: Path | None = None) -> None:
        """Write the address, for `ctl` and others on this host. certfile: what they trust where the URL is https."""
        self._url, self._certfile = url, certfile
        self._write()

    def keep(self) -> None:
        """Make again what was deleted or damaged. Raises BadInput when another sidecar has taken the folder meanwhile.

        Any other failure is logged once; the next call tries again.
        """
        if not self._role.in_place:
            self._role.release()
            try:
                make_runtime_dir(self.folder)
                self._role = RoleLock.acquire(self.folder, "sidecar")
            except BlockingIOError as error:
                raise BadInput(f"runtime_dir: '{self.folder}': {error.strerror}") from error
            except OSError as error:
                self._log_failure(error)
                return
            log.warning("runtime_dir '%s': was deleted or emptied, and is made again", self.folder)
        self._write()

    def beat(self) -> None:
        """Say that the loop runs, for `adaptive-spec doctor --alive`. Raises nothing."""
        path = self.folder / HEARTBEAT_NAME
        with contextlib.suppress(OSError):  # `keep` logs what is wrong with the folder
            try:
                os.utime(path, follow_symlinks=False)
            except FileNotFoundError:
                path.touch(0o600, exist_ok=False)

    def close(self) -> None:
        """Delete address and heartbeat and give the role up. Raises nothing."""
        try:
            if self._role.in_place:
                (self.folder / ADDRESS_NAME).unlink(missing_ok=True)
                (self.folder / HEARTBEAT_NAME).unlink(missing_ok=True)
        except OSError:
            pass
        self._role.release()

    def _write(self) -> None:
        try:
            if self._own_token:
                self._keep(TOKEN_NAME, self.token.encode() + b"\n", own_token(self.folder / TOKEN_NAME) == self.token)
            if self._url:
                address = json.dumps(self._address()).encode()
                self._keep(ADDRESS_NAME, address, _holds(self.folder / ADDRESS_NAME, address))
        except OSError as error:
            self._log_failure(error)
        else:
            self._failed = ""

    def _keep(self, name: str, content: bytes, in_place: bool) -> None:
        """Make a file unless it is in place. Raises OSError."""
        if not in_place:
            if name in self._made:
                log.warning("%s: was deleted or damaged, and is made again", self.folder / name)
            make_place(self.folder / name)
            write_atomically(self.folder / name, content)
        self._made.add(name)

    def _address(self) -> dict[str, str | int]:
        document: dict[str, str | int] = {"url": self._url, "pid": os.getpid()}
        return document | ({"certfile": str(self._certfile.absolute())} if self._certfile else {})

    def _log_failure(self, error: OSError) -> None:
        reason = error.strerror or str(error)  # the whole text names a temporary file, and is another one each time
        if self._failed != reason:
            self._failed = reason
            log.error("runtime_dir '%s': cannot be written, ctl cannot find this sidecar: %s", self.folder, error.strerror)


def _take_role(folder: Path) -> RoleLock:
    """Make the folder and take the role `sidecar` in it. Raises BadInput when it is not ours alone, or has a sidecar."""
    try:
        make_runtime_dir(folder)
        return RoleLock.acquire(folder, "sidecar")
    except BlockingIOError as error:
        raise BadInput(f"runtime_dir: '{folder}': {error.strerror}; must be a folder of one engine and one sidecar") from error
    except OSError as error:
        wanted = "" if "must be" in (error.strerror or "") else "; must be a writable folder"
        raise BadInput(f"runtime_dir: '{folder}': {error.strerror}{wanted}") from error


def _read_token(path: Path) -> str:
    try:
        token = read_token(path, LARGEST_TOKEN).decode().strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise BadInput(f"control_token_file: '{path}': {reason}") from error
    if not is_token(token):
        raise BadInput(f"control_token_file: '{path}': must contain a token of printable ASCII characters on one line")
    return token


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_regular_file(path, len(data)).data == data
    except OSError:
        return False
