"""A cost table profiled before the first request, acceptance learnt online, with the habits of vLLM's profiling.

    goodput(K) = b (1 + a_1 + a_1 a_2 + ...) / profiled_s[b, K]           batch granularity
    the slots of most expected tokens per profiled second                 request granularity

a_j is a running rate of acceptance at position j (memory 200 steps). The profile is measured once, before the first request, not
in the clock, and never again: drift is not followed. `StartupProfile` takes the median of 5 replays of every plan at one context
length, and clamps verify times so that they never fall with the number of tokens, as vLLM's table of verify times does.
`CaptureTable` takes the one replay that capturing a graph makes anyway: a first replay, up to 30 % too long, without context.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.plan_search import best_lengths
from adaptive_spec.domain.step_record import StepRecord
from adaptive_spec.engines.simulated.decider import PlainDecider
from adaptive_spec.engines.simulated.plans import Costs
from adaptive_spec.engines.simulated.scenario import Scenario

RUNS = 5
CONTEXT = 1024
"""KV tokens of every request while vLLM profiles."""
FIRST_REPLAY = 0.3
"""Most that a first replay takes longer than later ones, relative; real ones +15 %, up to 2x."""
RATE = 1.0 / 200.0
LOOK_STEPS = 100
"""After this many steps with K = 0 one step runs K = 1, to measure acceptance again."""


def profiled(mean_ms: Floats, scenario: Scenario, runs: int, rng: np.random.Generator) -> Floats:
    """Medians of `runs` noisy measurements of mean step times, any shape."""
    noise = scenario.file.latency.noise
    factors = np.exp(noise.sigma * rng.standard_normal((runs, *mean_ms.shape)) - 0.5 * noise.sigma**2)
    factors[rng.random(factors.shape) < noise.spike_rate] *= noise.spike_factor
    return np.asarray(mean_ms * np.median(factors, axis=0))


class StartupProfile(PlainDecider):
    """See the module."""

    reads_records = True

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__()
        self._ragged = self.reads_scores = scenario.ragged
        self._max_k = scenario.max_k
        costs = Costs(scenario)
        self._verify_ms = self._profile(costs, scenario, np.random.default_rng([seed, 21]))
        self._fixed_ms = costs.draft_ms + costs.overhead_ms
        self._allowed = scenario.allowed_mask()
        # Tokens accepted and tokens at risk, by position; begins as "three of four are accepted".
        self._accepted, self._at_risk = np.full(self._max_k, 0.75), np.ones(self._max_k)
        # Request granularity: accepted tokens and those expected from the draft's scores, by position.
        self._hits, self._expected = np.full(self._max_k, 1.0), np.full(self._max_k, 1.0)
        self._k = -1
        self._idle = 0

    def _profile(self, costs: Costs, scenario: Scenario, rng: np.random.Generator) -> Floats:
        """Verify times, of the shape of `Costs.verify_ms`."""
        tokens = np.arange(len(costs.verify_ms))
        if scenario.ragged:
            requests = tokens / (scenario.max_k + 1.0)
            mean_ms = costs.verify_ms + costs.context_ms_per_token * CONTEXT * requests
            return np.maximum.accumulate(profiled(mean_ms, scenario, RUNS, rng))
        mean_ms = costs.verify_ms + costs.context_ms_per_token * CONTEXT * tokens[:, None]
        count = costs.padded[:, None] * np.arange(1, scenario.max_k + 2)
        # One measurement of every plan; then never less than that of a plan with fewer tokens.
        measured = profiled(mean_ms, scenario, RUNS, rng)
        order = np.argsort(count, axis=None, kind="stable")
        clamped = np.empty(measured.size)
        clamped[order] = np.maximum.accumulate(measured.ravel()[order])
        return clamped.reshape(measured.shape)

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        if self._ragged:
            return self._max_k  # a whole block is always drafted; only verification adapts
        expected = batch_size * (1.0 + np.concatenate(([0.0], np.cumsum(np.cumprod(self._accepted / self._at_risk)))))
        goodput = expected / (self._verify_ms[batch_size] + self._fixed_ms)
        k = int(np.where(self._allowed[batch_size], goodput, 0.0).argmax())
        self._idle = self._idle + 1 if k == 0 else 0
        if self._idle >= LOOK_STEPS:
            k, self._idle = 1, 0
        self.swaps += self._k not in (-1, k)
        self._k = k
        return k

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8] | None:
        scores = np.cumprod(confidences, axis=1, dtype=np.float64)
        survival = np.minimum(scores * (self._hits / self._expected), 1.0)
        survival = np.minimum.accumulate(survival, axis=1)
        b, k = confidences.shape
        return best_lengths(survival, float(self._fixed_ms[k]), self._verify_ms[: b * (k + 1) + 1])

    def observe(self, record: StepRecord) -> None:
        position = np.arange(record.k)
        reached = np.minimum(record.accept_len.astype(np.int64) + 1, record.verify_len)[:, None]
        accepted = (position < record.accept_len[:, None]).mean(axis=0)
        at_risk = (position < reached).mean(axis=0)
        k = record.k
        keep = 1.0 - RATE * (at_risk > 0.0)
        self._accepted[:k] = self._accepted[:k] * keep + RATE * accepted
        self._at_risk[:k] = self._at_risk[:k] * keep + RATE * at_risk
        if self._ragged and k:
            verified = position < record.verify_len[:, None]
            expected = (np.cumprod(record.confidences, axis=1, dtype=np.float64) * verified).mean(axis=0)
            self._hits[:k] = self._hits[:k] * keep + RATE * accepted
            self._expected[:k] = self._expected[:k] * keep + RATE * expected


class CaptureTable(StartupProfile):
    """See the module."""

    def _profile(self, costs: Costs, scenario: Scenario, rng: np.random.Generator) -> Floats:
        first = 1.0 + FIRST_REPLAY * rng.random(costs.verify_ms.shape)
        return profiled(costs.verify_ms * first, scenario, 1, rng)
