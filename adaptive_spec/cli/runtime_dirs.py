"""Which runtime folder a command means when the user names none: one for each user and server port."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from adaptive_spec.client.sidecar import running_sidecar
from adaptive_spec.errors import BadInput
from adaptive_spec.runtime_folder import Role, default_runtime_dir, default_runtime_dirs, role_is_held


def chosen_runtime_dir(given: Path | None, url: str | None = None, role: Role = "sidecar") -> Path:
    """Return the folder that the user gave; else that of the only running sidecar (role: or engine), else the default.

    url: of a sidecar or a server; then the folder is that one's. Raises BadInput when several are running and none is named.
    """
    if given is not None:
        return given
    folders = default_runtime_dirs()
    if url is not None:
        by_url = [folder for folder in folders.values() if running_sidecar(folder) == url.rstrip("/")]
        return by_url[0] if by_url else folders.get(_port(url), default_runtime_dir())
    running = [folder for folder in folders.values() if role_is_held(folder, role)]
    if len(running) > 1:
        names = ", ".join(map(str, running))
        raise BadInput(f"--runtime-dir: must be one of {names}, since each of them is in use, got none")
    return running[0] if running else default_runtime_dir()


def _port(url: str) -> int:
    try:
        return urlsplit(url).port or 0
    except ValueError:
        return 0
