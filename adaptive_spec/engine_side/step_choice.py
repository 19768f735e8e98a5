"""K of one step from the requests in it, where all requests of a step share one K (SGLang's EAGLE at topk = 1).

    S[i, 1] = P(accept | confidence of request i's first draft token), calibrated and corrected by the request's own record
              (`AcceptanceHistory.first_tokens`); from its history where that is unknown
    S[i, j] = S[i, j-1] * c[i, j],   c[i, j] = (accepted[i, j] + m c[j]) / (reached[i, j] + m)
    goodput(K) = (b + sum over i and j <= K of S[i, j]) / (fixed_s[K, b] + verify_s[padded b (K + 1)] + context share)

c[i, j] is how often request i's draft token j was accepted given that all before it were, shrunk towards c[j] of all requests
with the weight of m = PRIOR_STEPS steps. The policy's table holds the best K for usual requests, those with u[j]: c[j] as it was
when the table came, and slowly what it is now (`AcceptanceHistory.usual_of`). Where another K is predicted to be better than the
table's K for usual requests too, its goodput is reduced by that ratio, so that only the difference between these requests and
those the table was made for counts:

    chosen = argmax over K of goodput(K) * min(1, usual(table's K) / usual(K)),   usual(K) = goodput(K) with c[i, j] = u[j]

Regimes: requests with high predicted acceptance get a longer draft than the table's, requests with low predicted acceptance a
shorter one; usual requests keep the table's K, because another K must predict a goodput at least `min_gain` higher.

Where a change of K costs switch_s > 0 seconds, a K is kept for at least N steps, and another K must earn its cost within them:

    N = switch_s / (min_gain * step seconds), rounded up, 1..MAX_DWELL_STEPS
    step seconds of every K that is not running are switch_s / N higher

so that the least gain that counts pays for a change within N steps; a smaller N would change K at a loss, a larger one would keep
a K that is known to be worse. Runs in the engine's process, numpy only; no decision uses the outcome of its own step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from adaptive_spec.domain.acceptance_history import AcceptanceHistory
from adaptive_spec.domain.arrays import AnyFloats, Floats
from adaptive_spec.domain.policy import Mode, Policy
from adaptive_spec.domain.survival import SurvivalMap
from adaptive_spec.engine_side.planner import Planner

MAX_DWELL_STEPS = 64
"""Largest N above: a request remembers about 50 steps, so its prediction says little about a longer stay."""


def survival(
    history: Floats, first_confidence: AnyFloats | None, calibration: SurvivalMap,
    corrected: Callable[[Sequence[float]], Sequence[float]] | None = None,
) -> Floats:  # fmt: skip
    """P(draft position j is accepted), [b, max_k], when at most the first token is drafted.

    history: `AcceptanceHistory.conditional`. first_confidence: [b] in (0, 1]; any value outside means unknown; None: all unknown.
    corrected: `AcceptanceHistory.first_tokens` of these requests; None: calibrated confidences as they are.
    """
    chances = history.copy()
    if first_confidence is not None:
        # By number: most batches are small, and a call of numpy costs as much as several requests.
        first = [calibration.first(c) if 0.0 < c <= 1.0 else math.nan for c in first_confidence.tolist()]
        for row, chance in enumerate(first if corrected is None else corrected(first)):
            if chance >= 0.0:
                chances[row, 0] = chance
    return np.asarray(np.multiply.accumulate(chances, axis=1))


def best_k(
    chances: Floats, usual: Floats, policy: Policy, table_k: int, kv_tokens: int, padded_rows: int, candidates: Sequence[int],
    min_gain: float | None = None, running_k: int | None = None,
) -> int:  # fmt: skip
    """Return the candidate with the highest predicted goodput if that is min_gain above `table_k`'s, else `table_k`.

    chances: [b, max_k], see `survival`. usual: [max_k], P(draft position j is accepted) for a usual request. padded_rows: b
    after padding to a graph's batch size. candidates: K allowed at this batch size, `table_k` among them; a K that the policy
    does not allow there is left out. min_gain: None: the policy's. running_k: K of the step before, which costs no change of K;
    None: no change of K is charged.
    """
    b = len(chances)
    expected = list(accumulate(np.add.reduce(chances, axis=0).tolist(), initial=float(b)))
    expected_usual = [b * tokens for tokens in accumulate(usual.tolist(), initial=1.0)]
    seconds = _step_seconds(policy, b, len(expected), kv_tokens, padded_rows, candidates)
    if table_k not in seconds or min(seconds.values()) <= 0.0:
        return table_k
    switch_s = policy.switch_s / dwell_steps(policy, seconds[table_k]) if running_k in seconds and policy.switch_s > 0.0 else 0.0
    charged = {k: s + switch_s * (k != running_k) for k, s in seconds.items()}
    gain = policy.min_gain if min_gain is None else min_gain
    usual_goodput = expected_usual[table_k] / seconds[table_k]
    best, best_goodput = table_k, (1.0 + gain) * expected[table_k] / charged[table_k]
    for k, step_s in seconds.items():
        goodput = expected[k] / charged[k] * min(1.0, usual_goodput * step_s / expected_usual[k])
        if goodput > best_goodput:
            best, best_goodput = k, goodput
    return best


def dwell_steps(policy: Policy, step_s: float) -> int:
    """N of the module: the least steps a K is kept; 0 where a change of K is not known to cost anything. step_s > 0."""
    if policy.switch_s <= 0.0:
        return 0
    least_gain_s = policy.min_gain * step_s
    return MAX_DWELL_STEPS if MAX_DWELL_STEPS * least_gain_s <= policy.switch_s else math.ceil(policy.switch_s / least_gain_s)


def _step_seconds(
    policy: Policy, b: int, positions: int, kv_tokens: int, padded_rows: int, candidates: Sequence[int]
) -> dict[int, float]:
    """Predicted seconds of a step by K, of those candidates that the policy allows and has a prediction for."""
    row = min(b, policy.fixed_s.shape[1] - 1)
    context_s = policy.context_s_per_token * kv_tokens
    return {
        k: float(policy.fixed_s[k, row]) + float(policy.verify_s[padded_rows * (k + 1)]) + context_s
        for k in candidates
        if k <= policy.max_k and k < positions and padded_rows * (k + 1) < len(policy.verify_s) and policy.allows(b, k)
    }


def chooses(planner: Planner) -> bool:
    """Whether K of the step the planner has just begun may be another than the table's."""
    policy = planner.policy
    return policy is not None and policy.mode is Mode.ACTIVE and not planner.in_trial


