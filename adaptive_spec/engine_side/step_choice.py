"""K of one step from the requests in it, where all requests of a step share one K (SGLang's EAGLE at topk = 1).

    S[i, 1] = P(accept | confidence of request i's first draft token), calibrated; from its history where that is unknown
    S[i, j] = S[i, j-1] * c[i, j],   c[i, j] = (accepted[i, j] + m c[j]) / (reached[i, j] + m)
    goodput(K) = (b + sum over i and j <= K of S[i, j]) / (fixed_s[K, b] + verify_s[padded b (K + 1)] + context share)

c[i, j] is how often request i's draft token j was accepted given that all before it were, shrunk towards c[j] of all requests
with the weight of m = PRIOR_STEPS steps. The policy's table holds the best K for usual requests, those with c[j]. So another K
counts only by how much better it is for these requests than for usual ones:

    chosen = argmax over K of goodput(K) * min(1, usual(table's K) / usual(K)),   usual(K) = goodput(K) with c[i, j] = c[j]

Regimes: requests with high predicted acceptance get a longer draft than the table's, requests with low predicted acceptance a
shorter one; usual requests keep the table's K, because another K must predict a goodput at least `min_gain` higher. Runs in the
engine's process, numpy only; no decision uses the outcome of its own step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptive_spec.domain.arrays import AnyFloats, Floats, Ints, Lengths
from adaptive_spec.domain.policy import Mode, Policy
from adaptive_spec.domain.survival import SurvivalMap, grid_position
from adaptive_spec.engine_side.planner import Planner

PRIOR_STEPS = 10.0
"""Weight of the population's rate in a request's own, in steps (m above): about a fifth of what a request remembers."""
REQUEST_DECAY, POPULATION_DECAY = 0.98, 0.995
"""Weight of a step one step later: a request remembers about 1 / (1 - 0.98) = 50 steps, the population 200 steps."""
MIN_GAIN = 0.01
"""Relative gain in predicted goodput that another K needs, so that usual requests stay on the table's K."""
REQUESTS_REMEMBERED = 4096
"""Requests whose history an engine keeps; the least recently used is dropped."""


class AcceptanceHistory:
    """Decaying acceptance counts by request and draft position.

    max_k: positions. capacity: requests kept; beyond that the least recently used is dropped.
    """

    def __init__(self, max_k: int, capacity: int) -> None:
        self._position = np.arange(max_k)
        self._reached = np.zeros((capacity, max_k))
        self._accepted = np.zeros((capacity, max_k))
        self._all_reached = np.full(max_k, 1.0)
        self._all_accepted = np.full(max_k, 0.5)
        self._row: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._row)

    def observe(self, request_ids: Sequence[int], accept_len: Lengths, k: int) -> None:
        """Learn one step: request_ids [b], accept_len [b], k drafted. Positions behind the first rejected token have no label."""
        if k == 0 or len(accept_len) == 0:
            return
        rows = self._rows(request_ids)
        accepted = self._position < accept_len[:, None]
        reached = self._position < np.minimum(accept_len + 1, k)[:, None]
        decay = np.where(reached, REQUEST_DECAY, 1.0)
        self._reached[rows] = self._reached[rows] * decay + reached
        self._accepted[rows] = self._accepted[rows] * decay + accepted
        steps = reached.sum(axis=0)
        forget = np.where(steps > 0, POPULATION_DECAY, 1.0)
        self._all_reached = self._all_reached * forget + steps
        self._all_accepted = self._all_accepted * forget + accepted.sum(axis=0)

    @property
    def usual(self) -> Floats:
        """P(accept j | all before j accepted) of all requests together, [max_k]."""
        return np.asarray(self._all_accepted / self._all_reached)

    def conditional(self, request_ids: Sequence[int]) -> Floats:
        """P(accept j | all before j accepted) of each request, [b, max_k]; of an unknown request, the population's."""
        population = self.usual * PRIOR_STEPS
        rows = np.fromiter((self._row.get(i, -1) for i in request_ids), np.int64, len(request_ids))
        known = rows >= 0
        reached = np.where(known[:, None], self._reached[rows], 0.0)
        accepted = np.where(known[:, None], self._accepted[rows], 0.0)
        return np.asarray((accepted + population) / (reached + PRIOR_STEPS))

    def _rows(self, request_ids: Sequence[int]) -> Ints:
        rows = np.empty(len(request_ids), np.int64)
        for i, request in enumerate(request_ids):
            row = self._row.pop(request, None)
            if row is None:
                row = self._free.pop() if self._free else self._row.pop(next(iter(self._row)))
                self._reached[row] = self._accepted[row] = 0.0
            self._row[request] = rows[i] = row  # last in the order: most recently used
        return rows


