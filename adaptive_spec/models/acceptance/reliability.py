"""How well a calibration predicts: reliability table, expected calibration error, Brier score, log loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats

BINS = 15


class Reliability:
    """Forgetting reliability table: weight, sum of predictions, sum of labels per bin; ECE, Brier score, log loss."""

    def __init__(self) -> None:
        self.by_prediction: Floats = np.zeros((3, BINS))
        self.by_score: Floats = np.zeros((3, BINS))
        self.totals: Floats = np.zeros(3)
        """Weight, sum of squared errors, sum of log losses."""

    def forget(self, factor: float) -> None:
        self.by_prediction *= factor
        self.by_score *= factor
        self.totals *= factor

    def add(self, predicted: Floats, score: Floats, label: NDArray[np.bool_], loss: Floats) -> None:
        """predicted, cumulative score, label, log loss: [n]."""
        for table, value in ((self.by_prediction, predicted), (self.by_score, score)):
            index = np.minimum((value * BINS).astype(np.int64), BINS - 1)
            table[0] += np.bincount(index, minlength=BINS)
            table[1] += np.bincount(index, weights=predicted, minlength=BINS)
            table[2] += np.bincount(index[label], minlength=BINS)
        self.totals += (len(label), float(((predicted - label) ** 2).sum()), float(loss.sum()))

    @property
    def ece(self) -> float | None:
        """Expected calibration error (Naeini et al., 2015): mean |predicted - observed| over equal-width bins, by weight."""
        n, predicted, observed = self.by_prediction
        return float(np.abs(predicted - observed).sum() / n.sum()) if n.sum() > 0 else None

    @property
    def brier(self) -> float | None:
        return float(self.totals[1] / self.totals[0]) if self.totals[0] > 0 else None

    @property
    def log_loss(self) -> float | None:
        return float(self.totals[2] / self.totals[0]) if self.totals[0] > 0 else None

    def curve(self) -> tuple[tuple[float, float, float, int], ...]:
        """(bin centre of the cumulative score, mean prediction, observed acceptance, weight) of every bin with data."""
        n, predicted, observed = self.by_score
        return tuple(
            ((i + 0.5) / BINS, float(predicted[i] / n[i]), float(observed[i] / n[i]), int(n[i]))
            for i in range(BINS)
            if n[i] >= 1.0
        )
