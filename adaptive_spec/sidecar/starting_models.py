"""Where a session's models come from at its start: the checkpoint, else the profile or the store, else a sweep.

What cannot be used is set aside or left where it is, with a warning, and the next one is tried.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.control.controller import Controller
from adaptive_spec.control.no_speculation import GainOverNoSpeculation, without_speculation
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.sidecar.own_files import CHECKPOINT_NAME
from adaptive_spec.sidecar.usable import check_checkpoint, check_profile
from adaptive_spec.storage.archive import ArchiveError, ForeignArchiveError, load_archive
from adaptive_spec.storage.profile import ForeignProfileError, difference_of, load_profile, other_profiles, written_s
from adaptive_spec.storage.profile_store import StoredProfile
from adaptive_spec.wire.ring import RingReader
from adaptive_spec.wire.shared_file import KEPT_ASIDE, said_aside

CHECKPOINT = "checkpoint"

log = logging.getLogger(__name__)


def gain_over_no_speculation(settings: SidecarSettings, info: EngineInfo) -> GainOverNoSpeculation | None:
    """What a server without speculation has measured of this engine, None where there is no such profile."""
    plain = without_speculation(info)
    if info.candidates == plain.candidates:
        return None
    folder = settings.profile_dir / plain.profile_name
    try:
        profile = load_profile(folder, plain)
        found = profile and GainOverNoSpeculation(settings.controller, plain, profile.latency, profile.calibration)
    except Exception as error:  # whatever its files hold; the server without speculation sets it aside itself
        log.warning("profile %s of the server without speculation cannot be used: %s", folder, error)
        return None
    if found is not None:
        log.info("the gain over no speculation is measured against %s", folder)
    return found


def start_controller(
    settings: SidecarSettings, ring: RingReader, stored: StoredProfile | None
) -> tuple[Controller, str, int | None]:
    """Return controller, origin of its models, and ring position to continue at (None: the oldest record)."""
    checkpoint = _from_checkpoint(settings, ring)
    if checkpoint is not None:
        return checkpoint
    folder = settings.profile_dir / ring.info.profile_name
    ways = [partial(_from_folder, settings, ring.info, folder), partial(_from_store, settings, ring.info, stored)]
    if stored is not None and stored.written_s > written_s(folder):
        ways.reverse()
    for way in ways:
        started = way()
        if started is not None:
            return started
    return Controller(settings.controller, ring.info), "sweep", None


def _from_folder(settings: SidecarSettings, info: EngineInfo, folder: Path) -> tuple[Controller, str, None] | None:
    controller = Controller(settings.controller, info)
    try:
        profile = load_profile(folder, info)
        if profile is None:
            for other in other_profiles(folder, info):
                log.info("not this engine's profile: %s", other)
            return None
        check_profile(profile, settings.controller, info)
        controller.restore_profile(profile.latency, profile.calibration)
    except Exception as error:  # whatever its files hold
        why = "foreign" if isinstance(error, ForeignProfileError) else "damaged"
        log.warning("profile %s cannot be used: %s; %s", folder, error, said_aside(folder, why))
        return None
    log.info("already profiled, skipping warmup (%s)", folder)
    return controller, "profile", None


def _from_store(settings: SidecarSettings, info: EngineInfo, stored: StoredProfile | None) -> tuple[Controller, str, None] | None:
    if stored is None:
        return None
    controller = Controller(settings.controller, info)
    try:
        check_profile(stored.profile, settings.controller, info)
        controller.restore_profile(stored.profile.latency, stored.profile.calibration)
    except Exception as error:  # whatever it holds
        log.warning("the profile from the store cannot be used: %s", error)
        return None
    log.info("already profiled by another replica, skipping warmup (profile of %.0f in the store)", stored.written_s)
    return controller, "store", None


def checkpoint_key(info: EngineInfo) -> str:
    """What a checkpoint goes by: all that is fixed while an engine runs, and the same after it restarts."""
    return f"{info.digest:016x}"


def has_checkpoint(folder: Path, info: EngineInfo) -> bool:
    """Whether there is a checkpoint of this engine, or one that cannot be read and is to be set aside first."""
    if (folder / f"{CHECKPOINT}-{checkpoint_key(info)}.npz").exists():
        return True
    try:
        return not _foreign(load_archive(folder / CHECKPOINT_NAME, CHECKPOINT).meta, info)
    except FileNotFoundError:
        return False
    except ArchiveError:
        return True


def _foreign(meta: Mapping[str, Any], info: EngineInfo) -> str:
    """In what the engine of a checkpoint is another one, "" when it is this one."""
    if difference := difference_of(meta, info):
        return difference
    return (
        ""
        if meta.get("configuration", checkpoint_key(info)) == checkpoint_key(info)
        else "its K, largest batch or the like are others"
    )


def _change_checkpoint(folder: Path, info: EngineInfo) -> None:
    """Keep the checkpoint of another engine under a name of its own, and take back that of this one. Raises OSError."""
    path, own = folder / CHECKPOINT_NAME, folder / f"{CHECKPOINT}-{checkpoint_key(info)}.npz"
    try:
        meta = load_archive(path, CHECKPOINT).meta
    except (FileNotFoundError, ArchiveError):
        meta = None
    if meta is not None and (difference := _foreign(meta, info)):
        key = str(meta.get("configuration", ""))
        kept = folder / f"{CHECKPOINT}-{key if re.fullmatch('[0-9a-f]{16}', key) else '0' * 16}.npz"
        os.replace(path, kept)
        log.info("%s is of another engine (%s): kept as %s", path, difference, kept.name)
        others = sorted((other for other in folder.glob(f"{CHECKPOINT}-*.npz") if other != own), key=lambda p: p.lstat().st_mtime)
        for other in others[:-KEPT_ASIDE]:
            other.unlink()
    if own.exists() and not path.exists():
        os.replace(own, path)


def _from_checkpoint(settings: SidecarSettings, ring: RingReader) -> tuple[Controller, str, int | None] | None:
    path = settings.runtime_dir / CHECKPOINT_NAME
    controller = Controller(settings.controller, ring.info)
    try:
        _change_checkpoint(settings.runtime_dir, ring.info)
        archive = load_archive(path, CHECKPOINT)
        if difference := difference_of(archive.meta, ring.info):
            raise ArchiveError(f"{path.name} belongs to another engine: {difference}")
        check_checkpoint(archive.arrays, settings.controller, ring.info)
        controller.restore(archive.arrays)
        position = int(archive.meta["position"]) if archive.meta["generation"] == str(ring.generation) else None
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever it holds
        why = "foreign" if isinstance(error, ForeignArchiveError) else "damaged"
        log.warning("checkpoint %s cannot be used: %s; %s", path, error, said_aside(path, why))
        return None
    log.info("continuing from the checkpoint (%s)", path)
    return controller, "checkpoint", position
