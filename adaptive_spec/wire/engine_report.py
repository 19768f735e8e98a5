"""The engine's report, `{runtime_dir}/engine.json`: whether it is attached or why not, and what failed in it.

An engine that cannot be observed writes no records, so its state is in this file: written by the engine on a change and at most
once a second, read by the sidecar for /metrics and /status.json. A damaged report, or one of a process that has ended, is
ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from adaptive_spec.wire.liveness import process_alive

REPORT_NAME = "engine.json"
State = Literal["attached", "observing", "refused", "detached"]
STATES: tuple[State, ...] = ("attached", "observing", "refused", "detached")
LARGEST_BYTES = 1 << 16


@dataclass(frozen=True)
class EngineReport:
    """The state of the engine's side.

    pid: of the engine. engine: name and version. state: attached; observing (writes records, K cannot be changed); refused (not
    attached at start); detached (after repeated failures). reason: why, one line, "" when attached. failures: calls that raised
    inside the engine, by hook. counters: of the tap, by name. level: what the engine's side does now, 0 nothing but this report,
    1 counts and K, 2 stage times too, 3 confidences too; None where an engine has no levels.
    """

    pid: int
    engine: str
    state: State
    reason: str = ""
    failures: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    level: int | None = None

    @property
    def records_come(self) -> bool:
        return self.state in ("attached", "observing")


def write_report(runtime_dir: Path, report: EngineReport) -> None:
    """Replace the report (mode 0600) atomically. Raises OSError."""
    path = runtime_dir / REPORT_NAME
    temporary = path.with_name(f".{REPORT_NAME}.{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(json.dumps(asdict(report)).encode())
    os.replace(temporary, path)


def read_report(runtime_dir: Path) -> EngineReport | None:
    """Return the report of a running engine, None when there is no valid one. Never raises."""
    try:
        with open(runtime_dir / REPORT_NAME, "rb") as file:
            fields = json.loads(file.read(LARGEST_BYTES))
        report = EngineReport(
            int(fields["pid"]), str(fields["engine"]), fields["state"], str(fields["reason"]), _tally(fields["failures"]),
            _tally(fields["counters"]), _level(fields.get("level")),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if report.state in STATES and process_alive(report.pid) else None


def _tally(data: Mapping[str, object]) -> dict[str, int]:
    return {str(name): max(int(str(count)), 0) for name, count in data.items()}


def _level(value: object) -> int | None:
    return None if value is None else int(str(value))
