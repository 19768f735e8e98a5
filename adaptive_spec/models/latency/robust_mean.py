"""Robust forgetting means of a measured time, one per key (a token count, or a plan).

    seconds = exp(speed factor) * mean(key)
    weight <- weight (1 - 1/memory) + 1,    mean <- mean + (seconds exp(-speed factor) - mean) / weight

A mean covers about the last `memory` samples, each divided by the speed factor it was measured at (`speed_factor.py`). Regimes:

- Young: the first samples are kept one by one, and the mean is that of the small ones. A first replay of a captured graph takes
  up to twice too long and never too short.
- Settled: a sample is clipped to a few standard deviations around the expected value, so that a spike hardly moves the mean.
- Measured elsewhere: a mean last measured at another speed factor gets a larger standard error, in proportion to the
  difference, until it is measured again or the old speed factor returns.
- Changed: several outliers in a row on one side restart the mean, and enlarge the standard error of every mean not measured
  since, because the shape of the curve may have changed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.latency.speed_factor import MAX_SIGMA, MIN_JUMP, MIN_SIGMA, SpeedFactor, running_median
from adaptive_spec.models.plausible import LARGEST_WEIGHT, plausible

YOUNG_SAMPLES = 8
"""Samples of a new mean that are kept one by one."""
ABSENT_S = 1e-7
"""Seconds of a stage that did not run: they say nothing about the speed factor."""
MIN_COMPARABLE = 3
"""Samples from which on a mean tells something about the speed factor."""
MAX_OUTLIERS, MAX_OUTLIERS_LIGHT = 10, 4
"""Outliers of one mean in a row, all on one side, after which it restarts; the same for one of weight <= `LIGHT_WEIGHT`."""
LIGHT_WEIGHT = 12.0
STALE_STEPS = 40_000
"""Age in decode steps at which a mean counts as unknown."""
ERROR_PER_LOG_SPEED = 0.5
"""Relative standard error of a mean per unit of log speed factor since it was measured: a curve rarely moves all as one."""
JUMP_ERROR = 0.1
"""Relative standard error of a mean after a jump of the speed factor since it was measured: a kernel may have changed."""
MAX_UNSEEN_ERROR = 0.3
MAX_FOLLOWED, FAR = 0.7, 1.5
"""Change of the log speed factor that a mean is assumed to follow unmeasured, and the one beyond which it restarts."""
MOST_MEANS = 1024
"""Means kept by default: beyond that the one measured longest ago goes. It bounds a refit, see `benchmarks/refit.py`."""
MAX_SHAPE_CHANGES = 8
"""Latest changes of the curve's shape that are remembered."""
CLIP_SIGMAS = 4.0
MOST_ROWS = 1 << 18
LARGEST_SQUARES = 1e32
"""Of a sum of squared differences of KV tokens over the memory of `Slope`."""
COLUMNS = (
    ("key", 0.0, 2.0**21), ("weight", 1e-12, LARGEST_WEIGHT), ("mean_x", 0.0, 2.0**41), ("seconds", 1e-15, 1e9),
    ("samples", 0.0, LARGEST_WEIGHT), ("age in steps", 0.0, LARGEST_WEIGHT), ("unseen error", 0.0, 1.0),
)  # fmt: skip
"""Columns of `rows` with the smallest and the largest value that is plausible in a file: those that records may lead to."""


