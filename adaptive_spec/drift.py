"""Drift: when the residuals of a model stop looking like they did.

Two detectors of River per signal: ADWIN (Bifet and Gavalda, 2007), which compares the two halves of a growing window and
finds changes of any size given time, and Page-Hinkley (Page, 1954), a cumulative sum that finds large ones at once. Both see
means of `group` steps, so that single steps need not be near normal and a fast engine costs no more than a slow one.
"""

from __future__ import annotations

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
