"""Robust forgetting means of a measured time, one per key (a token count, or a plan).

    seconds = exp(speed factor) * mean(key)
    weight <- weight (1 - 1/memory) + 1,    mean <- mean + (seconds exp(-speed factor) - mean) / weight

A mean covers about the last `memory` samples, each divided by the speed factor it was measured at (`speed_factor.py`). Regimes:

- Young: the first samples are kept one by one and the small ones count. First replays run up to twice too long, never too short.
- Settled: a sample is clipped to a few standard deviations around the expected value, so that a spike hardly moves the mean.
- Doubtful: a mean last measured at another speed factor gets a larger standard error, in proportion to the difference, until it
  is measured again or the old speed factor returns.
- Changed: several outliers in a row on one side start the mean again, and make every mean doubtful that was not measured since,
  because the curve may have another shape.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.latency.speed_factor import LEAST_JUMP, MAX_SIGMA, MIN_SIGMA, Shift, SpeedFactor, running_median

HELD_BACK = 8
"""Samples of a young cell that are kept one by one."""
COMPARABLE = 3
"""Samples from which on a cell tells something about the speed factor."""
OUTLIERS, UNSURE_OUTLIERS = 10, 4
"""Samples of one cell in a row, all on one side and all outliers, after which it begins again; the same of an unsure one."""
UNSURE_WEIGHT = 12.0
STALE_STEPS = 40_000
"""Age at which a cell counts as unknown."""
UNSEEN_DOUBT = 0.5
"""Relative standard error of a cell per unit of speed factor since it was measured: a curve rarely moves all as one."""
JUMP_DOUBT = 0.1
"""Relative standard error of a mean after a jump of the speed factor that it did not see: a kernel may have changed."""
MOST_DOUBT = 0.3
MOST_MOVED, FAR = 0.7, 1.5
"""Change of speed factor (log) that a cell is believed to have followed unseen, and the one after which it begins again."""
CHANGES = 8
"""Late changes of the curve's shape that are remembered."""
CLIP_SIGMAS = 4.0


class RobustMean:
    """Forgetting means of a covariate x (total KV tokens) and of seconds y. weight: effective samples.

    speed factor: at the last sample. last_x, last_y: that sample as it was measured.
    """

    __slots__ = ("first", "last_step", "last_x", "last_y", "mean_x", "mean_y", "outliers", "samples", "speed_factor", "weight")

    def __init__(self) -> None:
        self.weight = self.mean_x = self.mean_y = self.last_x = self.last_y = self.speed_factor = 0.0
        self.samples = self.last_step = self.outliers = 0
        self.first: list[tuple[float, float]] = []

    def add(self, x: float, y: float, decay: float) -> None:
        """Forget by `decay` (0..1, 1 forgets nothing), then add one sample (weighted form of Welford, 1962)."""
        self.weight = self.weight * decay + 1.0
        self.mean_x += (x - self.mean_x) / self.weight
        self.mean_y += (y - self.mean_y) / self.weight

    def begin(self) -> None:
        """Forget everything: the next sample is the first."""
        self.samples = self.outliers = 0
        self.first.clear()

    @classmethod
    def from_weighted(cls, x: Floats, y: Floats, weight: Floats) -> RobustMean:
        """The same means from all samples at once: x, y, weight [n], n >= 1."""
        cell = cls()
        cell.weight = float(weight.sum())
        cell.mean_x, cell.mean_y = float(weight @ x) / cell.weight, float(weight @ y) / cell.weight
        cell.samples = len(x)
        return cell