class RobustMean:
    """Forgetting means of a covariate x (total KV tokens) and of seconds y. weight: effective samples.

    mean_y: at speed factor 0. log_speed: speed factor at the last sample. last_x, last_y: that sample as it was measured.
    """

    __slots__ = ("first", "last_step", "last_x", "last_y", "log_speed", "mean_x", "mean_y", "outliers", "samples", "weight")

    def __init__(self) -> None:
        self.weight = self.mean_x = self.mean_y = self.last_x = self.last_y = self.log_speed = 0.0
        self.samples = self.last_step = self.outliers = 0
        self.first: list[tuple[float, float]] = []

    def add(self, x: float, y: float, decay: float) -> None:
        """Forget by `decay` (0..1, 1 forgets nothing), then add one sample (weighted form of Welford, 1962)."""
        self.weight = self.weight * decay + 1.0
        self.mean_x += (x - self.mean_x) / self.weight
        self.mean_y += (y - self.mean_y) / self.weight

    def restart(self) -> None:
        """Forget everything: the next sample is the first. Until then the old mean stands."""
        self.samples = self.outliers = 0
        self.first.clear()

    @classmethod
    def from_weighted(cls, x: Floats, y: Floats, weight: Floats) -> RobustMean:
        """The same means from all samples at once: x, y, weight [n], n >= 1."""
        mean = cls()
        mean.weight = float(weight.sum())
        mean.mean_x, mean.mean_y = float(weight @ x) / mean.weight, float(weight @ y) / mean.weight
        mean.samples = len(x)
        return mean


class Slope:
    """Seconds per unit of x, from differences between successive samples of one mean.

        relative slope = max(sum(dx dy / y) - 2 sqrt(2 sigma^2 sum(dx^2)), 0) / sum(dx^2)

    Differences over at most `NEAR_STEPS` steps cancel all other drift. Two standard errors are subtracted, so that little
    variation of x gives slope 0.
    """

    NEAR_STEPS = 64
    DECAY = 1.0 - 1.0 / 20_000

    def __init__(self) -> None:
        self.xx = self.xy = 0.0

    def add(self, dx: float, relative_dy: float, limit: float) -> None:
        """One difference; its relative change of y is clipped to +-limit."""
        self.xx = self.xx * self.DECAY + dx * dx
        self.xy = self.xy * self.DECAY + dx * min(max(relative_dy, -limit), limit)

    def relative(self, sigma: float, typical_x: float) -> float:
        """Slope relative to y, per unit of x, 0..0.8 / typical_x. sigma: noise of one sample; typical_x > 0."""
        if self.xx <= 0.0:
            return 0.0
        lower_bound = self.xy - 2.0 * math.sqrt(2.0 * self.xx) * sigma
        return min(max(lower_bound / self.xx, 0.0), 0.8 / typical_x)


