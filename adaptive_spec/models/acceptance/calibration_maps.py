"""Calibration maps: cumulative draft score -> P(accept), four ways, each fitted to the same histogram of decaying counts.

    linear    P_j = clip(a + b s_j)                         one line for all positions (the offline guide's map)
    binned    P_j = accepted / verified in the bin of s_j     per position, with the pooled bins as prior
    logistic  P_j = sigmoid(a_j + b_j logit s_j)              per position, River's online models
    chain     P_j = prod_i<=j sigmoid(a_i + b_i logit p_i)    per position on the confidence p_i of each token, learnt only
                                                              where all before it were accepted

s_j is the cumulative score p_1 ... p_j. Regimes: with few samples linear and logistic have less variance; chain is exact when
acceptance depends on each token's own confidence alone; binned fits any shape once there is data. The map with the
lowest prequential log loss is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from river.linear_model import LogisticRegression
from river.optim import SGD

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.survival import GRID_POINTS, LOGIT_LIMIT, SurvivalMap
from adaptive_spec.models.plausible import LARGEST_COEFFICIENT, labels_counted, plausible

GRID: Floats = np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, GRID_POINTS)
GRID_SCORE: Floats = 1.0 / (1.0 + np.exp(-GRID))
FLOOR = 1e-4
"""Probabilities are clipped to FLOOR..1 - FLOOR, so that a log loss stays finite after a change."""


class ScoreHistogram:
    """Verified and accepted draft tokens by position and score, forgetting: two arrays [max_k, GRID_POINTS]."""

    def __init__(self, max_k: int) -> None:
        self.verified: Floats = np.zeros((max_k, GRID_POINTS))
        self.accepted: Floats = np.zeros((max_k, GRID_POINTS))

    def forget(self, factor: float, floor: float = 0.0) -> None:
        """Multiply all weights by `factor`, 0..1, but let no position fall below `floor` labels by it.

        A position that is no longer drafted keeps a little of its last rate.
        """
        total = self.verified.sum(axis=1, keepdims=True)
        kept = np.where(total > floor, np.maximum(factor, floor / np.maximum(total, 1e-12)), 1.0) if floor else factor
        self.verified *= kept
        self.accepted *= kept

    def add(self, position: NDArray[np.int64], score_index: NDArray[np.int64], label: NDArray[np.bool_]) -> None:
        """Count labelled draft tokens: position [n] from 0, grid index [n], accepted or not [n]."""
        shape = self.verified.shape
        flat = position * GRID_POINTS + score_index
        self.verified += np.bincount(flat, minlength=self.verified.size).reshape(shape)
        self.accepted += np.bincount(flat[label], minlength=self.accepted.size).reshape(shape)

    def state(self) -> NDArray[np.float64]:
        return np.stack((self.verified, self.accepted))

    def restore(self, state: NDArray[np.float64]) -> None:
        """Raise ValueError when the array cannot be a histogram of this shape."""
        self.verified, self.accepted = labels_counted("score histogram", state, self.verified.shape)


def sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0))))


def fit_logistic(verified: Floats, accepted: Floats, prior: Floats, prior_weight: float) -> Floats:
    """Weighted logistic regression on the grid: arrays [rows, GRID_POINTS] -> coefficients [rows, 2] (intercept, slope).

    Newton's method from the prior [rows, 2] with a Gaussian prior around it worth about `prior_weight` labels. Slopes are
    kept >= 0.05: acceptance that falls with the score is noise.
    """
    theta = prior.copy()
    precision = np.array([0.25, 0.5]) * prior_weight
    x = GRID
    powers = np.stack((np.ones_like(x), x, x * x), axis=-1)
    for _ in range(8):
        p = sigmoid(theta[:, :1] + theta[:, 1:] * x)
        g0, g1 = ((accepted - verified * p) @ powers[:, :2] - (theta - prior) * precision).T
        h00, h01, h11 = ((verified * p * (1.0 - p) + 1e-9 * verified) @ powers).T
        h00, h11 = h00 + precision[0], h11 + precision[1]
        step = (np.stack((h11 * g0 - h01 * g1, h00 * g1 - h01 * g0)) / (h00 * h11 - h01 * h01)).T
        theta = theta + np.clip(step, -1.5, 1.5)
        theta[:, 1] = np.maximum(theta[:, 1], 0.05)
        if np.abs(step).max(initial=0.0) < 1e-6:
            break
    return theta


def chain_map(at_risk: ScoreHistogram) -> SurvivalMap:
    """Conditional logistic per position. Its prior is the pooled one, whose prior is the identity."""
    identity = np.array([[0.0, 1.0]])
    pooled = fit_logistic(at_risk.verified.sum(0, keepdims=True), at_risk.accepted.sum(0, keepdims=True), identity, 8.0)
    theta = fit_logistic(at_risk.verified, at_risk.accepted, np.repeat(pooled, len(at_risk.verified), axis=0), 30.0)
    return _map(sigmoid(theta[:, :1] + theta[:, 1:] * GRID), conditional=True)


def linear_map(histogram: ScoreHistogram) -> SurvivalMap:
    """Least squares of the label on the score, one line for all positions, clipped to probabilities."""
    n = histogram.verified.sum(0) + 1e-3  # a little of the identity line keeps it defined without data
    y = histogram.accepted.sum(0) + 1e-3 * GRID_SCORE
    total = n.sum()
    mean_s, mean_y = float(n @ GRID_SCORE / total), float(y.sum() / total)
    slope = float(y @ (GRID_SCORE - mean_s)) / max(float(n @ (GRID_SCORE - mean_s) ** 2), 1e-12)
    value = mean_y + slope * (GRID_SCORE - mean_s)
    return _map(np.repeat(value[None, :], len(histogram.verified), axis=0), conditional=False)


def binned_map(histogram: ScoreHistogram) -> SurvivalMap:
    """Observed acceptance per position and bin, smoothed with its neighbours, then made non-decreasing in the score."""
    kernel = np.array([0.25, 0.5, 1.0, 0.5, 0.25])
    shape = histogram.verified.shape
    smooth = np.array([np.convolve(row, kernel, "same") for row in histogram.verified]).reshape(shape)
    hits = np.array([np.convolve(row, kernel, "same") for row in histogram.accepted]).reshape(shape)
    pooled_n, pooled_y = smooth.sum(0), hits.sum(0)
    pooled = (pooled_y + 4.0 * GRID_SCORE) / (pooled_n + 4.0)
    value = (hits + 8.0 * pooled) / (smooth + 8.0)
    rising = [_rising(v, w) for v, w in zip(value, smooth + 1.0, strict=True)]
    return _map(np.array(rising, dtype=np.float64).reshape(value.shape), conditional=False)


class RiverLogistic:
    """River's online logistic regression, one per position: a constant learning rate, so old samples fade.

    learning_rate: 0 < rate < 1; larger forgets faster and is noisier. Per-sample Python learns some ten thousand samples a
    second, so the caller passes a bounded subsample.
    """

    def __init__(self, max_k: int, learning_rate: float = 0.03) -> None:
        self.models = [LogisticRegression(SGD(learning_rate), intercept_lr=learning_rate, initializer=None) for _ in range(max_k)]
        for model in self.models:
            model.learn_one({"logit": 0.0}, True)  # makes River allocate the weight
            self._set(model, 0.0, 1.0)

    def learn(self, position: NDArray[np.int64], x: Floats, label: NDArray[np.bool_]) -> None:
        """Learn samples one by one: position [n] from 0, logit of the cumulative score [n], label [n]."""
        for j, value, accepted in zip(position.tolist(), x.tolist(), label.tolist(), strict=True):
            self.models[j].learn_one({"logit": value}, accepted)

    def coefficients(self) -> Floats:
        """Intercept and slope per position [max_k, 2]."""
        rows = [[float(m.intercept), float(m.weights["logit"])] for m in self.models]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def restore(self, coefficients: NDArray[np.float64]) -> None:
        """Raise ValueError unless the array is finite and [max_k, 2]."""
        shape = (len(self.models), 2)
        coefficients = plausible("logistic coefficients", coefficients, shape, -LARGEST_COEFFICIENT, LARGEST_COEFFICIENT)
        for model, (intercept, slope) in zip(self.models, coefficients.tolist(), strict=True):
            self._set(model, intercept, slope)

    def map(self) -> SurvivalMap:
        theta = self.coefficients()
        return _map(sigmoid(theta[:, :1] + np.maximum(theta[:, 1:], 0.05) * GRID), conditional=False)

    @staticmethod
    def _set(model: LogisticRegression, intercept: float, slope: float) -> None:
        model.intercept = intercept
        model.weights["logit"] = slope


def all_maps(cumulative: ScoreHistogram, at_risk: ScoreHistogram, river: RiverLogistic) -> Mapping[str, SurvivalMap]:
    """Every candidate, by kind."""
    return {
        "chain": chain_map(at_risk),
        "logistic": river.map(),
        "binned": binned_map(cumulative),
        "linear": linear_map(cumulative),
    }


def rate_map(rates: Floats) -> SurvivalMap:
    """P(position j accepted | all before were), rates [max_k], whatever the confidence."""
    return _map(np.repeat(rates[:, None], GRID_POINTS, axis=1), conditional=True)


def _map(value: Floats, conditional: bool) -> SurvivalMap:
    return SurvivalMap(np.clip(value, FLOOR, 1.0 - FLOOR).astype(np.float32), conditional)


def _rising(value: Floats, weight: Floats) -> Floats:
    """Closest non-decreasing sequence in weighted least squares (pool adjacent violators; Barlow et al., 1972)."""
    blocks: list[list[float]] = []
    for v, w in zip(value.tolist(), weight.tolist(), strict=True):
        blocks.append([v, w, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            v2, w2, n2 = blocks.pop()
            v1, w1, n1 = blocks.pop()
            blocks.append([(v1 * w1 + v2 * w2) / (w1 + w2), w1 + w2, n1 + n2])
    return np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks])
