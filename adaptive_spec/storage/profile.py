"""Profiles: the models of one (model, GPU, TP degree) on disk, so that the next server needs no sweep.

    {profile_dir}/{model}_{gpu}_tp{N}/latency_model.npz  calibration.npz  policy.json  plots/

Each file is written atomically and has a version and a checksum.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_spec.domain.arrays import AnyArray
from adaptive_spec.domain.engine_info import EngineInfo, fingerprint_of
from adaptive_spec.domain.policy import Granularity
from adaptive_spec.errors import BadInput, one_line
from adaptive_spec.regular_file import read_regular_file
from adaptive_spec.runtime_folder import remove_temporary_files
from adaptive_spec.storage.archive import ArchiveError, ForeignArchiveError, load_archive, save_archive, write_atomically

LATENCY_MODEL = "latency_model"
CALIBRATION = "calibration"
POLICY_VERSION = 1
LONGEST_SHOWN = 120
PLOTS = "plots"
PROFILE_FILES = (f"{LATENCY_MODEL}.npz", f"{CALIBRATION}.npz", "policy.json")
TEMPORARY_AGE_S = 3600.0
"""Several sidecars may share a profile folder: a temporary file of this age is nobody's. Writing one takes milliseconds."""
MOST_OTHERS = 8
LARGEST_POLICY_BYTES = 4 << 20
"""The table of a server with 1024 requests is about 100 KB."""


class Profile(NamedTuple):
    """The arrays of the two models, by name."""

    latency: dict[str, AnyArray]
    calibration: dict[str, AnyArray]


class ProfileError(ValueError):
    """A profile that is damaged. The message is one line."""


class ForeignProfileError(ProfileError):
    """A profile of another engine, or in files of another program or version."""


def check_writable(profile_dir: Path) -> None:
    """Create the profile folder if it is missing, and delete what a killed process left there.

    Raises BadInput when it is not writable. A full disk is no reason: there may be space when a profile is written.
    """
    try:
        profile_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=profile_dir):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"profile_dir: '{profile_dir}': {error.strerror}; must be a writable folder") from error
    for folder in (profile_dir, *(path for path in profile_dir.glob("*") if path.is_dir() and not path.is_symlink())):
        remove_temporary_files(folder, PROFILE_FILES, TEMPORARY_AGE_S)


def load_profile(folder: Path, info: EngineInfo) -> Profile | None:
    """Read a profile; None when there is none. Raises ProfileError: damaged; ForeignProfileError: another engine's."""
    if not folder.is_dir() or not any((folder / f"{kind}.npz").exists() for kind in (LATENCY_MODEL, CALIBRATION)):
        return None
    own = others_can_write(folder) or others_can_write(folder.parent)
    arrays = []
    for kind in (LATENCY_MODEL, CALIBRATION):
        try:
            archive = load_archive(folder / f"{kind}.npz", kind, own=own)
        except FileNotFoundError as error:
            raise ProfileError(f"{kind}.npz is missing") from error
        except ArchiveError as error:
            kind_of_error = ForeignProfileError if isinstance(error, ForeignArchiveError) else ProfileError
            raise kind_of_error(str(error)) from error
        if difference := difference_of(archive.meta, info):
            raise ForeignProfileError(f"{kind}.npz is of another engine: {difference}")
        arrays.append(archive.arrays)
    _check_policy_file(folder / "policy.json")
    return Profile(*arrays)


def others_can_write(folder: Path) -> bool:
    """Whether other users can put files into a folder. Raises OSError.

    A group that can is not another user, and an owner's number is not compared except by root, who alone can write to a
    folder that is not its own: on shared file systems it may be another one here.
    """
    status = folder.stat()
    return bool(status.st_mode & 0o002) or (os.geteuid() == 0 and status.st_uid != 0)


def written_s(folder: Path) -> float:
    """When a profile was last written, Unix seconds; minus infinity when there is none."""
    try:
        return (folder / "policy.json").stat().st_mtime
    except OSError:
        return float("-inf")


def save_profile(folder: Path, info: EngineInfo, profile: Profile, policy: Mapping[str, Any]) -> None:
    """Write a profile, file by file. policy: the JSON form of the policy, with `candidates` and `table`. Raises OSError."""
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    meta = identity_meta(info)
    save_archive(folder / f"{LATENCY_MODEL}.npz", LATENCY_MODEL, profile.latency, meta)
    save_archive(folder / f"{CALIBRATION}.npz", CALIBRATION, profile.calibration, meta)
    content = {"format_version": POLICY_VERSION, **meta, "policy": policy}
    document = {**content, "sha256": _checksum(content)}
    write_atomically(folder / "policy.json", (json.dumps(document, indent=1) + "\n").encode())
    _link(folder, info.readable_name)