def survival(history: Floats, first_confidence: AnyFloats | None, calibration: SurvivalMap) -> Floats:
    """P(draft position j is accepted), [b, max_k], when at most the first token is drafted.

    history: `AcceptanceHistory.conditional`. first_confidence: [b] in (0, 1]; any value outside means unknown; None: all unknown.
    """
    chances = history.copy()
    if first_confidence is not None:
        known = (first_confidence > 0.0) & (first_confidence <= 1.0)
        if known.any():
            at = grid_position(np.where(known, first_confidence, 0.5))
            row = calibration.table[0]
            chances[:, 0] = np.where(known, row[at.low] + (row[at.low + 1] - row[at.low]) * at.weight, chances[:, 0])
    return np.asarray(np.cumprod(chances, axis=1))


def best_k(
    chances: Floats, usual: Floats, policy: Policy, table_k: int, kv_tokens: int, padded_rows: int, candidates: Sequence[int],
    min_gain: float = MIN_GAIN,
) -> int:  # fmt: skip
    """Return the candidate with the highest predicted goodput if that is min_gain above `table_k`'s, else `table_k`.

    chances: [b, max_k], see `survival`. usual: [max_k], P(draft position j is accepted) for a usual request. padded_rows: b
    after padding to a graph's batch size. candidates: K allowed at this batch size, `table_k` among them.
    """
    b = len(chances)
    expected = b + np.concatenate(([0.0], np.cumsum(chances.sum(axis=0))))
    expected_usual = b + b * np.concatenate(([0.0], np.cumsum(usual)))
    row = min(b, policy.fixed_s.shape[1] - 1)
    context_s = policy.context_s_per_token * kv_tokens
    runnable = [k for k in candidates if k <= policy.max_k and k < len(expected) and padded_rows * (k + 1) < len(policy.verify_s)]
    if table_k not in runnable:
        return table_k
    step_s = {k: float(policy.fixed_s[k, row]) + float(policy.verify_s[padded_rows * (k + 1)]) + context_s for k in runnable}
    if min(step_s.values()) <= 0.0:
        return table_k
    usual_goodput = expected_usual[table_k] / step_s[table_k]
    best, best_goodput = table_k, (1.0 + min_gain) * expected[table_k] / step_s[table_k]
    for k in runnable:
        goodput = expected[k] / step_s[k] * min(1.0, usual_goodput * step_s[k] / expected_usual[k])
        if goodput > best_goodput:
            best, best_goodput = k, goodput
    return best


def refined_k(
    history: AcceptanceHistory, planner: Planner, request_ids: Sequence[int], first_confidence: AnyFloats | None,
    table_k: int, kv_tokens: int, padded_rows: int, candidates: Sequence[int],
) -> int:  # fmt: skip
    """Return K of the step the planner has just begun: `best_k` of its requests, or `table_k` unchanged.

    Unchanged without a policy, in a trial, in every mode but ACTIVE (pinned, paused, ...), and where there is no other K.
    Arguments: see `survival` and `best_k`.
    """
    policy = planner.policy
    if policy is None or policy.mode is not Mode.ACTIVE or planner.in_trial or len(candidates) < 2:
        return table_k
    chances = survival(history.conditional(request_ids), first_confidence, policy.survival)
    return best_k(chances, np.cumprod(history.usual, dtype=np.float64), policy, table_k, kv_tokens, padded_rows, candidates)
