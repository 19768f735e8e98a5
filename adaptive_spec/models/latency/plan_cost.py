"""What a step costs beside verification, as a function of the plan (K, batch size): draft, draft-extend and overhead."""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.latency.robust_mean import RobustMeans
from adaptive_spec.models.latency.speed_factor import Shift, SpeedFactor
from adaptive_spec.models.latency.staircase import UNKNOWN_PER_DOUBLING

UNMEASURED_FIXED = 0.08
"""Relative standard error of the fixed cost of a plan that was never measured."""
MISFIT_BETWEEN = 0.1
"""Relative deviation of a plan's fixed cost from the regression over all plans."""


class PlanCostModel:
    """Seconds of one stage as a function of the plan (K, batch size b), for draft, draft-extend and overhead.

        seconds(K, b) = [1(K>0), (K-1)+, b 1(K>0), b (K-1)+, 1, b] . coefficients, all >= 0

    The first draft token often comes with the draft-extend and costs nothing more, so K counts from the second. Plans measured
    often speak for themselves; the regression speaks for the others, and weighs as much as one sample whose relative error is
    `MISFIT_BETWEEN`. speed_factor: that of the verify latency, which all stages share; None: one of its own.
    """

    FEATURES = 6

    def __init__(self, memory_samples: float, max_batch: int, speed_factor: SpeedFactor | None = None) -> None:
        self.table = RobustMeans(memory_samples, speed_factor)
        self.stride = max_batch + 1
        self.coefficients: Floats = np.zeros(self.FEATURES)
        self._rows: Floats = self.table.rows()

    def observe(self, k: int, batch_size: int, seconds: float, step: int) -> Shift | None:
        """Learn one stage time; seconds >= 0 (an absent stage is 0)."""
        return self.table.observe(k * self.stride + min(batch_size, self.stride - 1), 0.0, max(seconds, 1e-7), step)

    def refit(self) -> None:
        self._rows = rows = self.table.rows()
        if not len(rows):
            return
        k, b = np.divmod(rows[:, 0], self.stride)
        weight = np.sqrt(np.minimum(rows[:, 1], 8.0)) / np.maximum(rows[:, 3], 1e-6)
        design = self._features(k, b)
        scale = np.maximum(np.abs(design).max(axis=0), 1e-12)
        # A light ridge settles what the plans seen so far cannot tell apart: rather a cost per draft token than per step, and
        # rather none per request, which one small batch after another would suffer from when a large one comes.
        prior = np.diag([0.3, 0.03, 3.0, 1.0, 0.1, 1.0])
        system = np.vstack((design / scale * weight[:, None], prior))
        target = np.concatenate((rows[:, 3] * weight, np.zeros(self.FEATURES)))
        self.coefficients = non_negative_least_squares(system, target) / scale

    def predict(self, max_k: int, max_batch: int) -> tuple[Floats, Floats]:
        """Return seconds [max_k + 1, max_batch + 1] and the relative standard error of each, as of the last refit.

        `UNMEASURED_FIXED` where nothing was measured, more with every doubling of b away from all that was; less with weight.
        """
        k, b = np.meshgrid(np.arange(max_k + 1.0), np.arange(max_batch + 1.0), indexing="ij")
        value: Floats = self._features(k.ravel(), b.ravel()) @ self.coefficients
        value = value.reshape(max_k + 1, max_batch + 1)
        weight = np.zeros_like(value)
        rows = self._rows
        row, column = np.divmod(rows[:, 0].astype(np.int64), self.stride)
        inside = (row <= max_k) & (column <= max_batch)
        at, cells = (row[inside], column[inside]), rows[inside]
        worth = (self.table.sigma / MISFIT_BETWEEN) ** 2
        value[at] += cells[:, 1] / (cells[:, 1] + worth) * (cells[:, 3] - value[at])
        weight[at] = cells[:, 1]
        measured = np.log2(np.unique(np.maximum(column, 1)))
        octaves = np.log2(np.maximum(np.arange(max_batch + 1.0), 1.0))
        distance = np.abs(octaves[:, None] - measured).min(axis=1) if len(measured) else octaves
        error = np.hypot(UNMEASURED_FIXED, UNKNOWN_PER_DOUBLING * distance) / np.sqrt(1.0 + weight)
        return value, error

    @staticmethod
    def _features(k: Floats, b: Floats) -> Floats:
        on, more = (k > 0).astype(np.float64), np.maximum(k - 1.0, 0.0)
        return np.stack((on, more, b * on, b * more, np.ones_like(k), b), axis=-1)


def non_negative_least_squares(system: Floats, target: Floats) -> Floats:
    """Minimise |system @ x - target| over x >= 0 for a handful of unknowns, by dropping negative ones (active set)."""
    active = np.ones(system.shape[1], dtype=bool)
    solution = np.zeros(system.shape[1])
    while active.any():
        part = np.linalg.lstsq(system[:, active], target, rcond=None)[0]
        if (part >= 0.0).all():
            solution[active] = part
            break
        indices = np.flatnonzero(active)
        active[indices[part < 0.0]] = False
    return solution
