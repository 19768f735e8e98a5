"""Drift: when the residuals of a model stop looking like they did, or the traffic does.

`DriftDetector` watches residuals. Two detectors of River per signal: ADWIN (Bifet and Gavalda, 2007), which compares the two
halves of a growing window and finds changes of any size given time, and Page-Hinkley (Page, 1954), a cumulative sum that finds
large ones at once. Both see means of `group` steps, so that single steps need not be near normal and a fast engine costs no
more than a slow one.

`TrafficDetector` watches the draft's own confidence: it has no expected value, so a mean is compared with its own past.
"""

from __future__ import annotations

import math
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


class TrafficDetector:
    """Page-Hinkley on means of `GROUP` steps, in standard deviations of such means: z = (mean - running mean) / running sd.

    A request has an acceptance of its own for as long as it lasts, so the steps of one minute resemble each other; the spread
    of group means knows that, the spread of steps does not. Regimes. Learning: `LEARNING` groups tell mean and spread.
    Watching: both follow slowly. Changed: a sum of z beyond `THRESHOLD` ends in learning anew.
    """

    GROUP = 32
    LEARNING = 10
    DELTA, THRESHOLD = 0.6, 8.0
    """z that is ignored, and the sum of the rest that is a change: larger means fewer false alarms and later true ones."""
    CAUTION = 10.0
    """Variances of a group mean by which the running mean is not to be trusted after one group, falling with their number."""
    PACE = 0.01
    """Share of a group in the running mean and variance."""
    CLIP = 4.0

    def __init__(self) -> None:
        self._sum, self._count, self._groups = 0.0, 0, 0
        self._mean = self._variance = self._lately = 0.0
        self._page_hinkley = self._fresh()

    def update(self, value: float) -> TrafficChange | None:
        """Take the value of one step; a change when it is established with it."""
        self._sum += value
        self._count += 1
        if self._count < self.GROUP:
            return None
        mean, self._sum, self._count = self._sum / self.GROUP, 0.0, 0
        if self._groups >= self.LEARNING and self._variance > 0.0:
            # The mean itself was learnt from few groups at first.
            z = (mean - self._mean) / math.sqrt(self._variance * (1.0 + self.CAUTION / self._groups))
            self._lately += 0.2 * (mean - self._lately)
            self._page_hinkley.update(min(max(z, -self.CLIP), self.CLIP))  # type: ignore[no-untyped-call]  # as above
            if self._page_hinkley.drift_detected:
                change = TrafficChange(self._mean, self._lately)
                self._groups, self._page_hinkley = 0, self._fresh()
                return change
        self._groups += 1
        pace = max(1.0 / self._groups, self.PACE)
        away = mean - self._mean if self._groups > 1 else 0.0
        self._mean = mean if self._groups == 1 else self._mean + pace * away
        self._variance += pace * (away * away - self._variance)
        if self._groups <= self.LEARNING:
            self._lately = self._mean
        return None

    @classmethod
    def _fresh(cls) -> PageHinkley:
        return PageHinkley(min_instances=1, delta=cls.DELTA, threshold=cls.THRESHOLD, mode="both")