class RobustMeans:
    """Robust means by integer key, divided by a speed factor that others move.

    memory_samples: samples a mean remembers, >= 1 (inf: forgets nothing). most: means kept, the latest measured ones.
    `LeadingMeans` are those that move the speed factor.
    """

    def __init__(self, memory_samples: float, speed_factor: SpeedFactor, most: int = MOST_MEANS) -> None:
        self.decay = 1.0 - 1.0 / memory_samples
        self.most = most
        self.means: dict[int, RobustMean] = {}
        """By key; the one measured longest ago is the first."""
        self.median_noise = 0.01
        """Running median of |log(sample / the one before it of the same key)|, which no error of a mean can inflate."""
        self.slope = Slope()
        self.speed_factor = speed_factor
        self._shape_changes: deque[tuple[int, float]] = deque(maxlen=MAX_SHAPE_CHANGES)
        """(step, relative standard error it leaves in means not measured since)."""

    @property
    def sigma(self) -> float:
        """Relative standard deviation of one sample."""
        return min(max(self.median_noise / 0.9539, MIN_SIGMA), MAX_SIGMA)  # median |N(0, 2 sigma^2)| = 0.9539 sigma

    def observe(self, key: int, x: float, y: float, step: int, slope: float = 0.0) -> None:
        """Take one sample: covariate x, y > 0 seconds, at decode step `step`; slope: seconds per unit of x."""
        mean = self.means.pop(key, None)
        if mean is None:
            mean = RobustMean()
            if len(self.means) >= self.most:
                del self.means[next(iter(self.means))]
        self.means[key] = mean
        if step - mean.last_step >= STALE_STEPS // 2 or abs(self.speed_factor.value - mean.log_speed) > FAR:
            mean.restart()
        if mean.samples and mean.last_y > 0.0:
            self._learn_noise_and_slope(mean, x, y, step)
        y0 = y * math.exp(-self.speed_factor.value)
        if mean.samples >= MIN_COMPARABLE and y > ABSENT_S:
            y0 *= math.exp(-self._move_speed_factor(mean, x, y0, step, slope))
        if mean.samples < YOUNG_SAMPLES:
            mean.first.append((x, y0))
            self._rebuild_young(mean)
        else:
            self._learn(mean, x, self._expected(mean, x, slope), y0, step)
        mean.samples += 1
        mean.last_step, mean.last_x, mean.last_y, mean.log_speed = step, x, y, self.speed_factor.value

    def _move_speed_factor(self, mean: RobustMean, x: float, y0: float, step: int, slope: float) -> float:
        """Move the speed factor by one sample, y0 seconds at its present value; return the change. Followers never do."""
        return 0.0

    def unseen_error(self, mean: RobustMean) -> float:
        """Relative standard error of a mean from changes since it was measured: of the speed factor, or of the curve's shape."""
        # The speed factor itself is known to half a standard deviation of a sample.
        moved = abs(self.speed_factor.value - mean.log_speed) - 0.5 * self.sigma
        return min(math.hypot(ERROR_PER_LOG_SPEED * max(moved, 0.0), self._shape_error(mean)), MAX_UNSEEN_ERROR)

    def _shape_error(self, mean: RobustMean) -> float:
        """The part of `unseen_error` from changes of the curve's shape."""
        return max((error for step, error in self._shape_changes if step > mean.last_step), default=0.0)

    def _expected(self, mean: RobustMean, x: float, slope: float) -> float:
        """Seconds at speed factor 0; the covariate moves them by half at most. slope: at the present speed factor."""
        expected = mean.mean_y + slope * math.exp(-self.speed_factor.value) * (x - mean.mean_x)
        return min(max(expected, 0.5 * mean.mean_y), 2.0 * mean.mean_y)

    def _learn_noise_and_slope(self, mean: RobustMean, x: float, y: float, step: int) -> None:
        """Learn from the difference to the last sample of the same key."""
        change = math.log(y / mean.last_y)
        self.median_noise = running_median(self.median_noise, abs(change), 1.02)
        if step - mean.last_step <= Slope.NEAR_STEPS:
            self.slope.add(x - mean.last_x, change, CLIP_SIGMAS * self.sigma)

    def _learn(self, mean: RobustMean, x: float, expected: float, y0: float, step: int) -> None:
        """Add a clipped sample to a settled mean, whose weight first falls to what its unseen error leaves of it."""
        residual = math.log(y0 / expected)
        error = self.unseen_error(mean)
        limit = CLIP_SIGMAS * math.hypot(self.sigma, error)
        mean.weight = 1.0 / (1.0 / mean.weight + (error / self.sigma) ** 2)
        mean.add(x, expected * math.exp(min(max(residual, -limit), limit)), self.decay)
        if abs(residual) < limit:
            mean.outliers = 0
            return
        side = 1 if residual > 0.0 else -1
        mean.outliers = mean.outliers + side if mean.outliers * side > 0 else side
        if abs(mean.outliers) >= (MAX_OUTLIERS if mean.weight > LIGHT_WEIGHT else MAX_OUTLIERS_LIGHT):
            mean.restart()  # this mean changed and the speed factor did not: others may have changed too
            self._shape_changes.append((step, min(ERROR_PER_LOG_SPEED * abs(residual), MAX_UNSEEN_ERROR)))

    def _rebuild_young(self, mean: RobustMean) -> None:
        """Compute a young mean from its kept samples: those within the noise of a small one."""
        ordered = sorted(y for _, y in mean.first)
        small = ordered[(len(ordered) - 1) // 3]
        margin = CLIP_SIGMAS * self.sigma
        mean.weight = mean.mean_x = mean.mean_y = 0.0
        for x, y in mean.first:
            if small * (1.0 - margin) <= y <= small * (1.0 + margin):
                mean.add(x, y, self.decay)

    def rows(self) -> Floats:
        """Means at the present speed factor, float64 [means, 7], by key; without those more than `FAR` from it.

        Columns: key, weight (what `unseen_error` leaves of it), mean_x, mean_y, samples, age in steps, `unseen_error`.
        """
        # The same arithmetic as `unseen_error`, vectorised: there may be thousands of means.
        table = [
            (key, m.weight, m.mean_x, m.mean_y, m.samples, m.last_step, m.log_speed)
            for key, m in self.means.items()
            if m.weight > 0.0
        ]
        rows = np.fromiter(chain.from_iterable(table), np.float64).reshape(-1, 7)
        # Distance to the present factor or to the announced one: a short burst must not discard the means.
        nearest = np.minimum(np.abs(self.speed_factor.value - rows[:, 6]), np.abs(self.speed_factor.announced - rows[:, 6]))
        rows = rows[nearest <= FAR]
        last_step, log_speed, sigma = rows[:, 5], rows[:, 6], self.sigma
        moved = self.speed_factor.value - log_speed
        changed = np.zeros(len(rows))
        for step, error in self._shape_changes:
            np.maximum(changed, error, out=changed, where=last_step < step)
        errors = np.hypot(ERROR_PER_LOG_SPEED * np.maximum(np.abs(moved) - 0.5 * sigma, 0.0), changed)
        errors = np.minimum(errors, MAX_UNSEEN_ERROR)
        rows[:, 1] = 1.0 / (1.0 / rows[:, 1] + (errors / sigma) ** 2)
        rows[:, 3] *= np.exp(log_speed + np.clip(moved, -MAX_FOLLOWED, MAX_FOLLOWED))
        rows[:, 6] = errors
        rows = rows[np.argsort(rows[:, 0])]
        rows[:, 5] = rows[:, 5].max(initial=-np.inf) - rows[:, 5]
        return rows

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {"rows": self.rows(), "noise": np.array([self.median_noise, self.slope.xx, self.slope.xy])}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()` as of step 0 and the present speed factor. Raises ValueError when it cannot be one."""
        rows = plausible("rows", state["rows"], (None, 7), -LARGEST_WEIGHT, LARGEST_WEIGHT)
        if len(rows) > MOST_ROWS:
            raise ValueError(f"rows: must be at most {MOST_ROWS}, got {len(rows)}")
        for column, (name, low, high) in enumerate(COLUMNS):
            plausible(f"rows: {name}", rows[:, column], (None,), low, high)
        noise = plausible("noise", state["noise"], (3,), -LARGEST_SQUARES, LARGEST_SQUARES)
        if not 0.0 < noise[0] < 1.0 or noise[1] < 0.0:
            raise ValueError("noise: must be between 0 and 1, and squares at least 0")
        self.means.clear()
        self.median_noise, self.slope.xx, self.slope.xy = noise.tolist()
        latest = rows[np.argsort(-rows[:, 5], kind="stable")][-self.most :]
        for key, weight, mean_x, mean_y, samples, age, _ in latest.tolist():
            mean = self.means[int(key)] = RobustMean()
            mean.weight, mean.mean_x, mean.mean_y = weight, mean_x, mean_y * math.exp(-self.speed_factor.value)
            mean.log_speed = self.speed_factor.value
            mean.samples, mean.last_step = max(int(samples), YOUNG_SAMPLES), -int(age)


class LeadingMeans(RobustMeans):
    """Robust means whose samples also move their speed factor. There is one such table per speed factor."""

    def _move_speed_factor(self, mean: RobustMean, x: float, y0: float, step: int, slope: float) -> float:
        # Where the shape of the curve may have changed, a residual says more of that than of the speed factor.
        trust = self.sigma**2 / (self.sigma**2 + self._shape_error(mean) ** 2)
        moved = self.speed_factor.follow(trust * math.log(y0 / self._expected(mean, x, slope)), self.sigma)
        if abs(moved) >= MIN_JUMP:
            self._shape_changes.append((step, JUMP_ERROR))
            for other in self.means.values():
                other.outliers = 0
        return moved
