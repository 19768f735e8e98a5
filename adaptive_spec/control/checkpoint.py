"""The controller's state as arrays: what a checkpoint keeps, so that a restarted sidecar continues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.control.modes import Request
from adaptive_spec.domain.arrays import Arrays
from adaptive_spec.domain.policy import Mode
from adaptive_spec.models.plausible import LARGEST_WEIGHT, plausible

STATE_VERSION = 1


@dataclass(frozen=True)
class ControllerState:
    """counters, policy: JSON forms of the counters and of the policy (`Controller.policy_summary`). swept: the sweep is over.
    configured_mode: mode of the settings. batches: tally of batch sizes [max_batch + 1]. observe_only: so is the engine.
    latency, calibration: arrays of the models. request: what was asked for. sweeping: a sweep runs or is due.
    """

    counters: Mapping[str, Any]
    policy: Mapping[str, Any]
    swept: bool
    configured_mode: str
    kv_per_request: float
    batches: NDArray[np.float64]
    sweep_steps: int
    observe_only: bool
    latency: Arrays
    calibration: Arrays
    request: Request
    sweeping: bool

    @property
    def table(self) -> NDArray[np.uint8]:
        """K by batch size and context, [max_batch + 1, contexts]."""
        return np.array(self.policy["table"], dtype=np.uint8)

    @property
    def mode(self) -> Mode:
        return Mode(self.policy["mode"])

    @property
    def policy_version(self) -> int:
        return int(self.policy["version"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of one archive."""
        # Names of the file format: "ledger" is the counters, "asked" configured_mode, "ignored" observe_only.
        head = {
            "version": STATE_VERSION, "ledger": self.counters, "policy": self.policy, "swept": self.swept,
            "asked": self.configured_mode, "kv_per_request": self.kv_per_request, "batches": self.batches.tolist(),
            "sweep_steps": self.sweep_steps, "ignored": self.observe_only,
            "request": self.request.state(), "sweeping": self.sweeping,
        }  # fmt: skip
        return {
            "head": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
            **{f"latency.{k}": v for k, v in self.latency.items()},
            **{f"calibration.{k}": v for k, v in self.calibration.items()},
        }

    @classmethod
    def of(cls, arrays: Arrays) -> ControllerState:
        """Read `arrays()`. Raises ValueError when it is of another version or damaged."""
        try:
            head = json.loads(np.asarray(arrays["head"]).tobytes())
            if head["version"] != STATE_VERSION:
                raise ValueError(f"checkpoint version {head['version']} is not {STATE_VERSION}")
            latency, calibration = (
                {k[len(part) :]: v for k, v in arrays.items() if k.startswith(part)} for part in ("latency.", "calibration.")
            )
            state = cls(
                head["ledger"], head["policy"], bool(head["swept"]), str(head["asked"]), float(head["kv_per_request"]),
                np.array(head["batches"], dtype=np.float64), int(head["sweep_steps"]),
                bool(head.get("ignored", False)),  # absent from checkpoints of older versions
                latency, calibration, *_request(head),
            )  # fmt: skip
            if state.table.ndim != 2 or not state.mode or state.policy_version < 0:
                raise ValueError("checkpoint is damaged: policy: the table must have 2 dimensions and the version be at least 0")
            plausible("table", state.policy["table"], (None, None), 0.0, 255.0)
            plausible("batches", state.batches, (None,), 0.0, LARGEST_WEIGHT)
            plausible("kv_per_request", [state.kv_per_request], (1,), 0.0, LARGEST_WEIGHT)
            plausible("sweep_steps, version", [state.sweep_steps, state.policy_version], (2,), 0.0, LARGEST_WEIGHT)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"checkpoint is damaged: {error}") from error
        return state


def _request(head: Mapping[str, Any]) -> tuple[Request, bool]:
    """(request, whether a sweep runs or is due). Older versions wrote the mode alone: fallback hides what was asked for."""
    if "request" in head:
        return Request.of(head["request"]), bool(head["sweeping"])
    mode, asked = Mode(head["policy"]["mode"]), "shadow" if head["asked"] == "shadow" else "active"
    if mode in (Mode.ACTIVE, Mode.SHADOW):
        asked = mode.value
    pinned_k = int(np.max(head["policy"]["table"])) if mode is Mode.PINNED else None
    request = Request("shadow" if asked == "shadow" else "active", pinned_k, mode is Mode.PAUSED)
    return request, mode is Mode.SWEEP or (mode is Mode.FALLBACK and not head["swept"])
