"""History: the last half hour of one engine in a few numbers per moment, for the status page. Prometheus keeps the rest."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from adaptive_spec.control.snapshot import Snapshot

INTERVAL_S = 2.0
MOMENTS = 900


class Moment(NamedTuple):
    """time_s: on the clock `note` is given. None: unknown, as while nothing is decoded.

    launch_k_goodput_tokens_per_s: what the launch K would have given in the same steps, from the controller's own forecast.
    draft_tokens: K of the policy at `batch_size`.
    """

    time_s: float
    goodput_tokens_per_s: float | None
    launch_k_goodput_tokens_per_s: float | None
    batch_size: int | None
    draft_tokens: int | None


class History:
    """Keeps a moment every 2 s, 900 of them. `moments` is replaced, never changed, so that any thread may hold on to it."""

    def __init__(self) -> None:
        self.moments: tuple[Moment, ...] = ()
        self._kept: deque[Moment] = deque(maxlen=MOMENTS)
        self._steps = -1

    def note(self, snapshot: Snapshot | None, now_s: float) -> None:
        """Keep this moment if the last one is old enough."""
        if self._kept and now_s - self._kept[-1].time_s < INTERVAL_S:
            return
        self._kept.append(self._moment(snapshot, now_s))
        self.moments = tuple(self._kept)

    def _moment(self, s: Snapshot | None, now_s: float) -> Moment:
        steps, self._steps = self._steps, s.decode_steps if s else -1
        if s is None or s.decode_steps == steps:
            return Moment(now_s, None, None, None, None)
        goodput, gain = s.goodput_tokens_per_s, s.measured_gain
        launch = goodput / (1.0 + gain) if goodput is not None and gain is not None and gain > -1.0 else None
        return Moment(now_s, goodput, launch, s.batch_size or None, s.k_by_batch_size.get(s.batch_size))
