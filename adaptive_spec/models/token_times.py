"""Time per output token of single requests, for a target that every request is to meet (`slo_tpot_ms`).

    seconds per output token of request i under K = step seconds(K) / (1 + S[i, 1] + .. + S[i, K])

A batch with the most goodput may still be slow for one of its requests: the one whose drafts are seldom accepted gains nothing
from a long draft and waits for it. S[i, j] is the request's own acceptance, shrunk towards that of all requests, as the step
choice has it (`domain.acceptance_history`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from adaptive_spec.domain.acceptance_history import REQUESTS_REMEMBERED, AcceptanceHistory
from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.step_record import StepRecord


class TokenTimes:
    """Follows the requests of the steps. target_s: seconds per output token that every request is to stay within."""

    def __init__(self, max_k: int, target_s: float) -> None:
        self.target_s = target_s
        self._history = AcceptanceHistory(max(max_k, 1), REQUESTS_REMEMBERED)
        self._max_k = max_k
        self._running: dict[int, tuple[int, float]] = {}
        """Output tokens and decode seconds by request id, of the requests of the latest step."""

    def observe(self, record: StepRecord) -> list[float]:
        """Learn one step. Returns seconds per output token of the requests that ended since the step before."""
        ids = record.request_ids.tolist()
        before, self._running = self._running, {}
        for request, accepted in zip(ids, record.accept_len.tolist(), strict=True):
            tokens, seconds = before.pop(request, (0, 0.0))
            self._running[request] = tokens + accepted + 1, seconds + record.step_s
        self._history.observe(ids, record.accept_len, record.verify_len)
        return [seconds / tokens for tokens, seconds in before.values()]

    def slowest_share(self) -> Floats:
        """Expected output of the slowest running request over that of the mean one, by K, [max_k + 1], in (0, 1]."""
        if not self._running or not self._max_k:
            return np.ones(self._max_k + 1)
        survival = np.cumprod(self._history.conditional(list(self._running)), axis=1)
        tokens = 1.0 + np.concatenate((np.zeros((len(survival), 1)), np.cumsum(survival, axis=1)), axis=1)
        return np.asarray(tokens.min(axis=0) / tokens.mean(axis=0))

    def within(self, ended_s: Iterable[float]) -> tuple[int, int]:
        """How many of these seconds per token are within the target, and how many are not."""
        inside = [seconds <= self.target_s for seconds in ended_s]
        return sum(inside), len(inside) - sum(inside)
