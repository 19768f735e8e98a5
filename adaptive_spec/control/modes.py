"""Modes: what was asked for, how the controller fares, and the mode that follows from both.

    failed              -> FALLBACK     the policy does not act, until a refit succeeds
    sweeping            -> SWEEP
    otherwise           -> PAUSED, PINNED, ACTIVE or SHADOW, as asked for

A failure or a sweep changes nothing of what was asked for: it holds again afterwards, and over a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from adaptive_spec.domain.commands import CONTROL_COMMANDS
from adaptive_spec.domain.policy import Mode

Steering = Literal["active", "shadow"]


class Health(StrEnum):
    """SWEEPING: the staircase is being measured. FAILED: a call failed and no refit has succeeded since."""

    SWEEPING = "sweeping"
    OK = "ok"
    FAILED = "failed"


@dataclass(frozen=True)
class Request:
    """What was asked for, by the configuration and by commands.

    steering: whether policies act. pinned_k: the K held at every batch size, None: the table decides. paused: the table is kept.
    """

    steering: Steering
    pinned_k: int | None = None
    paused: bool = False

    @property
    def plain_active(self) -> bool:
        """Neither shadow, paused nor pinned: a sweep may run."""
        return self == Request("active")

    @property
    def acts(self) -> bool:
        """Whether policies act. A pause while in shadow does not make them act; a pinned K does act."""
        return self.steering == "active" or self.pinned_k is not None

    def after(self, command: str, k: int | None, configured: Steering) -> Request:
        """The request after a command.

        `resume` takes back a pause, else it returns to the configured mode; `unpin` takes back a pin. k: of `pin`. configured:
        mode of the settings. Raises ValueError for a command that asks for no mode.
        """
        match command:
            case "pin":
                return replace(self, pinned_k=k, paused=False)
            case "unpin":
                return replace(self, pinned_k=None)
            case "pause":
                return replace(self, paused=True)
            case "resume":
                return replace(self, paused=False) if self.paused else Request(configured)
            case "active":
                return Request("active")
            case "shadow":
                return Request("shadow")
        raise ValueError(f"command {command!r} is not one of {', '.join(CONTROL_COMMANDS)}")

    def state(self) -> dict[str, Any]:
        """JSON form."""
        return {"steering": self.steering, "pinned_k": self.pinned_k, "paused": self.paused}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Request:
        """Read `state()`. Raises ValueError when it cannot be one."""
        steering, k, paused = state.get("steering"), state.get("pinned_k"), state.get("paused")
        is_k = k is None or (isinstance(k, int) and not isinstance(k, bool) and 0 <= k <= 255)
        if steering not in ("active", "shadow") or not is_k or not isinstance(paused, bool):
            raise ValueError(f"request: must have steering, pinned_k and paused, got {dict(state)!r:.200}")
        return cls("active" if steering == "active" else "shadow", k, paused)


def effective_mode(request: Request, health: Health) -> Mode:
    """The mode that follows from request and health."""
    if health is Health.FAILED:
        return Mode.FALLBACK
    if health is Health.SWEEPING:
        return Mode.SWEEP
    if request.paused:
        return Mode.PAUSED
    return Mode.PINNED if request.pinned_k is not None else Mode(request.steering)
