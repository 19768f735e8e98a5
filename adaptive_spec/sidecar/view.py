"""What the HTTP thread can see of the sidecar: an immutable `View`, replaced as a whole by the sidecar's loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.sidecar.history import HistoryPoint
from adaptive_spec.sidecar.server_metrics import ServerReported
from adaptive_spec.wire.engine_report import EngineReport

CALLS = (
    "observe", "relearn", "refit", "tick", "command", "publish", "fail", "snapshot", "counters", "checkpoint", "profile", "page",
    "set_aside", "prior",
)  # fmt: skip
"""Calls whose failures a session counts."""


@dataclass(frozen=True)
class View:
    """State of the sidecar at one time.

    time_s: CLOCK_MONOTONIC seconds. snapshot, info: None before an engine is attached. attached: the engine's ring is open and
    its process is alive. failures: controller calls that raised, by call. origin: where the models came from: "sweep",
    "profile", "store" or "checkpoint". checkpoint_s: time of the last checkpoint, None before the first. report: the engine's
    own report. history: points of the goodput chart, oldest first. store: operations of the profile store, counted by
    (operation, result), None without a store. annotations_sent, annotations_dropped: Grafana annotations, the dropped ones by
    reason; annotations_sent is None when no Grafana is configured. policy_ignored: the engine runs without a policy although one
    that acts is offered. gain_over_no_speculation: see `control.no_speculation`, None where that was not measured.
    server_reported: the server's own numbers while the plugin gives none, else None. session: number of the session that the
    snapshot is of, 0 without one; event ids are unique within one. dp_ranks: of a server with data parallelism the view of each
    data-parallel rank, ascending; this one is that of the first, with what belongs to the whole sidecar.
    """

    time_s: float
    snapshot: Snapshot | None = None
    info: EngineInfo | None = None
    attached: bool = False
    failures: Mapping[str, int] = field(default_factory=dict)
    origin: str = "sweep"
    checkpoint_s: float | None = None
    position: int = 0
    report: EngineReport | None = None
    history: tuple[HistoryPoint, ...] = ()
    store: Mapping[tuple[str, str], int] | None = None
    annotations_sent: int | None = None
    annotations_dropped: Mapping[str, int] = field(default_factory=dict)
    policy_ignored: bool = False
    gain_over_no_speculation: float | None = None
    server_reported: ServerReported | None = None
    session: int = 0
    dp_ranks: Mapping[int, View] = field(default_factory=dict)

    @property
    def records_come(self) -> bool:
        """Whether an engine writes records, or is about to: the plugin's level is not 0."""
        return self.attached or (self.report is not None and self.report.records_come)


class CurrentView:
    """The newest view, written by the sidecar's loop and read by any thread. heartbeat_s: when the loop last ran."""

    def __init__(self, now_s: float) -> None:
        self.view = View(now_s)
        self.heartbeat_s = now_s
