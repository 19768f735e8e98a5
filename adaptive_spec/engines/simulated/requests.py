"""The requests of the simulated server: who arrives, how well they can be drafted for, and when they leave.

    quality u ~ Normal(0, request_spread) at arrival; position j of class c: m_j = sigmoid(logit(accept[j]) + u)
    q_j ~ Beta(m_j kappa, (1 - m_j) kappa) anew each step; confidence p_j = sigmoid((logit(q_j) - score_bias) / score_slope)

The n-th arrival is the same for every policy: its quality, its length, and which share of the mix it falls in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.engines.simulated.scenario import DriftEvent, RequestClass, ScenarioFile

Floats = NDArray[np.float64]
AHEAD = 512
"""Arrivals made ready in one go."""
FAR = 1e-12
"""Probabilities stay this far from 0 and 1 before their logit is taken."""


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


class Classes:
    """Parameters by class, as they are now: accept_logit [classes, max_k], the others [classes]."""

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
    """The running requests, in arrival order of their seats. Arrays are [capacity, ...]; only the first `count` count.

    mean: m_j [capacity, max_k]. survival: product of m_1..m_j. context_tokens: of all running requests together.
    """

    def __init__(self, file: ScenarioFile, capacity: int, rng: np.random.Generator) -> None:
        self.classes = Classes(file)
        self._rng = rng
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
        self._at = AHEAD

    def change(self, event: DriftEvent) -> None:
        """Apply a drift event of a class, to those who run and those who come."""
        if self.classes.change(event):
            n = self.count
            self.mean[:n], self.survival[:n] = self._acceptance(self.kind[:n], self.quality[:n])
            self._prepare()

    def mix(self, shares: dict[str, float]) -> None:
        """Set what arrives from now on: shares by class name."""
        weights = np.array([shares.get(name, 0.0) for name in self.classes.names])
        self._mix = np.cumsum(weights / weights.sum())
        self._mix[np.flatnonzero(weights)[-1] :] = 1.0
        self._prepare()

    def resize(self, count: int) -> None:
        """Let the last ones leave, or new ones arrive, until `count` run."""
        if count > self.count:
            self._seat(np.arange(self.count, count))
        self.count = count
        self.context_tokens = int(self.classes.context[self.kind[:count]].sum())

    def generate(self, tokens: NDArray[np.int64]) -> None:
        """Give every running request its tokens [count]; who is done leaves and another takes the seat."""
        remaining = self.remaining[: self.count]
        remaining -= tokens
        done = np.flatnonzero(remaining <= 0)
        if len(done):
            self._seat(done)
            self.context_tokens = int(self.classes.context[self.kind[: self.count]].sum())

    def draw(self, k: int, rng: np.random.Generator) -> Floats:
        """True conditional acceptance q [count, k] of the coming step."""
        kappa = self.classes.concentration[self.kind[: self.count]][:, None]
        a = self.mean[: self.count, :k] * kappa
        return np.asarray(rng.beta(np.maximum(a, FAR), np.maximum(kappa - a, FAR)))

    def confidences(self, q: Floats) -> NDArray[np.float32]:
        """What the draft model says of q [count, k]: float32 in (0, 1]."""
        kind = self.kind[: self.count]
        inside = np.clip(q, FAR, 1.0 - FAR)
        x = np.log(inside / (1.0 - inside))
        x -= self.classes.score_bias[kind][:, None]
        x /= self.classes.score_slope[kind][:, None]
        return np.maximum(_sigmoid(x), 1e-30).astype(np.float32)

    def _acceptance(self, kind: NDArray[np.int64], quality: Floats) -> tuple[Floats, Floats]:
        mean = _sigmoid(self.classes.accept_logit[kind] + quality[:, None])
        return mean, np.asarray(np.cumprod(mean, axis=1))

    def _seat(self, seats: NDArray[np.int64]) -> None:
        """Put the next arrivals on these seats."""
        while len(seats):
            if self._at == AHEAD:
                self._fill()
            part, seats = seats[: AHEAD - self._at], seats[AHEAD - self._at :]
            a, b = self._at, self._at + len(part)
            self.kind[part] = self._ready_kind[a:b]
            self.quality[part] = self._ready_quality[a:b]
            self.remaining[part] = self._ready_length[a:b]
            self.mean[part] = self._ready_mean[a:b]
            self.survival[part] = self._ready_survival[a:b]
            self.ids[part] = np.arange(self._next_id, self._next_id + len(part), dtype=np.int64)
            self._next_id += len(part)
            self._at = b

    def _fill(self) -> None:
        rng = self._rng
        self._ready_share = rng.random(AHEAD)
        self._ready_normal = rng.standard_normal(AHEAD)
        self._ready_length = rng.geometric(self._leave, AHEAD)
        self._at = 0
        self._prepare()

    def _prepare(self) -> None:
        """What the classes and the mix of now make of the arrivals that are ready."""
        if self._at == AHEAD:
            return
        self._ready_kind = np.searchsorted(self._mix, self._ready_share, side="right")
        self._ready_quality = self._ready_normal * self.classes.spread[self._ready_kind]
        self._ready_mean, self._ready_survival = self._acceptance(self._ready_kind, self._ready_quality)
