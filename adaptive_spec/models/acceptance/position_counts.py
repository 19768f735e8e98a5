"""Labels of draft tokens whose confidence is unknown: how often a position is accepted, whatever the draft thought of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.models.plausible import labels_counted


class PositionCounts:
    """Forgetting counts per draft position, of tokens whose predecessors were all accepted. verified, accepted: [max_k]."""

    def __init__(self, max_k: int) -> None:
        self.verified: Floats = np.zeros(max_k)
        self.accepted: Floats = np.zeros(max_k)

    def forget(self, factor: float, floor: float) -> None:
        """Multiply all counts by `factor`, 0..1, but reduce no position below `floor` labels."""
        kept = np.where(self.verified > floor, np.maximum(factor, floor / np.maximum(self.verified, 1e-12)), 1.0)
        self.verified *= kept
        self.accepted *= kept

    def add(self, verified: NDArray[np.bool_], accepted: NDArray[np.bool_]) -> None:
        """Count draft tokens [rows, k], k <= max_k: those `verified`, and those both verified and `accepted`."""
        k = verified.shape[1]
        self.verified[:k] += verified.sum(axis=0)
        self.accepted[:k] += (verified & accepted).sum(axis=0)

    def state(self) -> NDArray[np.float64]:
        """[2, max_k] to restore from."""
        return np.stack((self.verified, self.accepted))

    def restore(self, state: NDArray[np.float64]) -> None:
        """Take over `state()`. Raises ValueError when it cannot be one."""
        self.verified, self.accepted = labels_counted("counts", state, self.verified.shape)
