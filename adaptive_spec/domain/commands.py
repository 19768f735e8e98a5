"""The commands an operator can send to a running sidecar: `adaptive-spec ctl`, POST /control, `Controller.command`."""

from __future__ import annotations

CONTROL_COMMANDS = ("pause", "resume", "shadow", "active", "pin", "unpin", "refit", "resweep")