def other_profiles(folder: Path, info: EngineInfo) -> list[str]:
    """Say of each profile beside `folder` that has the engine's model, GPU and TP degree in its name why it is not the engine's.

    At most MOST_OTHERS, for the log. Raises nothing.
    """
    found: list[str] = []
    for path in sorted(folder.parent.glob(f"{glob.escape(info.readable_name)}*")):
        if path == folder or path.is_symlink() or len(found) == MOST_OTHERS:
            continue
        with suppress(Exception):  # whatever lies there
            _check_policy_file(path / "policy.json")
            found.append(f"{path.name}: {difference_of(json.loads(_policy_text(path / 'policy.json')), info)}")
    return found


def _link(folder: Path, name: str) -> None:
    """Let `name`, without the hash, lead to the newest profile of it, unless it is a folder of its own. Raises nothing."""
    link = folder.parent / name
    if link == folder or (os.path.lexists(link) and not link.is_symlink()):
        return
    with suppress(OSError):  # a file system without links
        if not link.is_symlink() or os.readlink(link) != folder.name:
            temporary = link.with_name(f".{name}.{os.getpid()}.tmp")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(folder.name)
            os.replace(temporary, link)


def profiled_engine(folder: Path) -> EngineInfo:
    """Return what a profile knows of its engine; other fields have placeholders. Raises ProfileError."""
    _check_policy_file(folder / "policy.json")
    document = json.loads(_policy_text(folder / "policy.json"))
    found = re.fullmatch(r"(\S+) (.+) tp(\d+)", str(document.get("engine")))
    if found is None:
        raise ProfileError(f"policy.json is damaged: engine {_short(document.get('engine'))}")
    # The identity has no mark between model and GPU. Cut anywhere, it is the same identity again.
    model, _, gpu = found[2].partition(" ")
    parts = document.get("fingerprint", {})
    fingerprint = fingerprint_of(parts) if isinstance(parts, dict) else ()
    try:
        candidates, max_batch = tuple(document["policy"]["candidates"]), len(document["policy"]["table"]) - 1
        return EngineInfo(
            found[1], model, gpu, int(found[3]), candidates[0], candidates, max_batch, Granularity.BATCH, False, 0,
            fingerprint=fingerprint,
        ).checked()  # fmt: skip
    except (LookupError, TypeError, ValueError) as error:
        raise ProfileError(f"policy.json is damaged: {one_line(error)[:LONGEST_SHOWN]}") from error


def identity(info: EngineInfo) -> str:
    """What models and engine must have in common: engine name, model, GPU and TP degree."""
    return f"{info.name} {info.model} {info.gpu} tp{info.tp}"


def identity_meta(info: EngineInfo) -> dict[str, Any]:
    """Return what an archive's meta data says of the engine whose models are in it."""
    return {"engine": identity(info), "fingerprint": dict(info.fingerprint)}


def difference_of(meta: Mapping[str, Any], info: EngineInfo) -> str:
    """Return in which field the engine of an archive is not this one, one line; "" when they are the same."""
    if meta.get("engine") != identity(info):
        return _short(meta.get("engine", "unknown"))
    stated, own = meta.get("fingerprint", {}), dict(info.fingerprint)
    if not isinstance(stated, dict):
        return "its fingerprint is damaged"
    for field in sorted({*map(str, stated), *own}):
        if stated.get(field) != own.get(field):
            return f"{_short(field)}: must be {_short(own.get(field))}, got {_short(stated.get(field))}"
    return ""


def _short(value: object) -> str:
    return str(value)[:LONGEST_SHOWN] if str(value).isprintable() else ascii(value)[:LONGEST_SHOWN]


def _check_policy_file(path: Path) -> None:
    try:
        document = json.loads(_policy_text(path))
        stated = document.pop("sha256")
    except FileNotFoundError as error:
        raise ProfileError("policy.json is missing") from error
    except Exception as error:  # what JSON can hold: no dict, a number too long, nesting too deep
        raise ProfileError(f"policy.json is damaged: {one_line(error)[:200]}") from error
    if document.get("format_version") != POLICY_VERSION:
        raise ForeignProfileError(f"policy.json: format version must be {POLICY_VERSION}, got {document.get('format_version')}")
    if stated != _checksum(document):
        raise ProfileError("policy.json is damaged: checksum does not match")


def _policy_text(path: Path) -> bytes:
    return read_regular_file(path, LARGEST_POLICY_BYTES).data


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
