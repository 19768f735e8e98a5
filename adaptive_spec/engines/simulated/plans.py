"""Expected goodput of every plan from the server's true state: for the oracle and for the measurement of policies.

goodput(plan) = E[tokens] / E[step time];  step time = (verify + draft + context + overhead) x latency_scale
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.engines.simulated.curve import Curve
from adaptive_spec.engines.simulated.scenario import Scenario


class Costs:
    """Mean step times in ms under the present curve and scale.

    draft_ms: [max_k + 1]. overhead_ms. context_ms_per_token. scale. verify_ms: by tokens before padding, [tokens + 1], at
    request granularity; by batch size and K, [max_batch + 1, max_k + 1], at batch granularity.
    """

    def __init__(self, scenario: Scenario) -> None:
        latency, k = scenario.file.latency, np.arange(scenario.max_k + 1)
        self._ragged, self._max_k, self._max_batch = scenario.ragged, scenario.max_k, scenario.max_batch
        self.draft_ms: Floats = np.where(k > 0, latency.draft_fixed_ms + k * latency.draft_ms_per_step, 0.0)
        self.overhead_ms = latency.overhead_ms
        self.context_ms_per_token = latency.context_ms_per_1k_tokens / 1000.0
        self.scale = 1.0
        self.padded = padded_sizes(scenario)
        """What a size (requests, or tokens at request granularity) is padded to."""
        self.verify_ms: Floats = np.zeros(0)
        self.use(scenario.curve)

    def use(self, curve: Curve) -> None:
        """Change the verify curve."""
        if self._ragged:
            self.verify_ms = curve.table(int(self.padded[-1]))[self.padded]
        else:
            tokens = self.padded[:, None] * np.arange(1, self._max_k + 2)
            self.verify_ms = curve.table(int(tokens.max()))[tokens]
        self.step_ms = None if self._ragged else self.verify_ms + self.draft_ms + self.overhead_ms
        """Batch granularity: without context and scale, [max_batch + 1, max_k + 1]."""

    def batch_step_ms(self, batch_size: int, kv_tokens: int) -> Floats:
        """Batch granularity: mean step time of every K, [max_k + 1]."""
        assert self.step_ms is not None
        return np.asarray((self.step_ms[batch_size] + self.context_ms_per_token * kv_tokens) * self.scale)

    def ragged_step_ms(self, k: int, num_tokens: int, kv_tokens: int) -> float:
        """Request granularity: mean step time of a draft length and a number of verified tokens."""
        parts = float(self.verify_ms[num_tokens]) + float(self.draft_ms[k]) + self.overhead_ms
        return (parts + self.context_ms_per_token * kv_tokens) * self.scale


def padded_sizes(scenario: Scenario) -> NDArray[np.int64]:
    """What the engine pads every size to: requests at batch granularity, tokens at request granularity, from 0 on."""
    latency = scenario.file.latency
    if scenario.ragged:
        return _pad(np.arange(scenario.max_batch * (scenario.max_k + 1) + 1), latency.token_buckets)
    return _pad(np.arange(scenario.max_batch + 1), latency.graph_batch_sizes)


def _pad(sizes: NDArray[np.int64], buckets: list[int] | None) -> NDArray[np.int64]:
    """Smallest bucket that holds a size; a size beyond every bucket is not padded."""
    if not buckets:
        return sizes
    edges = np.array(buckets)
    at = np.searchsorted(edges, sizes)
    return np.where(at < len(edges), edges[np.minimum(at, len(edges) - 1)], sizes)


def expected_tokens(survival: Floats) -> Floats:
    """Survival [b, max_k] -> expected tokens of a step with K = 0..max_k for all, [max_k + 1]."""
    b, k = survival.shape
    expected = np.empty(k + 1)
    expected[0] = b
    np.cumsum(survival.sum(axis=0), out=expected[1:])
    expected[1:] += b
    return expected


def best_ragged(q: Floats, costs: Costs, kv_tokens: int, allowed: Sequence[int]) -> tuple[int, int, float]:
    """Search every allowed K and every number of slots: q [b, max_k] -> (K, draft tokens verified, tokens per ms).

    For a given K and number of slots the most likely survivors among the first K positions are the best.
    """
    b, max_k = q.shape
    survival = np.cumprod(q, axis=1)
    # Row k - 1: the survivals of positions 1..k, the others as 0, which sorts them behind all that can be verified.
    masked = np.where(np.arange(max_k) <= np.arange(max_k)[:, None, None], survival, 0.0).reshape(max_k, b * max_k)
    masked *= -1.0
    masked.sort(axis=1)
    expected = np.zeros((max_k, b * max_k + 1))
    np.cumsum(masked, axis=1, out=expected[:, 1:])
    seconds = costs.verify_ms[b : b * (max_k + 1) + 1] + (
        costs.draft_ms[1:, None] + (costs.overhead_ms + costs.context_ms_per_token * kv_tokens)
    )
    goodput = (b - expected) / seconds
    # K drafts at most b * K tokens; larger slot counts are not plans.
    goodput[np.arange(b * max_k + 1) > b * np.arange(1, max_k + 1)[:, None]] = 0.0
    goodput[[k - 1 for k in range(1, max_k + 1) if k not in allowed]] = 0.0
    row, count = divmod(int(goodput.argmax()), b * max_k + 1)
    best = float(goodput[row, count]) / costs.scale
    plain = b / costs.ragged_step_ms(0, b, kv_tokens)
    return (0, 0, plain) if plain >= best and 0 in allowed else (row + 1, count, best)
