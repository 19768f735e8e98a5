"""Drift: a lasting change of a model's residuals, or of the traffic.

`DriftDetector` watches residuals with two detectors of River: ADWIN (Bifet and Gavalda, 2007), which compares two parts of a
growing window and finds changes of any size given time, and Page-Hinkley (Page, 1954), a cumulative sum that finds large
changes at once. Both get means of `group` steps, which are nearer to normal than single steps and cheaper.

`TrafficDetector` watches the draft's confidence. It has no expected value, so requests are compared with those before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from river.drift import ADWIN, PageHinkley


class DriftDetector:
    """Watches one residual with a constant mean, in standard deviations.

    group: steps a mean is taken over, >= 1; larger for autocorrelated residuals. delta: ADWIN's confidence, 0..1; smaller means
    fewer false alarms and later true ones. threshold: Page-Hinkley's, in sums of residuals; larger means later. After an alarm
    both restart, and no alarm is raised for `COOLDOWN_GROUPS` groups: one change is one event.
    """

    COOLDOWN_GROUPS = 12
    CLIP = 8.0

    def __init__(self, group: int = 4, delta: float = 0.002, threshold: float = 25.0) -> None:
        self._group = group
        self._delta, self._threshold = delta, threshold
        self._sum, self._count, self._cooldown = 0.0, 0, 0
        self._reset()

    def update(self, residual: float) -> bool:
        """Take the residual of one step; return whether a drift is established with it."""
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
        """Restart after a change that was noticed otherwise, with the same cooldown as after an alarm."""
        self._sum, self._count, self._cooldown = 0.0, 0, self.COOLDOWN_GROUPS
        self._reset()

    def _reset(self) -> None:
        self._adwin = ADWIN(delta=self._delta, clock=4, grace_period=16)  # type: ignore[no-untyped-call]  # as above
        self._page_hinkley = PageHinkley(min_instances=16, delta=0.25, threshold=self._threshold, mode="both")


class TrafficChange(NamedTuple):
    """Mean confidence of requests before and after a change, 0..1."""

    before: float
    after: float


class _Side:
    """Cumulative sum on one side of the mean, and the samples since it last was zero: those after the change, if it is one."""

    def __init__(self) -> None:
        self.sum = self.total = 0.0
        self.samples = 0

    def add(self, excess: float, sample: float) -> None:
        self.sum, self.samples, self.total = self.sum + excess, self.samples + 1, self.total + sample
        if self.sum <= 0.0:
            self.sum = self.total = 0.0
            self.samples = 0


class TrafficDetector:
    """Two-sided cumulative sum (Page, 1954) over requests, z = (mean confidence of a request - running mean) / running sd.

    Steps of one request are correlated, so every request gives one sample: the mean of its first `SAMPLE_STEPS` drafts (fewer if
    it ends before, at least `MIN_STEPS`). The sum adds |z| - `DELTA` on the side of z. Beyond `THRESHOLD` + ln(samples in 16
    steps) it is a change: the rate of false alarms falls with exp(2 `DELTA` threshold), so a busy server has no more of them per
    step than a quiet one. Requests of one kind may come in bursts; the variance of sums of `BURST` samples then enlarges the sd.
    Regimes. Learning: `LEARNING` samples give mean and variance. Watching: both follow slowly. Suspicious: both are frozen.
    Changed: learning restarts.
    """

    SAMPLE_STEPS, MIN_STEPS = 16, 8
    LEARNING = 24
    DELTA, THRESHOLD = 0.6, 10.0
    """|z| that is ignored, and the sum of the excess that is a change: larger means fewer false alarms and later true ones."""
    SUSPICION = 2.0
    """Sum beyond which samples are not learnt, so that the mean does not follow a change it should reveal."""
    MEAN_VARIANCE = 10.0
    """Variance of the running mean after one sample, in variances of a sample; it falls with the number of samples."""
    PACE = 0.005
    """Weight of a sample in the running mean and variance, and of a step in the rate of samples."""
    BURST, BURST_PACE = 16, 0.02
    CLIP = 4.0

    def __init__(self) -> None:
        self._running: dict[int, tuple[int, float]] = {}
        """By request: drafts so far and the sum of their confidences; -1 drafts: its sample was taken."""
        self._samples_per_step = 0.0
        self._spread = 1.0
        """Variance of a sum of BURST samples over that of independent ones."""
        self._reset()

    def _reset(self) -> None:
        self._count = self._burst = 0
        self._mean = self._variance = self._burst_sum = 0.0
        self._above, self._below = _Side(), _Side()

    def update(self, values: Sequence[float], request_ids: Sequence[int]) -> TrafficChange | None:
        """Take one step: the watched value of every request [b], NaN where unknown; a change when established with it."""
        samples: list[float] = []
        running, self._running = self._running, {}
        for request, value in zip(request_ids, values, strict=True):
            drafts, total = running.pop(request, (0, 0.0))
            if drafts >= 0 and not math.isnan(value):
                drafts, total = drafts + 1, total + value
                if drafts >= self.SAMPLE_STEPS:
                    samples.append(total / drafts)
                    drafts = -1
            self._running[request] = drafts, total
        samples += [total / drafts for drafts, total in running.values() if drafts >= self.MIN_STEPS]
        self._samples_per_step += self.PACE * (len(samples) - self._samples_per_step)
        change = None
        for sample in samples:
            change = self._take(sample) or change
        return change

    def _take(self, sample: float) -> TrafficChange | None:
        deviation = sample - self._mean if self._count else 0.0
        if self._count >= self.LEARNING and self._variance > 0.0:
            spread = self._variance * (1.0 + self.MEAN_VARIANCE / self._count) * max(self._spread, 1.0)
            z = min(max(deviation / math.sqrt(spread), -self.CLIP), self.CLIP)
            self._above.add(z - self.DELTA, sample)
            self._below.add(-z - self.DELTA, sample)
            leading = max(self._above, self._below, key=lambda side: side.sum)
            if leading.sum > self.THRESHOLD + math.log(max(16.0 * self._samples_per_step, 1.0)):
                change = TrafficChange(self._mean, leading.total / leading.samples)
                self._reset()
                return change
            self._burst, self._burst_sum = self._burst + 1, self._burst_sum + deviation
            if self._burst == self.BURST:
                ratio = self._burst_sum**2 / (self.BURST * self._variance)
                self._spread += self.BURST_PACE * (min(ratio, self.CLIP**2) - self._spread)
                self._burst, self._burst_sum = 0, 0.0
            if leading.sum > self.SUSPICION:
                return None
        self._count += 1
        pace = max(1.0 / self._count, self.PACE)
        self._mean = sample if self._count == 1 else self._mean + pace * deviation
        self._variance += pace * (deviation * deviation - self._variance)
        return None
