"""Drift: when the residuals of a model stop looking like they did, or the traffic does.

`DriftDetector` watches residuals. Two detectors of River per signal: ADWIN (Bifet and Gavalda, 2007), which compares the two
halves of a growing window and finds changes of any size given time, and Page-Hinkley (Page, 1954), a cumulative sum that finds
large ones at once. Both see means of `group` steps, so that single steps need not be near normal and a fast engine costs no
more than a slow one.

`TrafficDetector` watches the draft's own confidence: it has no expected value, so requests are compared with those before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from river.drift import ADWIN, PageHinkley


class DriftDetector:
    """Watches one residual that should hover around a constant and be of order 1 (standard deviations).

    group: steps a mean is taken over, >= 1; larger for residuals that resemble their predecessor. delta: ADWIN's confidence,
    0..1; smaller means fewer false alarms and later true ones. threshold: Page-Hinkley's, in sums of residuals; larger means
    later. After an alarm both begin anew, and none is raised for `COOLDOWN_GROUPS` groups:
    one change is one event.
    """

    COOLDOWN_GROUPS = 12
    CLIP = 8.0

    def __init__(self, group: int = 4, delta: float = 0.002, threshold: float = 25.0) -> None:
        self._group = group
        self._delta, self._threshold = delta, threshold
        self._sum, self._count, self._cooldown = 0.0, 0, 0
        self._begin()

    def update(self, residual: float) -> bool:
        """Take the residual of one step; True when a drift is established with it."""
        self._sum += min(max(residual, -self.CLIP), self.CLIP)
        self._count += 1
        if self._count < self._group:
            return False
        mean, self._sum, self._count = self._sum / self._group, 0.0, 0
        if self._cooldown > 0:
            self._cooldown -= 1
            return False
        self._adwin.update(mean)  # type: ignore[no-untyped-call]  # River has no types
        self._page_hinkley.update(mean)  # type: ignore[no-untyped-call]  # as above
        if not (self._adwin.drift_detected or self._page_hinkley.drift_detected):
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Begin anew after a change that was noticed otherwise, with the same pause as after an alarm."""
        self._sum, self._count, self._cooldown = 0.0, 0, self.COOLDOWN_GROUPS
        self._begin()

    def _begin(self) -> None:
        self._adwin = ADWIN(delta=self._delta, clock=4, grace_period=16)  # type: ignore[no-untyped-call]  # as above
        self._page_hinkley = PageHinkley(min_instances=16, delta=0.25, threshold=self._threshold, mode="both")


class TrafficChange(NamedTuple):
    """Mean of what is watched before and after a change."""

    before: float
    after: float


class _Side:
    """Cumulative sum on one side of the mean, and the votes since it last was zero: those after the change, if it is one."""

    def __init__(self) -> None:
        self.sum = self.total = 0.0
        self.votes = 0

    def add(self, excess: float, vote: float) -> None:
        self.sum, self.votes, self.total = self.sum + excess, self.votes + 1, self.total + vote
        if self.sum <= 0.0:
            self.sum = self.total = 0.0
            self.votes = 0


class TrafficDetector:
    """Two-sided cumulative sum (Page, 1954) over requests, z = (mean confidence of a request - running mean) / running sd.

    Steps of one request resemble each other, requests differ: so every request has one vote, the mean of its first
    `VOTE_STEPS` drafts (fewer if it ends before, at least `LEAST_STEPS`). The sum adds |z| - `DELTA` on the side of z and is a
    change beyond `THRESHOLD` + ln(votes in 16 steps): the rate of false alarms falls with exp(2 `DELTA` threshold), so a busy
    server has no more of them per step than a quiet one. Requests that come in bursts of one kind are told by the spread of
    sums of `BURST` votes, which divides z. Regimes. Learning: `LEARNING` votes tell mean and spread. Watching: both follow
    slowly. Suspicious: they stand still. Changed: learning anew.
    """

    VOTE_STEPS, LEAST_STEPS = 16, 8
    LEARNING = 24
    DELTA, THRESHOLD = 0.6, 10.0
    """z that is ignored, and the sum of the rest that is a change: larger means fewer false alarms and later true ones."""
    SUSPICION = 2.0
    """Sum from which votes are not learnt, lest the mean follows what it should be compared with."""
    CAUTION = 10.0
    """Variances of a vote by which the running mean is not to be trusted after one vote, falling with their number."""
    PACE = 0.005
    """Share of a vote in the running mean and variance, and of a step in the rate of votes."""
    BURST, BURST_PACE = 16, 0.02
    CLIP = 4.0

    def __init__(self) -> None:
        self._running: dict[int, tuple[int, float]] = {}
        """Votes in the making by request: drafts and the sum of their confidences; -1 drafts: has voted."""
        self._votes_per_step = 0.0
        self._spread = 1.0
        """Variance of a sum of BURST votes over that of independent ones."""
        self._begin()

    def _begin(self) -> None:
        self._votes = self._burst = 0
        self._mean = self._variance = self._burst_sum = 0.0
        self._above, self._below = _Side(), _Side()

    def update(self, values: Sequence[float], request_ids: Sequence[int]) -> TrafficChange | None:
        """Take one step: what is watched of every request [b], NaN where unknown; a change when established with it."""
        cast: list[float] = []
        running, self._running = self._running, {}
        for request, value in zip(request_ids, values, strict=True):
            drafts, total = running.pop(request, (0, 0.0))
            if drafts >= 0 and not math.isnan(value):
                drafts, total = drafts + 1, total + value
                if drafts >= self.VOTE_STEPS:
                    cast.append(total / drafts)
                    drafts = -1
            self._running[request] = drafts, total
        cast += [total / drafts for drafts, total in running.values() if drafts >= self.LEAST_STEPS]
        self._votes_per_step += self.PACE * (len(cast) - self._votes_per_step)
        change = None
        for vote in cast:
            change = self._take(vote) or change
        return change

    def _take(self, vote: float) -> TrafficChange | None:
        away = vote - self._mean if self._votes else 0.0
        if self._votes >= self.LEARNING and self._variance > 0.0:
            spread = self._variance * (1.0 + self.CAUTION / self._votes) * max(self._spread, 1.0)
            z = min(max(away / math.sqrt(spread), -self.CLIP), self.CLIP)
            self._above.add(z - self.DELTA, vote)
            self._below.add(-z - self.DELTA, vote)
            leading = max(self._above, self._below, key=lambda side: side.sum)
            if leading.sum > self.THRESHOLD + math.log(max(16.0 * self._votes_per_step, 1.0)):
                change = TrafficChange(self._mean, leading.total / leading.votes)
                self._begin()
                return change
            self._burst, self._burst_sum = self._burst + 1, self._burst_sum + away
            if self._burst == self.BURST:
                ratio = self._burst_sum**2 / (self.BURST * self._variance)
                self._spread += self.BURST_PACE * (min(ratio, self.CLIP**2) - self._spread)
                self._burst, self._burst_sum = 0, 0.0
            if leading.sum > self.SUSPICION:
                return None
        self._votes += 1
        pace = max(1.0 / self._votes, self.PACE)
        self._mean = vote if self._votes == 1 else self._mean + pace * away
        self._variance += pace * (away * away - self._variance)
        return None
