"""The requests of the simulated server: their arrival, acceptance and length.

    quality u ~ Normal(0, request_spread) at arrival; position j of class c: m_j = sigmoid(logit(accept[j]) + u)
    q_j ~ Beta(m_j kappa, (1 - m_j) kappa) anew each step; confidence p_j = sigmoid((logit(q_j) - score_bias) / score_slope)

The n-th arrival on a seat is the same for every policy: its quality, length, class, and the uniform number that decides
acceptance at its m-th step. Policies therefore differ only by their decisions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.engines.simulated.scenario import DriftEvent, RequestClass, ScenarioFile

AHEAD = 16
"""Arrivals of a seat generated at once."""
LUCK_TABLE = 1 << 18
"""Number of uniform numbers; every request reads them from its own offset."""
ARRIVALS, LUCK = 1, 2
"""Names of random streams."""
FAR = 1e-12
"""Probabilities stay this far from 0 and 1 before their logit is taken."""


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


class Classes:
    """Present parameters by class: accept_logit [classes, max_k], the others [classes]."""

    def __init__(self, file: ScenarioFile) -> None:
        kinds: list[RequestClass] = list(file.classes.values())
        self.names = list(file.classes)
        self.max_k = file.max_k
        self.accept_logit = np.array([self._logit(kind.accept) for kind in kinds])
        self.concentration = np.array([kind.concentration for kind in kinds])
        self.spread = np.array([kind.request_spread for kind in kinds])
        self.context = np.array([kind.context for kind in kinds])
        self.score_slope = np.array([kind.score_slope for kind in kinds])
        self.score_bias = np.array([kind.score_bias for kind in kinds])

    def _logit(self, accept: list[float]) -> Floats:
        p = np.clip(np.array(accept[: self.max_k]), FAR, 1.0 - FAR)
        return np.asarray(np.log(p / (1.0 - p)))

    def change(self, event: DriftEvent) -> bool:
        """Apply a drift event of a class; True when acceptance changed."""
        index = self.names.index(str(event.class_name))
        if event.score_slope is not None:
            self.score_slope[index] = event.score_slope
        if event.score_bias is not None:
            self.score_bias[index] = event.score_bias
        if event.accept is not None:
            self.accept_logit[index] = self._logit(event.accept)
        return event.accept is not None


class Requests:
    """The running requests, one per seat. Arrays are [capacity, ...]; only the first `count` count.

    mean: m_j [capacity, max_k]. survival: product of m_1..m_j. context_tokens: of all running requests together.
    """

    def __init__(self, file: ScenarioFile, capacity: int, seed: int) -> None:
        self.classes = Classes(file)
        self._seed = seed
        self._leave = 1.0 / file.mean_output_tokens
        self._mix = np.ones(1)
        k = file.max_k
        self.count = 0
        self.context_tokens = 0
        self.kind = np.zeros(capacity, dtype=np.int64)
        self.quality = np.zeros(capacity)
        self.remaining = np.zeros(capacity, dtype=np.int64)
        self.ids = np.zeros(capacity, dtype=np.uint32)
        self.mean = np.zeros((capacity, k))
        self.survival = np.zeros((capacity, k))
        self._next_id = 1
        self._luck = np.random.default_rng([seed, LUCK]).random(LUCK_TABLE)
        self._luck_at = np.zeros(capacity, dtype=np.int64)
        # Generated arrivals of every seat, [capacity, AHEAD, ...], and how many of them have started.
        self._come = np.full(capacity, AHEAD)
        self._block = np.full(capacity, -1)
        self._ready_share, self._ready_normal = np.zeros((capacity, AHEAD)), np.zeros((capacity, AHEAD))
        self._ready_length, self._ready_luck = np.zeros((2, capacity, AHEAD), dtype=np.int64)
        self._ready_kind, self._ready_quality = np.zeros((capacity, AHEAD), dtype=np.int64), np.zeros((capacity, AHEAD))
        self._ready_mean = np.zeros((capacity, AHEAD, k))

    def change(self, event: DriftEvent) -> None:
        """Apply a drift event of a class to running and future requests."""
        if self.classes.change(event):
            n = self.count
            self.mean[:n] = self._acceptance(self.kind[:n], self.quality[:n])
            self.survival[:n] = np.cumprod(self.mean[:n], axis=1)
            self._prepare(np.flatnonzero(self._block >= 0))

    def mix(self, shares: dict[str, float]) -> None:
        """Set what arrives from now on: shares by class name."""
        weights = np.array([shares.get(name, 0.0) for name in self.classes.names])
        self._mix = np.cumsum(weights / weights.sum())
        self._mix[np.flatnonzero(weights)[-1] :] = 1.0
        self._prepare(np.flatnonzero(self._block >= 0))

    def resize(self, count: int) -> None:
        """Remove the last requests, or add new ones, until `count` run."""
        if count > self.count:
            self._seat(np.arange(self.count, count))
        self.count = count
        self.context_tokens = int(self.classes.context[self.kind[:count]].sum())

    def generate(self, tokens: NDArray[np.int64]) -> None:
        """Give every running request its tokens [count]; a finished request is replaced by the next arrival of its seat."""
        remaining = self.remaining[: self.count]
        remaining -= tokens
        done = np.flatnonzero(remaining <= 0)
        if len(done):
            self._seat(done)
            self.context_tokens = int(self.classes.context[self.kind[: self.count]].sum())

    def luck(self) -> Floats:
        """A uniform number per running request and step: [count]."""
        at = self._luck_at[: self.count]
        at += 1
        return np.asarray(self._luck[at & (LUCK_TABLE - 1)])

    def draw(self, rng: np.random.Generator) -> Floats:
        """True conditional acceptance q [count, max_k] of the coming step."""
        kappa = self.classes.concentration[self.kind[: self.count]][:, None]
        a = self.mean[: self.count] * kappa
        return np.asarray(rng.beta(np.maximum(a, FAR), np.maximum(kappa - a, FAR)))

    def draw_after(self, k: int, accepted: NDArray[np.int64], rng: np.random.Generator) -> Floats:
        """The same of the first k positions for a step whose outcome accept_len [count] is known: q [count, k].

        A Beta prior after one Bernoulli draw: Beta(a + 1, b) where accepted, Beta(a, b + 1) at the first rejection, the prior
        behind it. Outcome first and q after it has the same distribution as q first, with less variance of the outcome.
        """
        kappa = self.classes.concentration[self.kind[: self.count]][:, None]
        a = self.mean[: self.count, :k] * kappa
        position = np.arange(k)
        b = kappa - a + (position == accepted[:, None])
        a += position < accepted[:, None]
        return np.asarray(rng.beta(np.maximum(a, FAR), np.maximum(b, FAR)))

    def confidences(self, q: Floats) -> NDArray[np.float32]:
        """The draft model's confidences for q [count, k]: float32 in (0, 1]."""
        kind = self.kind[: self.count]
        inside = np.clip(q, FAR, 1.0 - FAR)
        x = np.log(inside / (1.0 - inside))
        x -= self.classes.score_bias[kind][:, None]
        x /= self.classes.score_slope[kind][:, None]
        # Beyond 60 a sigmoid is 1 in float32, and exp must not overflow.
        return _sigmoid(np.clip(x, -60.0, 60.0)).astype(np.float32)

    def _acceptance(self, kind: NDArray[np.int64], quality: Floats) -> Floats:
        return _sigmoid(self.classes.accept_logit[kind] + quality[..., None])

    def _seat(self, seats: NDArray[np.int64]) -> None:
        """Start the next arrival of each of these seats."""
        empty = seats[self._come[seats] == AHEAD]
        if len(empty):
            self._fill(empty)
        at = seats, self._come[seats]
        self.kind[seats] = self._ready_kind[at]
        self.quality[seats] = self._ready_quality[at]
        self.remaining[seats] = self._ready_length[at]
        self._luck_at[seats] = self._ready_luck[at]
        mean = self._ready_mean[at]
        self.mean[seats] = mean
        self.survival[seats] = np.cumprod(mean, axis=1)
        self.ids[seats] = np.arange(self._next_id, self._next_id + len(seats), dtype=np.int64)
        self._next_id += len(seats)
        self._come[seats] += 1

    def _fill(self, seats: NDArray[np.int64]) -> None:
        """Generate the next block of arrivals of these seats."""
        self._block[seats] += 1
        self._come[seats] = 0
        for seat, block in zip(seats.tolist(), self._block[seats].tolist(), strict=True):
            rng = np.random.default_rng([self._seed, ARRIVALS, seat, block])
            self._ready_share[seat] = rng.random(AHEAD)
            self._ready_normal[seat] = rng.standard_normal(AHEAD)
            self._ready_length[seat] = rng.geometric(self._leave, AHEAD)
            self._ready_luck[seat] = rng.integers(LUCK_TABLE, size=AHEAD)
        self._prepare(seats)

    def _prepare(self, seats: NDArray[np.int64]) -> None:
        """Apply the present classes and mix to the generated arrivals."""
        kind = np.searchsorted(self._mix, self._ready_share[seats], side="right")
        quality = self._ready_normal[seats] * self.classes.spread[kind]
        self._ready_kind[seats], self._ready_quality[seats] = kind, quality
        self._ready_mean[seats] = self._acceptance(kind, quality)
