"""Speed factor: how much slower all plans are than their means say, one factor common to all of them (natural log).

    seconds(key, now) = exp(f) * mean(key)
    f <- f + gain * clip(residual)             every sample; the gain is larger while residuals lean to one side
    f <- f + median of the last residuals      when that median is significant

Heat, clock changes and other programs change all plans alike. Followed apart, they leave the shape of the curve, and with it
the choice of K, unchanged. Regimes. Steady: f hovers around a constant and noise is averaged out. Wandering: f follows within
some tens of samples. Jumping: a window of residuals on one side moves it at once. A factor that stays away from the one last
announced is reported as a `Shift`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

SLOW_GAIN, QUICK_GAIN = 0.01, 0.1
"""Share of a residual the speed factor takes, larger follows sooner and is noisier: in quiet, and while residuals lean."""
LEANING = 0.75
"""Mean of late residuals, in standard deviations of one, that is no quiet: 2.6 of its own."""
WINDOW = 12
"""Samples a jump is judged by."""
ANNOUNCED = 0.08
"""Change of speed factor (log) that is news; smaller ones come and go on any shared machine."""
LASTING = 48
"""Samples a new speed factor must last to be announced."""
LEAST_JUMP = 0.04
FARTHEST = 20.0
"""SpeedFactor (log) at which counting begins anew: on a machine in turmoil it may walk away, and numbers must stay numbers."""
SCALE_OF_MEDIAN = 0.6745
"""Median of |N(0, 1)|."""
MIN_SIGMA, MAX_SIGMA = 0.004, 0.25


@dataclass(frozen=True)
class Shift:
    """The speed factor has changed for good: seconds are `ratio` times what they were when last announced."""

    ratio: float


class SpeedFactor:
    """See the module. value: natural log of the factor, 0 at first. announced: the value last reported."""

    def __init__(self) -> None:
        self.value = 0.0
        self.median_residual = 0.01
        """Running median of |residual|: noise, and what else the cells do not explain."""
        self.announced = 0.0
        self._away = 0
        self._lean = 0.0
        self._window: deque[float] = deque(maxlen=WINDOW)

    def jump_limit(self, sigma: float) -> float:
        """Median of a window of residuals that is no accident. sigma: relative noise of one sample.

        4.5 of its standard errors, at least 4 %, and 2 standard deviations of single residuals: what the cells leave
        unexplained (the make-up of a batch) lasts for a window and longer.
        """
        return max(LEAST_JUMP, 4.5 * 1.25 * sigma / math.sqrt(WINDOW), 2.0 * self.median_residual / SCALE_OF_MEDIAN)

    def follow(self, residual: float, sigma: float) -> float:
        """Take one residual, log(seconds / expected at the present speed factor); return the change of the factor."""
        self.median_residual = running_median(self.median_residual, abs(residual), 1.01)
        limit = self.jump_limit(sigma)
        self._window.append(residual)
        clipped = min(max(residual, -limit), limit)
        self._lean += 0.15 * (clipped - self._lean)
        moved = clipped * (QUICK_GAIN if abs(self._lean) > LEANING * sigma else SLOW_GAIN)
        # The median of the window is only worth taking when a running mean has begun to lean.
        if abs(self._lean) >= 0.25 * limit and len(self._window) == WINDOW:
            median = statistics.median(self._window)
            if abs(median) >= limit:
                # The window still holds some samples from before the jump: they say nothing about its size.
                moved = statistics.median(r for r in self._window if r / median > 0.5)
                self._window.clear()
                self._lean = 0.0
        self.value += moved
        if abs(self.value) > FARTHEST:
            self.value = self.announced = 0.0  # every cell begins again when it is measured
        return moved

    def news(self) -> Shift | None:
        """Ask once after every sample: a Shift when the speed factor has stayed away from the one last announced."""
        away = self.value - self.announced
        if abs(away) < ANNOUNCED:
            self._away = 0
            return None
        self._away += 1
        if self._away < LASTING:
            return None
        self.announced, self._away = self.value, 0
        return Shift(math.exp(away))


def running_median(median: float, value: float, pace: float) -> float:
    """Robbins-Monro on the median: a factor `pace` a sample, so that it settles within some hundred and ignores spikes."""
    return min(max(median * (pace if value > median else 1.0 / pace), MIN_SIGMA), MAX_SIGMA)
