"""The engine's report, `{runtime_dir}/engine.json`: whether it is attached or why not, and what failed in it.

An engine that cannot be observed writes no records, so its state is in this file: written by the engine on a change and at most
once a second, read by the sidecar for /metrics and /status.json. Who writes it holds the role `engine` of the folder, so that a
report of a process that has ended, or of a second engine, is never taken for the engine's. A damaged report is ignored.

Both sides keep to the limits below: the writer shortens, the reader refuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from adaptive_spec.regular_file import read_regular_file
from adaptive_spec.runtime_folder import check_runtime_dir, ensure_role, make_runtime_dir, role_holder, role_is_held
from adaptive_spec.wire.liveness import process_alive
from adaptive_spec.wire.shared_file import replace_file

REPORT_NAME = "engine.json"
State = Literal["attached", "observing", "refused", "detached"]
STATES: tuple[State, ...] = ("attached", "observing", "refused", "detached")
LARGEST_BYTES = 1 << 16
LONGEST_ENGINE = 100
LONGEST_REASON = 1000
LONGEST_NAME = 80
MOST_NAMES = 64
LARGEST_COUNT = 2**53
"""A float holds every whole number up to this one; a metric is a float."""
LARGEST_LEVEL = 9
LARGEST_PID = 2**31 - 1


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


class ReportFile(NamedTuple):
    """Which file lies at the path, and whether it was changed."""

    inode: int
    size: int
    changed_ns: int


def report_file(runtime_dir: Path) -> ReportFile | None:
    """Return what lies at the report's path, None when nothing does. Raises nothing."""
    try:
        status = os.lstat(runtime_dir / REPORT_NAME)
    except OSError:
        return None
    return ReportFile(status.st_ino, status.st_size, status.st_ctime_ns)


def write_report(runtime_dir: Path, report: EngineReport) -> ReportFile | None:
    """Replace the report (mode 0600) atomically; the folder is created. The process then holds the role `engine`.

    Returns what `report_file` finds for as long as nobody deletes or damages the report. Raises OSError: BlockingIOError
    when another engine holds the role, PermissionError for a folder that other users can use.
    """
    make_runtime_dir(runtime_dir)
    ensure_role(runtime_dir, "engine")
    path = runtime_dir / REPORT_NAME
    temporary = path.with_name(f".{REPORT_NAME}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(json.dumps(_within_limits(report)).encode())
        replace_file(temporary, path)
        return report_file(runtime_dir)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_report(runtime_dir: Path) -> EngineReport | None:
    """Return the report of a running engine, None when there is no valid one. Never raises, never waits."""
    try:
        check_runtime_dir(runtime_dir)
        held = role_is_held(runtime_dir, "engine")
        if held is False:
            return None
        content = read_regular_file(runtime_dir / REPORT_NAME, LARGEST_BYTES)
        if content.owner != os.geteuid():
            return None
        report = parse_report(content.data)
    except Exception:  # whatever the file holds
        return None
    if held:
        # A new engine may hold the role before it writes its own report. On a full disk the holder has noted nothing.
        return report if role_holder(runtime_dir, "engine") in (0, report.pid) else None
    return report if process_alive(report.pid) else None


def parse_report(data: bytes) -> EngineReport:
    """Return the report in JSON bytes. Raises ValueError, TypeError, KeyError or RecursionError for anything but a valid one."""
    fields = json.loads(data)
    if not isinstance(fields, dict) or fields["state"] not in STATES:
        raise ValueError(f"state: must be one of {', '.join(STATES)}")
    level = fields.get("level")
    return EngineReport(
        _whole("pid", fields["pid"], 1, LARGEST_PID), _text("engine", fields["engine"], LONGEST_ENGINE), fields["state"],
        _text("reason", fields["reason"], LONGEST_REASON), _tally("failures", fields["failures"]),
        _tally("counters", fields["counters"]), None if level is None else _whole("level", level, 0, LARGEST_LEVEL),
    )  # fmt: skip


def _within_limits(report: EngineReport) -> dict[str, object]:
    def tally(counts: Mapping[str, int]) -> dict[str, int]:
        return {_shown(name, LONGEST_NAME): min(max(int(counts[name]), 0), LARGEST_COUNT) for name in list(counts)[:MOST_NAMES]}

    texts = {"engine": _shown(report.engine, LONGEST_ENGINE), "reason": _shown(report.reason, LONGEST_REASON)}
    return {**asdict(report), **texts, "failures": tally(report.failures), "counters": tally(report.counters)}


def _shown(text: str, longest: int) -> str:
    """One line of printable characters, not too long."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text)[:longest])


def _text(name: str, value: object, longest: int) -> str:
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        raise ValueError(f"{name}: must be printable text of at most {longest} characters")
    return value


def _whole(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: must be a whole number in {low}..{high}")
    return value


def _tally(name: str, value: object) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > MOST_NAMES:
        raise ValueError(f"{name}: must have at most {MOST_NAMES} names with a count each")
    return {_text(name, key, LONGEST_NAME): _whole(name, count, 0, LARGEST_COUNT) for key, count in value.items()}
