"""Archives: named arrays in one npz file, versioned, checksummed, replaced atomically. Nothing is pickled.

An archive has one extra entry, `header`: UTF-8 JSON with format, version, kind, meta and the SHA-256 of everything else.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_spec.domain.arrays import AnyArray, Arrays
from adaptive_spec.errors import one_line
from adaptive_spec.regular_file import read_regular_file
from adaptive_spec.storage.npz import read_npz

FORMAT = "adaptive-spec"
FORMAT_VERSION = 1
LARGEST_BYTES = 64 << 20
LARGEST_INFLATED = 64 << 20
"""Of a profile or a checkpoint. Those of a server with 1024 token counts are below 1 MB."""
LONGEST_REASON = 200
_HEADER = "header"
_PREFIX = "array/"


class ArchiveError(ValueError):
    """The file is not an archive, is damaged, or has another kind or version. The message is one line."""


class ForeignArchiveError(ArchiveError):
    """The file is whole, and was written by another program or another version, or is of another kind."""


class Archive(NamedTuple):
    """The content of an archive. meta: small JSON values."""

    arrays: dict[str, AnyArray]
    meta: dict[str, Any]


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file under a temporary name in its folder, then rename it. Raises OSError and then leaves no file behind."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_archive(path: Path, kind: str, arrays: Arrays, meta: Mapping[str, Any] | None = None) -> None:
    """Write arrays of any dtype without Python objects. Raises OSError, and TypeError for arrays of Python objects."""
    write_atomically(path, archive_bytes(kind, arrays, meta))


def archive_bytes(kind: str, arrays: Arrays, meta: Mapping[str, Any] | None = None) -> bytes:
    """Return the bytes that `save_archive` writes. Raises TypeError for arrays of Python objects."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r}: must not contain Python objects")
    header = {"format": FORMAT, "version": FORMAT_VERSION, "kind": kind, "meta": dict(meta or {})}
    header["sha256"] = _digest(header, arrays)
    stored: dict[str, Any] = {_PREFIX + name: array for name, array in arrays.items()}
    stored[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stored)
    return buffer.getvalue()


def load_archive(
    path: Path,
    kind: str,
    *,
    largest_bytes: int = LARGEST_BYTES,
    largest_inflated: int = LARGEST_INFLATED,
    follow_links: bool = False,
    own: bool = False,
) -> Archive:
    """Read and check an archive. Raises ArchiveError when it is not valid, FileNotFoundError when there is no file.

    Only a regular file is read; follow_links: also by way of a symbolic link; own: only one of the effective user.
    """
    try:
        data, owner, _ = read_regular_file(path, largest_bytes, follow_links=follow_links)
        if own and owner != os.geteuid():
            raise PermissionError(errno.EPERM, f"it is of user {owner}, and other users can write to its folder")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArchiveError(f"{path.name} cannot be read: {error.strerror or one_line(error)}") from error
    return parse_archive(data, kind, path.name, largest_inflated)


def parse_archive(data: bytes, kind: str, name: str, largest_inflated: int = LARGEST_INFLATED) -> Archive:
    """Check and read the bytes of an archive. Raises ArchiveError, whose message begins with `name`, when it is not valid."""
    try:
        # read_npz and not np.load: for a damaged file, np.load's object raises again when it is garbage-collected.
        entries = read_npz(data, largest_inflated)
        if _HEADER not in entries:
            raise ForeignArchiveError(f"{name} was not written by adaptive-spec")
        header = json.loads(entries.pop(_HEADER).tobytes())
        arrays = {entry.removeprefix(_PREFIX): array for entry, array in entries.items()}
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ForeignArchiveError(f"{name} was not written by adaptive-spec")
        if header.get("version") != FORMAT_VERSION:
            raise ForeignArchiveError(f"{name}: format version must be {FORMAT_VERSION}, got {_short(header.get('version'))}")
        if header.get("kind") != kind:
            raise ForeignArchiveError(f"{name}: kind must be {kind!r}, got {_short(header.get('kind'))}")
        stated = header.pop("sha256", None)
        if stated != _digest(header, arrays):
            raise ArchiveError(f"{name} is damaged: checksum does not match")
        if not isinstance(header.get("meta"), dict):
            raise ArchiveError(f"{name} is damaged: no meta")
    except ArchiveError:
        raise
    except Exception as error:  # a damaged zip file raises ValueError, BadZipFile, zlib.error, struct.error, RecursionError, ...
        raise ArchiveError(f"{name} is damaged: {one_line(error)[:LONGEST_REASON]}") from error
    return Archive(arrays, header["meta"])


def _short(value: object) -> str:
    return repr(value)[:LONGEST_REASON]


def _digest(header: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