class Slope:
    """Seconds per unit of x, from differences between neighbouring samples of one cell.

        relative slope = max(sum(dx dy / y) - 2 sqrt(2 sigma^2 sum(dx^2)), 0) / sum(dx^2)

    Differences over at most `NEAR_STEPS` steps cancel whatever else drifts. Two standard errors are taken off, so that
    nothing is claimed from little variation.
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
        """Slope relative to y, per unit of x, >= 0. sigma: noise of one sample; typical_x > 0."""
        if self.xx <= 0.0:
            return 0.0
        sure = self.xy - 2.0 * math.sqrt(2.0 * self.xx) * sigma
        return min(max(sure / self.xx, 0.0), 0.8 / typical_x)


class RobustMeans:
    """Cells by integer key. memory_samples: samples a cell remembers, >= 1 (inf: forgets nothing).

    speed factor: one that another table follows, to be shared; None: this table follows one of its own.
    """

    def __init__(self, memory_samples: float, speed_factor: SpeedFactor | None = None) -> None:
        self.decay = 1.0 - 1.0 / memory_samples
        self.cells: dict[int, RobustMean] = {}
        self.median_noise = 0.01
        """Running median of |log(sample / the one before it in its cell)|, which no error of a mean can inflate."""
        self.slope = Slope()
        self.speed_factor = speed_factor or SpeedFactor()
        self._leads = speed_factor is None
        self._changes: deque[tuple[int, float]] = deque(maxlen=CHANGES)
        """(step, relative standard error it leaves in cells not measured since) of what told that the shape may have changed."""

    @property
    def sigma(self) -> float:
        """Relative standard deviation of one sample."""
        return min(max(self.median_noise / 0.9539, MIN_SIGMA), MAX_SIGMA)  # median |N(0, 2 sigma^2)| = 0.9539 sigma

    def observe(self, key: int, x: float, y: float, step: int, slope: float = 0.0) -> Shift | None:
        """Take one sample: covariate x, y > 0 seconds, at decode step `step`; slope: seconds per unit of x.

        Returns a Shift when with this sample a new speed factor has lasted long enough to be called one.
        """
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = RobustMean()
        if step - cell.last_step >= STALE_STEPS // 2 or abs(self.speed_factor.value - cell.speed_factor) > FAR:
            cell.begin()  # too old, or of another world
        if cell.samples and cell.last_y > 0.0:
            self._neighbours(cell, x, y, step)
        comparable = cell.samples >= COMPARABLE
        usual_y = y * math.exp(-self.speed_factor.value)
        if comparable and self._leads:
            residual = math.log(usual_y / self._expected(cell, x, slope))
            moved = self.speed_factor.follow(residual, self.sigma)
            usual_y *= math.exp(-moved)
            if abs(moved) >= LEAST_JUMP:
                self._changes.append((step, JUMP_DOUBT))
                for other in self.cells.values():
                    other.outliers = 0
        if cell.samples < HELD_BACK:
            cell.first.append((x, usual_y))
            self._hold_back(cell)
        else:
            self._learn(cell, x, self._expected(cell, x, slope), usual_y, step)
        cell.samples += 1
        cell.last_step, cell.last_x, cell.last_y, cell.speed_factor = step, x, y, self.speed_factor.value
        return self.speed_factor.news() if self._leads else None

    def doubt(self, cell: RobustMean) -> float:
        """Relative standard error of a cell from having been measured at another speed factor or before a change of shape."""
        moved = abs(self.speed_factor.value - cell.speed_factor) - 0.5 * self.sigma  # the speed_factor itself is known no better
        changed = max((doubt for step, doubt in self._changes if step > cell.last_step), default=0.0)
        return min(math.hypot(UNSEEN_DOUBT * max(moved, 0.0), changed), MOST_DOUBT)

    def _believed(self, cell: RobustMean, doubt: float) -> float:
        """Effective samples that a doubtful cell is worth."""
        return 1.0 / (1.0 / cell.weight + (doubt / self.sigma) ** 2)

    def _expected(self, cell: RobustMean, x: float, slope: float) -> float:
        """Seconds at the usual speed factor; the covariate moves them by half at most. slope: at the present speed factor."""
        expected = cell.mean_y + slope * math.exp(-self.speed_factor.value) * (x - cell.mean_x)
        return min(max(expected, 0.5 * cell.mean_y), 2.0 * cell.mean_y)

    def _neighbours(self, cell: RobustMean, x: float, y: float, step: int) -> None:
        """Learn noise and slope from the difference to the last sample of the cell."""
        change = math.log(y / cell.last_y)
        self.median_noise = running_median(self.median_noise, abs(change), 1.02)
        if step - cell.last_step <= Slope.NEAR_STEPS:
            self.slope.add(x - cell.last_x, change, CLIP_SIGMAS * self.sigma)

    def _learn(self, cell: RobustMean, x: float, expected: float, usual_y: float, step: int) -> None:
        residual = math.log(usual_y / expected)
        doubt = self.doubt(cell)
        limit = CLIP_SIGMAS * math.hypot(self.sigma, doubt)
        cell.weight = self._believed(cell, doubt)
        cell.add(x, expected * math.exp(min(max(residual, -limit), limit)), self.decay)
        if abs(residual) < limit:
            cell.outliers = 0
            return
        side = 1 if residual > 0.0 else -1
        cell.outliers = cell.outliers + side if cell.outliers * side > 0 else side
        if abs(cell.outliers) >= (OUTLIERS if cell.weight > UNSURE_WEIGHT else UNSURE_OUTLIERS):
            cell.begin()  # this one has changed and the speed_factor has not: who knows what of the others
            self._changes.append((step, min(UNSEEN_DOUBT * abs(residual), MOST_DOUBT)))

    def _hold_back(self, cell: RobustMean) -> None:
        """Rebuild a young cell from its samples: those within the noise of a small one."""
        ordered = sorted(y for _, y in cell.first)
        small = ordered[(len(ordered) - 1) // 3]
        margin = CLIP_SIGMAS * self.sigma
        cell.weight = cell.mean_x = cell.mean_y = 0.0
        for x, y in cell.first:
            if small * (1.0 - margin) <= y <= small * (1.0 + margin):
                cell.add(x, y, self.decay)

    def rows(self) -> Floats:
        """Measured cells at the present speed factor, float64 [cells, 7], by key; not those of another world (`FAR`).

        Columns: key, weight (as believed at this speed factor), mean_x, mean_y, samples, age in steps, `doubt`.
        """
        # The same arithmetic as for one cell, on all of them: there may be thousands.
        cells = [
            (k, c.weight, c.mean_x, c.mean_y, c.samples, c.last_step, c.speed_factor)
            for k, c in self.cells.items()
            if c.weight > 0.0
        ]
        rows = np.array(cells, dtype=np.float64).reshape(-1, 7)
        # Of the speed_factor of now and the one that has lasted: a burst that passes makes no other world.
        nearest = np.minimum(np.abs(self.speed_factor.value - rows[:, 6]), np.abs(self.speed_factor.announced - rows[:, 6]))
        rows = rows[nearest <= FAR]
        last_step, speed_factor, sigma = rows[:, 5], rows[:, 6], self.sigma
        moved = self.speed_factor.value - speed_factor
        changed = np.zeros(len(rows))
        for step, doubt in self._changes:
            np.maximum(changed, doubt, out=changed, where=last_step < step)
        doubts = np.minimum(np.hypot(UNSEEN_DOUBT * np.maximum(np.abs(moved) - 0.5 * sigma, 0.0), changed), MOST_DOUBT)
        rows[:, 1] = 1.0 / (1.0 / rows[:, 1] + (doubts / sigma) ** 2)
        rows[:, 3] *= np.exp(speed_factor + np.clip(moved, -MOST_MOVED, MOST_MOVED))
        rows[:, 6] = doubts
        rows = rows[np.argsort(rows[:, 0])]
        rows[:, 5] = rows[:, 5].max(initial=-np.inf) - rows[:, 5]
        return rows

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {"rows": self.rows(), "noise": np.array([self.median_noise, self.slope.xx, self.slope.xy])}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()`; raise ValueError when it cannot be one."""
        rows, noise = np.asarray(state["rows"], dtype=np.float64), np.asarray(state["noise"], dtype=np.float64)
        if (
            rows.ndim != 2
            or rows.shape[1] != 7
            or noise.shape != (3,)
            or not (np.isfinite(rows).all() and np.isfinite(noise).all())
        ):
            raise ValueError("table of cells has the wrong shape or values that are not finite")
        if (rows[:, 0] < 0).any() or (rows[:, 1] <= 0).any() or (rows[:, 3] <= 0).any() or not 0 < noise[0] < 1:
            raise ValueError("table of cells holds values no measurement can have")
        self.cells.clear()
        self.median_noise, self.slope.xx, self.slope.xy = noise.tolist()
        for key, weight, mean_x, mean_y, samples, age, _ in rows.tolist():
            cell = self.cells[int(key)] = RobustMean()
            cell.weight, cell.mean_x, cell.mean_y = weight, mean_x, mean_y * math.exp(-self.speed_factor.value)
            cell.speed_factor = self.speed_factor.value
            cell.samples, cell.last_step = max(int(samples), HELD_BACK), -int(age)
