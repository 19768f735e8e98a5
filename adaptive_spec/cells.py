"""Robust forgetting statistics of a measured time, one cell per key (a token count, or a plan).

    seconds = exp(level) * cell mean(key)
    weight <- weight (1 - 1/memory) + 1,    mean <- mean + (seconds - mean) / weight

so a cell averages about the last `memory` samples. Regimes. Young: the first samples of a cell are held back and the small
ones stand for it (real first replays run up to twice too long, never too short). Settled: every sample is clipped to a few
times the noise around what was expected, so that a spike hardly moves it. Disturbed: when the median of a window of samples,
over all keys, leaves the expected, the level moves and nothing is learnt: a burst of slowness comes and goes without leaving
a trace. Shifted: a level that lasts (heat, a neighbour, a driver) is folded into every cell, and those which were not
measured meanwhile are doubtful until they are.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

HELD_BACK = 8
"""Samples of a young cell that are kept one by one."""
COMPARABLE = 3
"""Samples from which on a cell takes part in the shift test."""
WINDOW = 12
"""Samples the shift test looks at."""
SHIFTED_AFTER = 32
"""Samples a level must last to be called a shift."""
OUTLIERS = 10
"""Samples of one cell in a row, all on one side and all outliers, after which it begins again by itself."""
UNSURE_WEIGHT, UNSURE_OUTLIERS = 6.0, 4
"""What a cell still weighs that a shift has moved unseen, and how many outliers prove that it moved otherwise."""
STALE_STEPS = 40_000
"""Age at which a cell counts as unknown."""
QUIET_SIGMA = 0.05
"""Noise up to which a shift is taken for a change of the world, after which no unseen cell is believed."""
CLIP_SIGMAS = 4.0
MIN_SIGMA, MAX_SIGMA = 0.004, 0.25


class Cell:
    """Forgetting means of a covariate x (total KV tokens) and of seconds y. weight: effective samples."""

    __slots__ = ("first", "last_step", "last_x", "last_y", "mean_x", "mean_y", "outliers", "samples", "weight")

    def __init__(self) -> None:
        self.weight = self.mean_x = self.mean_y = self.last_x = self.last_y = 0.0
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

    def scale(self, ratio: float) -> None:
        """Multiply what was measured by `ratio`."""
        self.mean_y *= ratio
        self.first = [(x, y * ratio) for x, y in self.first]

    @classmethod
    def from_weighted(cls, x: Floats, y: Floats, weight: Floats) -> Cell:
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


@dataclass(frozen=True)
class Shift:
    """The whole table moved: seconds are now `ratio` times what was expected."""

    ratio: float


class CellTable:
    """Cells by integer key. memory_samples: samples a cell remembers, >= 1 (inf: forgets nothing).

    level: log of how much slower everything is now than the cells say.
    """

    def __init__(self, memory_samples: float) -> None:
        self.decay = 1.0 - 1.0 / memory_samples
        self.cells: dict[int, Cell] = {}
        self.median_noise = 0.01
        """Running median of |log(sample / the one before it in its cell)|, which no error of a mean can inflate."""
        self.slope = Slope()
        self.level = 0.0
        self._level_step = 0
        self._level_samples = 0
        self._lean = 0.0
        self._window: deque[float] = deque(maxlen=WINDOW)

    @property
    def sigma(self) -> float:
        """Relative standard deviation of one sample."""
        return min(max(self.median_noise / 0.9539, MIN_SIGMA), MAX_SIGMA)  # median |N(0, 2 sigma^2)| = 0.9539 sigma

    @property
    def shift_limit(self) -> float:
        """Median of a window of log residuals that is no accident: 4.5 of its standard errors, and at least 4 %."""
        return max(0.04, 4.5 * 1.25 * self.sigma / math.sqrt(WINDOW))

    def observe(self, key: int, x: float, y: float, step: int, slope: float = 0.0) -> Shift | None:
        """Take one sample: covariate x, y > 0 seconds, at decode step `step`; slope: seconds per unit of x.

        Returns a Shift when with this sample a level has lasted long enough to be called one.
        """
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell()
        if step - cell.last_step >= STALE_STEPS // 2:
            cell.begin()  # too old to be believed, or moved by a shift it did not see
        if cell.samples and cell.last_y > 0.0:
            self._neighbours(cell, x, y, step)
        cell.last_step, cell.last_x, cell.last_y = step, x, y
        expected = min(max(cell.mean_y + slope * (x - cell.mean_x), 0.5 * cell.mean_y), 2.0 * cell.mean_y)
        young = cell.samples < HELD_BACK
        residual = math.log(y / expected) if cell.samples >= COMPARABLE else 0.0
        if cell.samples >= COMPARABLE:
            self._follow_level(residual, step)
        if self.level != 0.0:
            return self._shift(step)
        cell.samples += 1
        if young:
            cell.first.append((x, y))
            self._hold_back(cell)
        else:
            self._learn(cell, x, expected, residual)
        return None

    def _neighbours(self, cell: Cell, x: float, y: float, step: int) -> None:
        """Learn noise and slope from the difference to the last sample of the cell."""
        change = math.log(y / cell.last_y)
        # Robbins-Monro on the median: 2 % a step, so that it settles within some hundred samples and ignores spikes.
        self.median_noise *= 1.02 if abs(change) > self.median_noise else 1 / 1.02
        self.median_noise = min(max(self.median_noise, MIN_SIGMA), MAX_SIGMA)
        if step - cell.last_step <= Slope.NEAR_STEPS:
            self.slope.add(x - cell.last_x, change, CLIP_SIGMAS * self.sigma)

    def _learn(self, cell: Cell, x: float, expected: float, residual: float) -> None:
        limit = CLIP_SIGMAS * self.sigma
        cell.add(x, expected * math.exp(min(max(residual, -limit), limit)), self.decay)
        if abs(residual) < limit:
            cell.outliers = 0
            return
        side = 1 if residual > 0.0 else -1
        cell.outliers = cell.outliers + side if cell.outliers * side > 0 else side
        if abs(cell.outliers) >= (OUTLIERS if cell.weight > 2.0 * UNSURE_WEIGHT else UNSURE_OUTLIERS):
            cell.begin()  # this one has changed, the others have not

    def _follow_level(self, residual: float, step: int) -> None:
        self._window.append(residual)
        limit = self.shift_limit
        self._lean += 0.15 * (min(max(residual - self.level, -2.0 * limit), 2.0 * limit) - self._lean)
        # The median of the window is only worth taking when a running mean has begun to lean.
        if abs(self._lean) < 0.25 * limit or len(self._window) < WINDOW:
            return
        moved = statistics.median(self._window) - self.level
        if abs(moved) < limit:
            return
        # The window still holds some samples from before the change: they say nothing about its size.
        level = statistics.median(r for r in self._window if (r - self.level) / moved > 0.5)
        self.level = level if abs(level) >= limit else 0.0
        self._level_step, self._level_samples, self._lean = step, 0, 0.0
        self._window.clear()
        for cell in self.cells.values():
            cell.outliers = 0

    def _shift(self, step: int) -> Shift | None:
        """Fold a level that has lasted into the cells."""
        self._level_samples += 1
        if self._level_samples < SHIFTED_AFTER:
            return None
        ratio = math.exp(self.level)
        for cell in self.cells.values():
            cell.scale(ratio)
            if cell.last_step < self._level_step:
                # On a noisy machine levels come and go with its neighbours: there a shift says less about other cells.
                cell.last_step -= int(STALE_STEPS * min(1.0, (QUIET_SIGMA / self.sigma) ** 2))
                cell.weight = min(cell.weight, UNSURE_WEIGHT)
        self.level = self._lean = 0.0
        self._window.clear()
        return Shift(ratio)

    def _hold_back(self, cell: Cell) -> None:
        """Rebuild a young cell from its samples: those within the noise of a small one."""
        ordered = sorted(y for _, y in cell.first)
        small = ordered[(len(ordered) - 1) // 3]
        margin = CLIP_SIGMAS * self.sigma
        cell.weight = cell.mean_x = cell.mean_y = 0.0
        for x, y in cell.first:
            if small * (1.0 - margin) <= y <= small * (1.0 + margin):
                cell.add(x, y, self.decay)

    def rows(self) -> Floats:
        """Measured cells at the present level, float64 [cells, 6]: key, weight, mean_x, mean_y, samples, age in steps; by key."""
        cells = [(k, c.weight, c.mean_x, c.mean_y, c.samples, c.last_step) for k, c in self.cells.items() if c.weight > 0.0]
        rows = np.array(cells, dtype=np.float64).reshape(-1, 6)
        rows = rows[np.argsort(rows[:, 0])]
        rows[:, 3] *= math.exp(self.level)
        rows[:, 5] = rows[:, 5].max(initial=-np.inf) - rows[:, 5]
        return rows

    def state(self) -> dict[str, NDArray[np.float64]]:
        return {"rows": self.rows(), "noise": np.array([self.median_noise, self.slope.xx, self.slope.xy])}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()`; raise ValueError when it cannot be one."""
        rows, noise = np.asarray(state["rows"], dtype=np.float64), np.asarray(state["noise"], dtype=np.float64)
        if (
            rows.ndim != 2
            or rows.shape[1] != 6
            or noise.shape != (3,)
            or not (np.isfinite(rows).all() and np.isfinite(noise).all())
        ):
            raise ValueError("table of cells has the wrong shape or values that are not finite")
        if (rows[:, 0] < 0).any() or (rows[:, 1] <= 0).any() or (rows[:, 3] <= 0).any() or not 0 < noise[0] < 1:
            raise ValueError("table of cells holds values no measurement can have")
        self.cells.clear()
        self._window.clear()
        self.level = 0.0
        self.median_noise, self.slope.xx, self.slope.xy = noise.tolist()
        for key, weight, mean_x, mean_y, samples, age in rows.tolist():
            cell = self.cells[int(key)] = Cell()
            cell.weight, cell.mean_x, cell.mean_y = weight, mean_x, mean_y
            cell.samples, cell.last_step = max(int(samples), HELD_BACK), -int(age)
