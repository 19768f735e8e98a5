"""The engine's own word about its side: attached or why not, and what failed in it. `{runtime_dir}/engine.json`.

Records say nothing while an engine cannot be observed, so what went wrong on its side travels by this small file: written by
the engine when something changed and at most once a second, read by the sidecar for /metrics and /status.json. A report of a
process that lives no more, or that is damaged, is no report.
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
    """pid: of the engine. engine: name and version. state: attached; observing (records, but K cannot be changed); refused
    (left alone from the start); detached (given up after repeated failures). reason: why, one line, "" when attached.
    failures: calls of ours that raised inside the engine, by hook. counters: of the tap, by name.
    """

    pid: int
    engine: str
    state: State
    reason: str = ""
    failures: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)

    @property
    def records_come(self) -> bool:
        return self.state in ("attached", "observing")


def write_report(runtime_dir: Path, report: EngineReport) -> None:
    """Replace the report (0600) in one piece. Raises OSError."""
    path = runtime_dir / REPORT_NAME
    temporary = path.with_name(f".{REPORT_NAME}.{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(json.dumps(asdict(report)).encode())
    os.replace(temporary, path)


def read_report(runtime_dir: Path) -> EngineReport | None:
    """Return the report of a living engine, None when there is none to be trusted. Never raises."""
    try:
        with open(runtime_dir / REPORT_NAME, "rb") as file:
            fields = json.loads(file.read(LARGEST_BYTES))
        report = EngineReport(
            int(fields["pid"]), str(fields["engine"]), fields["state"], str(fields["reason"]), _tally(fields["failures"]),
            _tally(fields["counters"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if report.state in STATES and process_alive(report.pid) else None


def _tally(data: Mapping[str, object]) -> dict[str, int]:
    return {str(name): max(int(str(count)), 0) for name, count in data.items()}
