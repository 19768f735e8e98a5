"""Calibrated survival probabilities as lookup tables, applied in every step. Used in the engine's process: numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.arrays import AnyFloats, Float32s, Floats, Ints

LOGIT_LIMIT = 10.0
GRID_POINTS = 81
"""Tables are sampled at logits -10..10 in steps of 0.25."""
_POINTS_PER_LOGIT = (GRID_POINTS - 1) / (2 * LOGIT_LIMIT)
_LOWEST, _HIGHEST = 1.0 / (1.0 + np.exp(np.array([LOGIT_LIMIT, -LOGIT_LIMIT]) * (1.0 - 1e-12)))
"""Scores just inside the ends of the grid. float64, so that comparisons are in float64 too."""
_LOWEST_NUMBER, _HIGHEST_NUMBER = float(_LOWEST), float(_HIGHEST)


class GridPosition(NamedTuple):
    """Positions of scores on the grid: index of the grid point below, and the weight of the next one (0..1)."""

    low: Ints
    weight: Floats

    @property
    def nearest(self) -> Ints:
        return self.low + (self.weight >= 0.5)


def grid_position(score: AnyFloats) -> GridPosition:
    """Return the grid positions of scores in [0, 1], any shape. Logits are clipped to +-LOGIT_LIMIT."""
    # Runs in every step on few elements, where each numpy call costs about a microsecond: so as few calls as possible.
    q = np.minimum(np.maximum(score, _LOWEST), _HIGHEST)
    x = np.log(q / (1.0 - q))
    x += LOGIT_LIMIT
    x *= _POINTS_PER_LOGIT
    low = x.astype(np.int64)
    x -= low
    return GridPosition(low, x)


@dataclass(frozen=True)
class SurvivalMap:
    """Calibrated P(draft position j is accepted), as a table by position.

    table: float [K, GRID_POINTS], probabilities at the grid's logits. conditional: if true, row j maps the confidence of
    token j to P(accept j | all before accepted) and survival is the running product; if false, row j maps the cumulative
    score up to j to survival itself.
    """

    table: Float32s
    conditional: bool

    def survival(self, confidences: AnyFloats) -> Floats:
        """Confidences [b, k] in (0, 1] -> survival probabilities [b, k], never increasing along a row."""
        return self.survival_at(grid_position(confidences if self.conditional else np.cumprod(confidences, axis=1)))

    def first(self, confidence: float) -> float:
        """P(first draft token is accepted) by its confidence alone: `survival` of one token, without arrays."""
        q = min(max(confidence, _LOWEST_NUMBER), _HIGHEST_NUMBER)
        x = (math.log(q / (1.0 - q)) + LOGIT_LIMIT) * _POINTS_PER_LOGIT
        low = int(x)
        row = self._first_row
        below = row[low]
        return below + (row[low + 1] - below) * (x - low)

    @cached_property
    def _first_row(self) -> list[float]:
        found: list[float] = self.table[0].tolist()
        return found

    def survival_at(self, position: GridPosition) -> Floats:
        """`survival` from grid positions [b, k]: of the confidences if conditional, else of the cumulative scores."""
        low, weight = position
        flat, offsets = self._flat
        index = low + offsets[: low.shape[1]]
        value = flat.take(index)
        index += 1
        above = flat.take(index)
        above -= value
        above *= weight
        value += above
        accumulate = np.multiply.accumulate if self.conditional else np.minimum.accumulate
        survival: Floats = accumulate(value, axis=1)
        return survival

    @cached_property
    def _flat(self) -> tuple[Floats, Ints]:
        """The table as one row, and the offset of each position in it."""
        return self.table.astype(np.float64).ravel(), np.arange(len(self.table)) * GRID_POINTS