def refined_k(
    history: AcceptanceHistory, planner: Planner, request_ids: Sequence[int], first_confidence: AnyFloats | None,
    table_k: int, kv_tokens: int, padded_rows: int, candidates: Sequence[int],
) -> int:  # fmt: skip
    """Return K of the step the planner has just begun: `best_k` of its requests, or `table_k` unchanged; tell the planner.

    Unchanged without a policy, in a trial, in every mode but ACTIVE (pinned, paused, ...), and where there is no other K. K of
    the step before stays while it was chosen here, or is the table's, and has run for fewer than `dwell_steps`.
    Arguments: see `survival` and `best_k`.
    """
    policy = planner.policy
    history.forget_prediction()
    if policy is None or not chooses(planner) or len(candidates) < 2:
        return table_k
    b, last_k = len(request_ids), planner.last_k
    if policy.switch_s > 0.0 and last_k in candidates and (planner.last_moved or last_k == table_k):
        seconds = _step_seconds(policy, b, policy.max_k + 1, kv_tokens, padded_rows, (last_k,))
        if seconds and seconds[last_k] > 0.0 and planner.stayed < dwell_steps(policy, seconds[last_k]):
            planner.move(last_k)
            return last_k
    corrected = partial(history.first_tokens, request_ids)
    chances = survival(history.conditional(request_ids), first_confidence, policy.survival, corrected)
    k = best_k(chances, history.usual_of(planner.tables), policy, table_k, kv_tokens, padded_rows, candidates, running_k=last_k)
    planner.move(k)
    return k
