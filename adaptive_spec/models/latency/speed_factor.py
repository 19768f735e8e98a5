"""Speed factor: how much slower every plan is than its mean says, one factor common to all plans (natural log).

    seconds(key, now) = exp(f) * mean(key)
    f <- f + gain * clip(residual)             every sample; the gain is larger while residuals stay on one side
    f <- f + median of the last residuals      when that median is significant

Heat, clock changes and other programs slow all plans alike. Tracking their common factor apart from the means keeps the shape
of the latency curve, and with it the choice of K, unchanged. Regimes. Steady: f stays near a constant and noise is averaged
out. Drifting: f follows within some tens of samples. Jump: a window of residuals on one side moves f at once. A factor that
stays away from the value last announced is reported as a `Shift`.

Verify latency has the base factor. The draft stages have one each: the base factor times an own one, which their own samples
move. So a change that all stages share reaches a stage that is not measured at once, and one of verification alone
(another kernel) is taken back by the stage's own samples. Each is led by the means that use it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

SLOW_GAIN, FAST_GAIN = 0.01, 0.1
"""Share of a residual the speed factor takes while residuals are centred, and while they stay on one side. Larger follows
sooner and is noisier."""
ONE_SIDED = 0.75
"""Running mean of residuals, in standard deviations of one, beyond which they count as one-sided: 2.6 of its own."""
WINDOW = 12
"""Samples a jump is judged by."""
MIN_SHIFT = 0.08
"""Change of the speed factor (log) that is announced; smaller ones are common on a shared machine."""
SHIFT_SAMPLES, SHIFT_S = 48, 1.0
"""Samples, and seconds of steps, that a new speed factor must last before it is announced: most bursts are shorter."""
UNREST_SAMPLES, MAX_JUMPS = 500, 32
"""Samples for which a slowness that came and went is remembered, as long as batch sizes are; jumps remembered."""
MIN_JUMP = 0.04
MAX_LOG_FACTOR = 20.0
"""Reset to 0 when |log factor| exceeds this, to avoid overflow."""
SCALE_OF_MEDIAN = 0.6745
"""Median of |N(0, 1)|."""
MIN_SIGMA, MAX_SIGMA = 0.004, 1.0
"""Limits of the relative standard deviation of one sample."""


@dataclass(frozen=True)
class Shift:
    """A lasting change of the speed factor: seconds are `ratio` times what they were when last announced."""

    ratio: float


class SpeedFactor:
    """value: natural log of the factor, 0 at first, that of `base` included. announced: the value last reported as a `Shift`,
    0 at first.
    """

    def __init__(self, base: SpeedFactor | None = None) -> None:
        self._base = base
        self._own = 0.0
        self.median_residual = 0.01
        """Running median of |residual|: noise and model error."""
        self.announced = 0.0
        self._samples_beyond, self._seconds_beyond = 0, 0.0
        self._mean_residual = 0.0
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._samples = 0
        self._jumps: deque[tuple[int, float]] = deque(maxlen=MAX_JUMPS)
        """(sample, change) of the latest jumps."""
        self._base_value = 0.0
        """Of `base` at the last residual."""

    @property
    def value(self) -> float:
        return self._own if self._base is None else self._own + self._base.value

    @value.setter
    def value(self, value: float) -> None:
        self._own = value - (0.0 if self._base is None else self._base.value)

    def jump_limit(self, sigma: float) -> float:
        """Smallest significant median of a window of residuals. sigma: relative noise of one sample.

        At least 4.5 of its standard errors, 4 %, and 2 standard deviations of single residuals: model error (the make-up of a
        batch) may last longer than a window.
        """
        return max(MIN_JUMP, 4.5 * 1.25 * sigma / math.sqrt(WINDOW), 2.0 * self.median_residual / SCALE_OF_MEDIAN)

    @property
    def unrest(self) -> float:
        """Size (log) of a slowness that came and went within the last `UNREST_SAMPLES`, 0: none did.

        The smaller of what the jumps up and the jumps down sum to, at most the largest jump. One lasting change has no unrest.
        While there is unrest, part of what is measured belongs to the plan and part to the moment.
        """
        moves = [moved for sample, moved in self._jumps if self._samples - sample < UNREST_SAMPLES]
        ups, downs = sum(m for m in moves if m > 0.0), -sum(m for m in moves if m < 0.0)
        return min(ups, downs, max(map(abs, moves), default=0.0))

    def follow(self, residual: float, sigma: float) -> float:
        """Take one residual, log(seconds / expected at the present speed factor); return the change of `value`."""
        self._follow_base()
        self._samples += 1
        self.median_residual = running_median(self.median_residual, abs(residual), 1.01)
        limit = self.jump_limit(sigma)
        self._window.append(residual)
        clipped = min(max(residual, -limit), limit)
        self._mean_residual += 0.15 * (clipped - self._mean_residual)
        moved = clipped * (FAST_GAIN if abs(self._mean_residual) > ONE_SIDED * sigma else SLOW_GAIN)
        # Cheap test first: the median is computed only while the running mean is off centre.
        if abs(self._mean_residual) >= 0.25 * limit and len(self._window) == WINDOW:
            median = statistics.median(self._window)
            if abs(median) >= limit:
                # The window still holds samples from before the jump. They say nothing about its size.
                moved = statistics.median(r for r in self._window if r / median > 0.5)
                self._window.clear()
                self._mean_residual = 0.0
                self._jumps.append((self._samples, moved))
        self._own += moved
        if abs(self._own) > MAX_LOG_FACTOR:
            self._own = self.announced = 0.0  # every mean starts again when it is next measured
        return moved

    def _follow_base(self) -> None:
        """Where the base has jumped, the residuals in the window are of before: the jump must not be followed twice."""
        if self._base is None:
            return
        if abs(self._base.value - self._base_value) >= MIN_JUMP:
            self._window.clear()
            self._mean_residual = 0.0
        self._base_value = self._base.value

    def shift(self, seconds: float = math.inf) -> Shift | None:
        """Call once after every sample. Returns a Shift when the value has stayed away from `announced` long enough.

        seconds: since the sample before; inf: not known, and only samples count.
        """
        change = self.value - self.announced
        if abs(change) < MIN_SHIFT:
            self._samples_beyond, self._seconds_beyond = 0, 0.0
            return None
        self._samples_beyond += 1
        self._seconds_beyond += seconds
        if self._samples_beyond < SHIFT_SAMPLES or self._seconds_beyond < SHIFT_S:
            return None
        self.announced, self._samples_beyond, self._seconds_beyond = self.value, 0, 0.0
        return Shift(math.exp(change))


def running_median(median: float, value: float, pace: float) -> float:
    """Running median (Robbins-Monro): moves by a factor `pace` per sample, settles in some hundred, ignores spikes."""
    return min(max(median * (pace if value > median else 1.0 / pace), MIN_SIGMA), MAX_SIGMA)
