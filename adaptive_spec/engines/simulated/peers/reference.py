"""The reference: the thirty lines that every mechanism of the controller must beat.

    goodput(K) = b (1 + a_1 + a_1 a_2 + ...) / (other_s[K] + verify_s[padded b (K + 1)])

verify_s is a forgetting mean per padded token count, interpolated between counts; other_s one per K. a_j is a forgetting rate of
acceptance by position. Every hundred steps two steps run the plan that was measured longest ago. Verifies all that is drafted.
"""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.decider import PlainDecider
from adaptive_spec.engines.simulated.plans import padded_sizes
from adaptive_spec.engines.simulated.scenario import Scenario

PACE = 1.0 / 16.0
"""Weight of a step in the means."""
ACCEPTANCE_PACE = 1.0 / 200.0
PROBE_EVERY, PROBE_STEPS = 100, 2


class Reference(PlainDecider):
    """See the module."""

    reads_records = True

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__()
        self._allowed, self._padded, self._ragged = scenario.allowed_mask(), padded_sizes(scenario), scenario.ragged
        self._verify_s: dict[int, float] = {}
        self._other_s: dict[int, float] = {}
        self._measured: dict[tuple[int, int], int] = {}
        self._accepted, self._reached = np.full(scenario.max_k, 0.7), np.ones(scenario.max_k)
        self._step, self._k, self._probe = 0, scenario.launch_k, scenario.launch_k

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        self._step += 1
        allowed = np.flatnonzero(self._allowed[batch_size])
        at = self._tokens(batch_size, allowed)
        if not self._verify_s:
            return self._k
        if self._step % PROBE_EVERY < PROBE_STEPS:
            if self._step % PROBE_EVERY == 0:
                ages = [self._measured.get((int(t), int(k)), 0) for t, k in zip(at, allowed, strict=True)]
                self._probe = int(allowed[int(np.argmin(ages))])
            return self._probe
        expected = 1.0 + np.concatenate(([0.0], np.cumsum(np.cumprod(self._accepted / self._reached))))[allowed]
        k = int(allowed[int((expected / (_between(self._verify_s, at) + _between(self._other_s, allowed))).argmax())])
        self.swaps += k != self._k
        self._k = k
        return k

    def observe(self, record: StepRecord) -> None:
        tokens, k = record.padded_tokens, record.k
        for table, key, seconds in (
            (self._verify_s, tokens, record.verify_s),
            (self._other_s, k, record.step_s - record.verify_s),
        ):
            table[key] = table.get(key, seconds) + PACE * (seconds - table.get(key, seconds))
        self._measured[tokens, k] = self._step
        position = np.arange(k)
        reached = (position < np.minimum(record.accept_len.astype(np.int64) + 1, k)[:, None]).mean(axis=0)
        accepted = (position < record.accept_len[:, None]).mean(axis=0)
        keep = 1.0 - ACCEPTANCE_PACE * (reached > 0.0)
        self._reached[:k] = self._reached[:k] * keep + ACCEPTANCE_PACE * reached
        self._accepted[:k] = self._accepted[:k] * keep + ACCEPTANCE_PACE * accepted

    def _tokens(
        self, batch_size: int, ks: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Padded token counts of the plans."""
        return self._padded[batch_size * (ks + 1)] if self._ragged else self._padded[batch_size] * (ks + 1)


def _between(
    means: dict[int, float], at: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Linear interpolation of the means by key; the nearest one beyond them."""
    keys = sorted(means)
    return np.interp(at, keys, [means[key] for key in keys])
