"""The current_view: what the sidecar's loop shows to the HTTP threads. One reference, swapped whole, never changed in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_spec.control.snapshot import Snapshot
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.sidecar.history import Moment
from adaptive_spec.wire.engine_report import EngineReport


@dataclass(frozen=True)
class View:
    """The sidecar at one moment.

    time_s: CLOCK_MONOTONIC seconds. snapshot, info: None until an engine was attached. attached: its ring is open and the
    engine lives. failures: controller calls that raised, by kind of call. origin: where the models came from ("sweep",
    "profile", "store", "checkpoint"). checkpoint_s: time of the last checkpoint, None before the first. report: what the engine
    says of itself. history: moments, oldest first. store: what came of the profile store, by (operation, result), None without.
    annotations_sent, annotations_dropped: of Grafana, None where no Grafana is configured; dropped ones by reason.
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
    history: tuple[Moment, ...] = ()
    store: Mapping[tuple[str, str], int] | None = None
    annotations_sent: int | None = None
    annotations_dropped: Mapping[str, int] = field(default_factory=dict)


class CurrentView:
    """Written by the loop only, read by anybody. `beat_s` is the loop's last sign of life."""

    def __init__(self, now_s: float) -> None:
        self.view = View(now_s)
        self.beat_s = now_s
