"""Archives: named arrays in one npz file, versioned, checksummed, replaced whole or not at all. Never pickled.

An archive holds one extra entry, `header`: UTF-8 JSON with format, version, kind, meta and the SHA-256 of all the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_spec.domain.arrays import AnyArray, Arrays
from adaptive_spec.errors import one_line

FORMAT = "adaptive-spec"
FORMAT_VERSION = 1
_HEADER = "header"
_PREFIX = "array/"


class ArchiveError(ValueError):
    """The file is no archive, is damaged, or is of another kind or version; the message says which, on one line."""


class Archive(NamedTuple):
    """What an archive holds. `meta`: small JSON values about it."""

    arrays: dict[str, AnyArray]
    meta: dict[str, Any]


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file under a temporary name in its folder and rename it. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
    """Write arrays of any plain dtype. Raises OSError, and TypeError for arrays of Python objects."""
    write_atomically(path, archive_bytes(kind, arrays, meta))


def archive_bytes(kind: str, arrays: Arrays, meta: Mapping[str, Any] | None = None) -> bytes:
    """Return what `save_archive` writes. Raises TypeError for arrays of Python objects."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects")
    header = {"format": FORMAT, "version": FORMAT_VERSION, "kind": kind, "meta": dict(meta or {})}
    header["sha256"] = _digest(header, arrays)
    stored: dict[str, Any] = {_PREFIX + name: array for name, array in arrays.items()}
    stored[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stored)
    return buffer.getvalue()


def load_archive(path: Path, kind: str) -> Archive:
    """Read an archive whole and check it. Raises ArchiveError when it cannot be trusted, FileNotFoundError when missing."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArchiveError(f"{path.name} is damaged: {one_line(error)}") from error
    return parse_archive(data, kind, path.name)


def parse_archive(data: bytes, kind: str, name: str) -> Archive:
    """Check and read what `archive_bytes` made; `name` begins the message. Raises ArchiveError when it cannot be trusted."""
    try:
        # Through zipfile and not np.load, whose object of a damaged file complains again when it is collected.
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = {entry.removesuffix(".npy") for entry in file.namelist()}
            if _HEADER not in entries:
                raise ArchiveError(f"{name} was not written by adaptive-spec")
            header = json.loads(_entry(file, _HEADER).tobytes())
            arrays = {entry.removeprefix(_PREFIX): _entry(file, entry) for entry in entries - {_HEADER}}
    except ArchiveError:
        raise
    except Exception as error:  # a damaged zip fails in a dozen ways: ValueError, BadZipFile, zlib.error, struct.error, ...
        raise ArchiveError(f"{name} is damaged: {one_line(error)}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ArchiveError(f"{name} was not written by adaptive-spec")
    if header.get("version") != FORMAT_VERSION:
        raise ArchiveError(f"{name} has format version {header.get('version')}, this program reads {FORMAT_VERSION}")
    if header.get("kind") != kind:
        raise ArchiveError(f"{name} holds {header.get('kind')!r}, not {kind!r}")
    told = header.pop("sha256", None)
    if told != _digest(header, arrays):
        raise ArchiveError(f"{name} is damaged: its checksum does not fit")
    return Archive(arrays, header["meta"])


def _entry(file: zipfile.ZipFile, name: str) -> AnyArray:
    with file.open(f"{name}.npy") as entry:
        array: AnyArray = np.lib.format.read_array(entry, allow_pickle=False)
    return array


def _digest(header: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
