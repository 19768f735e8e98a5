"""`adaptive-spec doctor --alive`: a probe of the sidecar that needs no port, so that no client can keep it waiting."""

from __future__ import annotations

from pathlib import Path

from adaptive_spec.client.sidecar import ALIVE_S, heartbeat_age_s


def alive_line(runtime_dir: Path) -> tuple[str, bool]:
    """Return what to print and whether the sidecar in a folder lives."""
    try:
        age_s = heartbeat_age_s(runtime_dir)
    except OSError as error:
        return f"{runtime_dir}: not alive: {error.strerror}", False
    lives = age_s <= ALIVE_S
    return f"{runtime_dir}: {'alive' if lives else 'not alive'}: the loop ran {age_s:.1f} s ago", lives
