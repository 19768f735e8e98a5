"""A bandit on measured goodput: no models, only tokens and seconds, as TurboSpec-like controllers and home-made scripts do.

    value[bucket, K] = running tokens / running seconds of steps with K at batch sizes of that bucket (1, 2, 3-4, 5-8, ...)

K is held for 8 steps. Every K of a bucket is tried once, then the best one is taken; in one turn of twenty a neighbour of it is
tried instead. Its memory is 20 turns. It needs nothing to be known, and pays for that with exploration in every bucket.
"""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.decider import PlainDecider
from adaptive_spec.engines.simulated.scenario import Scenario

TURN_STEPS = 8
EXPLORE = 0.05
MEMORY_TURNS = 20


class GoodputBandit(PlainDecider):
    """See the module. seed: of the exploration."""

    reads_records = True

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__()
        self._arms = scenario.max_k + 1
        self._rng = np.random.default_rng([seed, 31])
        self._tokens: dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
        self._seconds: dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
        self._bucket, self._k, self._left = -1, -1, 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        bucket = (batch_size - 1).bit_length()
        if self._left == 0 or bucket != self._bucket:
            k = self._choice(bucket)
            self.swaps += self._k not in (-1, k)
            self._bucket, self._k, self._left = bucket, k, TURN_STEPS
        self._left -= 1
        return self._k

    def observe(self, record: StepRecord) -> None:
        keep = 1.0 - 1.0 / (MEMORY_TURNS * TURN_STEPS)
        tokens, seconds = self._tokens[self._bucket], self._seconds[self._bucket]
        tokens[self._k] = tokens[self._k] * keep + record.output_tokens
        seconds[self._k] = seconds[self._k] * keep + record.step_s

    def _choice(self, bucket: int) -> int:
        tokens = self._tokens.setdefault(bucket, np.zeros(self._arms))
        seconds = self._seconds.setdefault(bucket, np.zeros(self._arms))
        untried = np.flatnonzero(seconds == 0.0)
        if len(untried):
            return int(untried[0])
        best = int((tokens / seconds).argmax())
        if self._rng.random() < EXPLORE:
            return min(max(best + (1 if self._rng.random() < 0.5 else -1), 0), self._arms - 1)
        return best
