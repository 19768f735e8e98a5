"""The profile store: replicas of the same (model, GPU, TP degree) start from each other's profiles, without a sweep.

    {profile_store}/{model}_{gpu}_tp{N}/{milliseconds}-{host}-{random}.npz

The store is any place that fsspec supports: a shared volume, an object storage. A profile is one immutable object, an archive
(`archive.py`) with both models: a writer adds a newer object and removes all but the newest 8. So writers need no lock, and a
reader that finds an object damaged, incomplete, of another engine or removed takes the next. The newest valid one is used.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_spec.config.shown import hide, secrets_of, url_without_secrets
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.errors import BadInput, one_line
from adaptive_spec.regular_file import read_regular_file
from adaptive_spec.storage.archive import ArchiveError, archive_bytes, parse_archive, write_atomically
from adaptive_spec.storage.profile import CALIBRATION, LATENCY_MODEL, Profile, ProfileError, difference_of, identity_meta
from adaptive_spec.storage.signature import check_signature, signed

KIND = "profile"
KEPT = 8
"""Profiles of one engine that a writer leaves in the store."""
LISTINGS = 3
"""Times a reader lists the store when profiles are removed while it reads."""
LARGEST_BYTES = 64 << 20
"""Larger objects are not read."""
LONGEST_REASON = 300
OPEN_PATIENCE_S = 5.0
"""Seconds a start waits for a storage that connects when it is opened (FTP, SFTP, SMB). A wrong URL is known at once."""
FUTURE_S = 300.0
"""Seconds a writer's clock may be ahead of the reader's; profiles dated later are ignored."""
SHARED_MODE = 0o644
"""Replicas may run as other users."""
_NAME = re.compile(r"(\d{13})-[A-Za-z0-9.-]+\.npz")

log = logging.getLogger(__name__)


class StoredProfile(NamedTuple):
    """A profile and when it was written, Unix seconds."""

    written_s: float
    profile: Profile


class ProfileStore:
    """Reads and writes a store. Calls block as long as the storage does: `profile_store_worker` calls them in a thread.

    key: signs what is saved, and only what is signed with it is loaded; None: without signatures.
    Raises BadInput when the URL is not supported, or fsspec or its package for this storage is not installed. A storage that
    cannot be reached is not an error here: it is opened again by the next call.
    """

    def __init__(self, url: str, key: bytes | None = None) -> None:
        self._url = url
        self.shown = url_without_secrets(url)
        self._secrets = secrets_of(url)
        self._key = key
        allowed = "must be a URL that fsspec supports, like file:///mnt/profiles or s3://bucket/profiles"
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise BadInput(
                f"profile_store: {self.shown!r}: fsspec is not installed: "
                "install the extra 'store' (pip install '.[store]' in a checkout)"
            ) from error
        self._url_to_fs = url_to_fs
        self._files: Any = None
        wrong: list[Exception] = []

        def open_now() -> None:
            try:
                self._open()
            except Exception as error:  # each storage's package has its own errors
                wrong.append(error)

        # In a thread, and a daemon: some storages connect when they are opened, and an address may never answer.
        opening = threading.Thread(target=open_now, name="profile store opens", daemon=True)
        opening.start()
        opening.join(OPEN_PATIENCE_S)
        if wrong and not _not_reached(wrong[0]):
            raise BadInput(f"profile_store: {self.shown!r}: {self.reason(wrong[0])}; {allowed}") from wrong[0]
        if wrong or opening.is_alive():
            why = self.reason(wrong[0]) if wrong else f"no answer within {OPEN_PATIENCE_S:g} s"
            log.warning("profile store %s: cannot be reached: %s; going on without it, and trying again later", self.shown, why)

    def _open(self) -> None:
        """Open the storage. Raises what its package raises."""
        files, root = self._url_to_fs(self._url)
        protocols = files.protocol
        self._local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        self._root = root.rstrip("/")
        self._files = files

    def _ensure_open(self) -> None:
        if self._files is None:
            self._open()

    def drop_connection(self) -> None:
        """Open the storage again at the next call: after a failure its connection may be gone. Raises nothing."""
        files, self._files = self._files, None
        with contextlib.suppress(Exception):
            if files is not None:
                type(files).clear_instance_cache()  # fsspec would return the same object, with the same connection

    def reason(self, error: BaseException) -> str:
        """Return the message of an error on one line, without the secrets of the URL."""
        return hide(one_line(error), self._secrets)[:LONGEST_REASON]

    def save(self, info: EngineInfo, profile: Profile, now_s: float) -> str:
        """Add a profile and remove those beyond the newest KEPT. now_s: Unix seconds. Returns its path. Raises OSError."""
        self._ensure_open()
        data = archive_bytes(KIND, _flat(profile), identity_meta(info))
        folder = f"{self._root}/{info.profile_name}"
        host = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname())[:63]
        path = f"{folder}/{int(1000 * now_s):013d}-{host}-{secrets.token_hex(4)}.npz"
        if self._key is not None:
            data = signed(data, _name(path), self._key)
        self._files.makedirs(folder, exist_ok=True)
        if self._local:
            write_atomically(Path(path), data, SHARED_MODE)
        else:
            self._files.pipe_file(path, data)  # object storages write atomically; everything is checked when it is read
        self._prune(folder, now_s)
        return path

    def load(self, info: EngineInfo, now_s: float, usable: Callable[[Profile], object]) -> StoredProfile | None:
        """Return the newest profile that is valid, of this engine, and for which `usable` raises no ValueError; None without one.

        now_s: Unix seconds. Raises OSError when the store cannot be listed.
        """
        self._ensure_open()
        tried: set[str] = set()
        for _ in range(LISTINGS):
            gone = False
            for written_s, path in self._listed(f"{self._root}/{info.profile_name}", now_s):
                if path in tried:
                    continue
                tried.add(path)
                try:
                    profile = self._read(path, info)
                    usable(profile)
                except FileNotFoundError:
                    gone = True  # a writer removed it, so there are newer ones
                    continue
                except Exception as error:  # whatever a file holds, it is passed over and the next one is tried
                    log.warning("profile %s in the store: cannot be used: %s", _name(path), self.reason(error))
                    continue
                return StoredProfile(written_s, profile)
            if not gone:
                break
        return None

    def _read(self, path: str, info: EngineInfo) -> Profile:
        data = self._content(path)
        if self._key is not None:
            check_signature(data, _name(path), self._key)
        archive = parse_archive(data, KIND, _name(path))
        if difference := difference_of(archive.meta, info):
            raise ProfileError(f"it is of another engine: {difference}")
        return _unflat(archive.arrays)

    def _content(self, path: str) -> bytes:
        if self._local:
            return read_regular_file(Path(path), LARGEST_BYTES).data
        size = self._files.size(path)
        if size is not None and size > LARGEST_BYTES:
            raise ProfileError(f"size must be at most {LARGEST_BYTES} bytes, got {size}")
        # The size may be unknown, or another one by now: ask for one byte more than is allowed, to see whether there is more.
        data: bytes = self._files.cat_file(path, start=0, end=LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise ProfileError(f"size must be at most {LARGEST_BYTES} bytes")
        return data

    def _listed(self, folder: str, now_s: float) -> list[tuple[float, str]]:
        """Return (Unix seconds, path) of the objects named like profiles, newest first; none dated after now_s + FUTURE_S."""
        self._files.invalidate_cache(folder)
        try:
            names: Iterable[str] = self._files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        found = [(int(match[1]) / 1e3, path) for path in names if (match := _NAME.fullmatch(path.rsplit("/", 1)[-1]))]
        return sorted((entry for entry in found if entry[0] <= now_s + FUTURE_S), reverse=True)

    def _prune(self, folder: str, now_s: float) -> None:
        # Those dated after now do not count: with eight of them, whoever writes there would have every new profile removed.
        dated = [path for written_s, path in self._listed(folder, now_s) if written_s <= now_s + 0.001]
        for path in dated[KEPT:]:
            try:
                self._files.rm_file(path)
            except OSError as error:  # another writer removed it, or it is another user's: the next writer tries again
                log.debug("profile %s was not removed from the store: %s", _name(path), self.reason(error))


def _not_reached(error: Exception) -> bool:
    """Whether the storage did not answer or answered no: the URL may be right. Others come from a wrong URL or package."""
    wrong = ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError, IsADirectoryError
    return not isinstance(error, (*wrong, NotADirectoryError, FileNotFoundError, PermissionError))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _flat(profile: Profile) -> dict[str, Any]:
    return {
        f"{kind}.{name}": array
        for kind, arrays in ((LATENCY_MODEL, profile.latency), (CALIBRATION, profile.calibration))
        for name, array in arrays.items()
    }


def _unflat(arrays: dict[str, Any]) -> Profile:
    parts: dict[str, dict[str, Any]] = {LATENCY_MODEL: {}, CALIBRATION: {}}
    for name, array in arrays.items():
        kind, _, rest = name.partition(".")
        if kind not in parts:
            raise ArchiveError(f"array {name!r}: not part of a profile")
        parts[kind][rest] = array
    return Profile(parts[LATENCY_MODEL], parts[CALIBRATION])
