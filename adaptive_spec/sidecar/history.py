"""The last half hour of one engine, for the goodput chart of the status page. Prometheus keeps what is older."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from adaptive_spec.control.snapshot import Snapshot

INTERVAL_S = 2.0
MAX_POINTS = 900
"""Half an hour."""


class HistoryPoint(NamedTuple):
    """One point of the chart; None: unknown, for example while nothing is decoded.

    time_s: on the clock given to `History.add`. launch_k_goodput_tokens_per_s: estimate of what the launch K would have given in
    the same steps, from the controller's forecast. draft_tokens: K of the policy at `batch_size`.
    """

    time_s: float
    goodput_tokens_per_s: float | None
    launch_k_goodput_tokens_per_s: float | None
    batch_size: int | None
    draft_tokens: int | None


class History:
    """Keeps a point every 2 s, 900 of them. `points` is replaced and never changed, so any thread may keep a reference."""

    def __init__(self) -> None:
        self.points: tuple[HistoryPoint, ...] = ()
        self._kept: deque[HistoryPoint] = deque(maxlen=MAX_POINTS)
        self._steps = -1

    def add(self, snapshot: Snapshot | None, now_s: float) -> None:
        """Add a point for this snapshot, unless the last point is younger than INTERVAL_S."""
        if self._kept and now_s - self._kept[-1].time_s < INTERVAL_S:
            return
        self._kept.append(self._point(snapshot, now_s))
        self.points = tuple(self._kept)

    def _point(self, s: Snapshot | None, now_s: float) -> HistoryPoint:
        steps, self._steps = self._steps, s.decode_steps if s else -1
        if s is None or s.decode_steps == steps:
            return HistoryPoint(now_s, None, None, None, None)
        goodput, gain = s.goodput_tokens_per_s, s.estimated_gain
        launch = goodput / (1.0 + gain) if goodput is not None and gain is not None and gain > -1.0 else None
        return HistoryPoint(now_s, goodput, launch, s.batch_size or None, s.k_by_batch_size.get(s.batch_size))
