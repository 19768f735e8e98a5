"""Guard rails: which changes of K are worth making, and when a swap is taken back."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats

Table = NDArray[np.uint8]


def within_target(goodput: Floats, seconds_per_token: Floats, target_s: float) -> Floats:
    """Goodput with 0 for every K whose seconds per output token exceed the target; where all do, the fastest one stays."""
    seconds = np.where(goodput > 0.0, seconds_per_token, np.inf)
    fastest = np.arange(goodput.shape[-1]) == seconds.argmin(axis=-1)[..., None]
    kept = (seconds <= target_s) | (fastest & ~(seconds <= target_s).any(axis=-1, keepdims=True))
    return np.where(kept, goodput, 0.0)


def hurdles(uncertainty: Floats, current: Table, min_gain: float, unrest: float = 0.0) -> Floats:
    """Relative gain in goodput over the present K that each K must exceed, [batches, contexts, K + 1].

    min_gain and half a standard error of the comparison: with a full one, a K that was not measured would never be tried. unrest:
    of the forecast; what is measured while slowness comes and goes is wrong by up to as much.
    """
    b, c = np.indices(current.shape)
    return np.asarray(min_gain + unrest + 0.5 * np.hypot(uncertainty, uncertainty[b, c, current][..., None]))


def better_table(goodput: Floats, hurdle: Floats, current: Table, banned: NDArray[np.bool_] | None = None) -> Table:
    """Move an entry of the K table to the K that exceeds its own hurdle by most; keep it where none does.

    A K with a large hurdle does not hide a surer one: each is compared with its own. goodput, hurdle: [batches, contexts, K + 1].
    banned: bool of the same shape, never moved to.
    """
    b, c = np.indices(current.shape)
    now = goodput[b, c, current]
    wanted = now[..., None] * (1.0 + hurdle)
    wanted[b, c, current] = now
    score = goodput if banned is None else np.where(banned, 0.0, goodput)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(score > 0.0, score / wanted, 0.0)
    excess[b, c, current] = 1.0
    # Where the present K cannot run or was never served, the best one is taken.
    return np.asarray(np.where(now > 0.0, excess.argmax(axis=-1), score.argmax(axis=-1)), dtype=np.uint8)


def table_for(current: Table, contexts: int) -> Table:
    """The same table with another number of context buckets."""
    return current if current.shape[1] == contexts else np.repeat(current[:, :1], contexts, axis=1)


@dataclass
class SwapWatch:
    """Compares what was measured after a swap with what the previous table would have given on the same steps.

    previous, changed: the table to go back to, and the one swapped in. loss: relative loss that fails the swap. forecast_ratio:
    measured over forecast tokens just before the swap, 0..1; it corrects a forecast that is too high for every K. version: first
    policy version with the changed table. Only steps whose entry changed count. What the previous table would have given comes
    from the latest forecast, not from the one before the swap.
    """

    previous: Table
    changed: Table
    loss: float
    forecast_ratio: float
    version: int
    steps: int = 0
    measured_tokens: float = 0.0
    squared_tokens: float = 0.0
    seconds: defaultdict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))

    MIN_STEPS = 64
    MAX_STEPS = 256

    def add(self, row: int, context: int, tokens: int, seconds: float) -> bool:
        """Count one step; True when it is time for a verdict."""
        if self.previous[row, context] == self.changed[row, context]:
            return False
        self.steps += 1
        self.measured_tokens += tokens
        self.squared_tokens += tokens * tokens
        self.seconds[row, context] += seconds
        return self.steps >= self.MIN_STEPS and self.steps % 16 == 0

    def share(self, goodput: Floats) -> tuple[float, float]:
        """(measured tokens / tokens the previous table would have given, its standard error)."""
        last = goodput.shape[1] - 1  # context buckets may have been merged since the swap
        expected = self.forecast_ratio * sum(
            float(goodput[b, min(c, last), self.previous[b, c]]) * s for (b, c), s in self.seconds.items()
        )
        variance = max(self.squared_tokens - self.measured_tokens**2 / max(self.steps, 1), 0.0)
        return self.measured_tokens / max(expected, 1e-9), math.sqrt(variance) / max(expected, 1e-9)

    def failed(self, goodput: Floats) -> bool:
        """Whether the swap lost more than `loss` and two standard errors."""
        share, error = self.share(goodput)
        return share < 1.0 - self.loss - 2.0 * error
