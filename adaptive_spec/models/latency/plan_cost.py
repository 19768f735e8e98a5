"""What drafting costs, as a function of the plan (K, batch size): the stages draft and draft-extend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.engine_info import LARGEST_BATCH
from adaptive_spec.models.latency.robust_mean import ABSENT_S, LeadingMeans
from adaptive_spec.models.latency.speed_factor import SpeedFactor
from adaptive_spec.models.latency.staircase import UNKNOWN_PER_DOUBLING
from adaptive_spec.models.plausible import LARGEST_WEIGHT, plausible

UNMEASURED_FIXED = 0.08
"""Relative standard error of the fixed cost of a plan that was never measured."""
MOST_PLANS = 512
"""Plans with a mean of their own, the latest measured ones: costs of drafting are smooth, the regression has the others."""
MISFIT_BETWEEN = 0.1
"""Relative deviation of a plan's fixed cost from the regression over all plans."""


class PlanCostModel:
    """Seconds of one stage as a function of the plan (K, batch size b), for draft and draft-extend.

        seconds(K, b) = [1(K>0), b 1(K>0), (K-1)+, b (K-1)+, 1, b] . coefficients, all >= 0

    The first draft token often comes with the draft-extend at no extra cost, so K counts from the second. The prediction for a
    plan is its own mean and the regression over all plans, weighted by precision; the regression weighs as much as one sample
    whose relative error is `MISFIT_BETWEEN`. speed_factor: the stage's own, led by its samples.
    """

    FEATURES = 6

    def __init__(self, memory_samples: float, max_batch: int, speed_factor: SpeedFactor) -> None:
        self._means = LeadingMeans(memory_samples, speed_factor, MOST_PLANS)
        self.stride = max_batch + 1
        self.coefficients: Floats = np.zeros(self.FEATURES)
        self._rows: Floats = self._means.rows()

    def observe(self, k: int, batch_size: int, seconds: float, step: int) -> None:
        """Learn one stage time; seconds >= 0 (an absent stage is 0)."""
        self._means.observe(k * self.stride + min(batch_size, self.stride - 1), 0.0, max(seconds, ABSENT_S), step)

    def refit(self) -> None:
        """Fit the regression to the present means."""
        self._rows = rows = self._means.rows()
        if not len(rows):
            return
        k, b = np.divmod(rows[:, 0], self.stride)
        weight = np.sqrt(np.minimum(rows[:, 1], 8.0)) / np.maximum(rows[:, 3], 1e-6)
        design = (_of_k(k)[:, :, None] * np.stack((np.ones_like(b), b), axis=-1)[:, None, :]).reshape(-1, self.FEATURES)
        scale = np.maximum(np.abs(design).max(axis=0), 1e-12)
        # Weak ridge prior: when data cannot separate the features, attribute cost to draft tokens first and to batch size last.
        # A wrong cost per request would be multiplied as soon as a large batch comes.
        prior = np.diag(np.array([0.3, 3.0, 0.03, 1.0, 0.1, 1.0]) ** 2)
        system = design / scale * weight[:, None]
        self.coefficients = non_negative_least_squares(system.T @ system + prior, system.T @ (rows[:, 3] * weight)) / scale

    def predict(self, max_k: int, max_batch: int) -> tuple[Floats, Floats]:
        """Return seconds [max_k + 1, max_batch + 1] and the standard error of each in seconds, as of the last refit.

        The relative error is `UNMEASURED_FIXED` where nothing was measured, grows with every doubling of b away from all measured
        batch sizes, and falls with the square root of the weight.
        """
        b = np.arange(max_batch + 1.0)
        value: Floats = _of_k(np.arange(max_k + 1.0)) @ self.coefficients.reshape(-1, 2) @ np.stack((np.ones_like(b), b))
        weight = np.zeros_like(value)
        rows = self._rows
        row, column = np.divmod(rows[:, 0].astype(np.int64), self.stride)
        inside = (row <= max_k) & (column <= max_batch)
        at, measured_rows = (row[inside], column[inside]), rows[inside]
        regression_weight = (self._means.sigma / MISFIT_BETWEEN) ** 2
        value[at] += measured_rows[:, 1] / (measured_rows[:, 1] + regression_weight) * (measured_rows[:, 3] - value[at])
        weight[at] = measured_rows[:, 1]
        octaves = np.log2(np.maximum(b, 1.0))
        measured = np.log2(np.unique(np.maximum(column, 1))) if len(column) else np.zeros(1)
        above = np.searchsorted(measured, octaves)
        near = measured[np.maximum(above - 1, 0)], measured[np.minimum(above, len(measured) - 1)]
        distance = np.minimum(np.abs(octaves - near[0]), np.abs(octaves - near[1]))
        error = np.hypot(UNMEASURED_FIXED, UNKNOWN_PER_DOUBLING * distance) / np.sqrt(1.0 + weight)
        return value, value * error

    def state(self) -> dict[str, NDArray[np.float64]]:
        """As `RobustMeans.state`, and the plan (K, batch size) of each row: a row's key depends on the largest batch."""
        state = self._means.state()
        return {**state, "plans": np.stack(np.divmod(state["rows"][:, 0], self.stride), axis=-1)}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()`, also of an engine with another largest batch or K: plans beyond this one's are left out.

        Without "plans", as older versions wrote it, the largest batch must be the same. Raises ValueError when it cannot be a
        state.
        """
        if "plans" not in state:
            self._means.restore(state)
            return
        rows = plausible("rows", state["rows"], (None, 7), -LARGEST_WEIGHT, LARGEST_WEIGHT)
        plans = plausible("plans", state["plans"], (len(rows), 2), 0.0, LARGEST_BATCH)
        rows[:, 0] = plans[:, 0] * self.stride + plans[:, 1]
        self._means.restore({**state, "rows": rows[plans[:, 1] < self.stride]})


def _of_k(k: Floats) -> Floats:
    """Features of K [n] that are constant in the batch size, and proportional to it: [n, 3]."""
    return np.stack((k > 0, np.maximum(k - 1.0, 0.0), np.ones_like(k)), axis=-1)


def non_negative_least_squares(gram: Floats, moment: Floats) -> Floats:
    """Minimise x gram x / 2 - moment x over x >= 0 for a handful of unknowns, dropping negative ones (active set).

    gram: positive definite.
    """
    active = np.ones(len(moment), dtype=bool)
    solution = np.zeros(len(moment))
    while active.any():
        part = np.linalg.solve(gram[np.ix_(active, active)], moment[active])
        if (part >= 0.0).all():
            solution[active] = part
            break
        indices = np.flatnonzero(active)
        active[indices[part < 0.0]] = False
    return solution
