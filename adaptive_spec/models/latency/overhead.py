"""Overhead: what is left of a step beside its stages. A difference of measured times, so its noise is additive.

    seconds(K, b) = [1, 1(K>0), K, b] . coefficients, all >= 0

Forgetting least squares on the samples themselves: a mean of ratios or of logs would be biased, because a small difference of
large times is often near zero or below. Samples are clipped to a few standard deviations around the prediction; a long run of
clipped ones means that the overhead has changed, and forgets the past. A weak ridge attributes what the plans seen cannot
separate to the constant first and to the batch size last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.latency.plan_cost import non_negative_least_squares
from adaptive_spec.models.plausible import LARGEST_WEIGHT, plausible

FEATURES = 4
DECAY = 1.0 - 1.0 / 256.0
"""Weight of a sample one sample later: the noise of one sample, often as large as the overhead, is averaged out 16-fold."""
CLIP_SDS = 4.0
MAX_CLIPPED = 12
"""Clipped samples in a row, all on one side, after which the past is forgotten."""
RIDGE = np.array([0.01, 0.3, 1.0, 3.0])
"""Prior precision of each coefficient, in samples, at the largest feature seen."""
SPREAD_PACE = 1.03
"""Factor by which the running median of differences between samples moves with each."""


class OverheadModel:
    """Overhead by plan. max_k, max_batch: of the engine. The prediction is as of the last `refit`."""

    def __init__(self, max_k: int, max_batch: int) -> None:
        self._scale = np.array([1.0, 1.0, max(max_k, 1), max_batch], dtype=np.float64)
        self._gram = np.zeros((FEATURES, FEATURES))
        self._moment = np.zeros(FEATURES)
        self._last_s = 0.0
        self._median_change_s = 0.0
        self._clipped = 0
        self.coefficients: Floats = np.zeros(FEATURES)
        """Of the features divided by `_scale`."""
        self._fitted = False

    @property
    def sd_s(self) -> float:
        """Standard deviation of one sample, seconds."""
        return self._median_change_s / 0.9539  # median |N(0, 2 sd^2)| = 0.9539 sd

    def observe(self, k: int, batch_size: int, seconds: float) -> None:
        """Learn one overhead, of any sign."""
        x = np.array([1.0, float(k > 0), float(k), float(batch_size)]) / self._scale
        change_s = abs(seconds - self._last_s)
        self._last_s = seconds
        if self._median_change_s <= 0.0:
            self._median_change_s = change_s if self._gram[0, 0] > 0.0 else 0.0
        else:
            self._median_change_s *= SPREAD_PACE if change_s > self._median_change_s else 1.0 / SPREAD_PACE
        if self._fitted and self._median_change_s > 0.0:
            expected_s, limit_s = float(x @ self.coefficients), CLIP_SDS * self.sd_s
            side = (seconds > expected_s + limit_s) - (seconds < expected_s - limit_s)
            self._clipped = self._clipped + side if side * self._clipped > 0 else side
            seconds = min(max(seconds, expected_s - limit_s), expected_s + limit_s)
            if abs(self._clipped) >= MAX_CLIPPED:
                self._gram[:], self._moment[:], self._fitted, self._clipped = 0.0, 0.0, False, 0
        self._gram = self._gram * DECAY + np.outer(x, x)
        self._moment = self._moment * DECAY + x * seconds

    def refit(self) -> None:
        """Solve for the coefficients."""
        if self._gram[0, 0] <= 0.0:
            return
        self.coefficients = non_negative_least_squares(self._gram + np.diag(RIDGE), self._moment)
        self._fitted = True

    def predict(self, max_k: int, max_batch: int) -> tuple[Floats, Floats]:
        """Return seconds [max_k + 1, max_batch + 1] and the standard error of each in seconds."""
        k, b = np.arange(max_k + 1.0), np.arange(max_batch + 1.0) / self._scale[3]
        plan = np.stack((np.ones_like(k), k > 0, k), axis=-1) / self._scale[:3]
        c = np.linalg.inv(self._gram + np.diag(RIDGE))
        seconds = (plan @ self.coefficients[:3])[:, None] + self.coefficients[3] * b
        variance = (plan @ c[:3, :3] * plan).sum(axis=1)[:, None] + 2.0 * (plan @ c[:3, 3])[:, None] * b + c[3, 3] * b * b
        # The prior is as wide as the overhead itself.
        return seconds, np.hypot(self.sd_s, 0.3 * float(self.coefficients[0])) * np.sqrt(variance)

    def state(self) -> NDArray[np.float64]:
        """[FEATURES, FEATURES + 2]: the Gram matrix, the moments, and a column with the running median."""
        extra = np.array([self._median_change_s, self._last_s, 0.0, 0.0])
        return np.column_stack((self._gram, self._moment, extra))

    def restore(self, state: NDArray[Any]) -> None:
        """Take over `state()`. Raises ValueError, and changes nothing, when it cannot be one."""
        found = np.asarray(state, dtype=np.float64)
        plausible("overhead", found, (FEATURES, FEATURES + 2), -LARGEST_WEIGHT, LARGEST_WEIGHT)
        if found[0, -1] < 0.0:
            raise ValueError(f"overhead: the median change must be at least 0, got {found[0, -1]:g}")
        if np.linalg.eigvalsh(found[:, :FEATURES]).min() < -1e-6 * max(float(found[0, 0]), 1.0):
            raise ValueError("overhead: must have a Gram matrix, got one with a negative eigenvalue")
        self._gram, self._moment = found[:, :FEATURES].copy(), found[:, FEATURES].copy()
        self._median_change_s, self._last_s = float(found[0, -1]), float(found[1, -1])
        self._fitted = False
        self.refit()
