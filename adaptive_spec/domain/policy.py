"""The policy: what the sidecar decides and the engine executes, and the search of all plans of one step.

    goodput(plan) = E[tokens out] / E[step time]
                  = (b + sum of the survival probabilities of the verified draft tokens) / (fixed_s[K, b] + verify_s[num_tokens])

Goodput is not unimodal on a staircase: filling a tile is free, crossing its boundary is not, and beyond it may pay again.
So every plan is evaluated, never only the neighbours of the current one. Regimes: inside a tile more draft tokens always
help; at a boundary the next token must earn the jump together with all that fits behind it; far up the staircase, where
latency grows with tokens, only near-certain tokens pay and K falls to 0.

This module runs in the server's process too: numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LOGIT_LIMIT = 10.0
GRID_POINTS = 81
"""Survival maps are sampled on logits -10..10 in steps of 0.25."""
_POINTS_PER_LOGIT = (GRID_POINTS - 1) / (2 * LOGIT_LIMIT)
_LOWEST, _HIGHEST = 1.0 / (1.0 + np.exp(np.array([LOGIT_LIMIT, -LOGIT_LIMIT]) * (1.0 - 1e-12)))
"""Scores just inside the ends of the grid; float64, so that what is compared with them is too."""


class Mode(StrEnum):
    """What the controller is doing. SWEEP, ACTIVE and PINNED act on the engine, the others leave it where it is."""

    SWEEP = "sweep"
    SHADOW = "shadow"
    ACTIVE = "active"
    PAUSED = "paused"
    PINNED = "pinned"
    FALLBACK = "fallback"


class Granularity(StrEnum):
    """BATCH: one K for all requests of a step. REQUEST: verify_len may differ (ragged verification)."""

    BATCH = "batch"
    REQUEST = "request"


class Trial(NamedTuple):
    """A plan to be run for a few steps whatever the policy says, to measure it.

    batch_size: the batch it is for; the engine holds its batch there if it can (0: any). k: draft length. num_tokens:
    tokens to verify (0: all drafted ones). steps: how many.
    """

    batch_size: int
    k: int
    num_tokens: int
    steps: int


class GridPosition(NamedTuple):
    """Where scores lie on the grid of survival maps: index of the point below, and how far they are towards the next (0..1)."""

    low: NDArray[np.int64]
    weight: Floats

    @property
    def nearest(self) -> NDArray[np.int64]:
        return self.low + (self.weight >= 0.5)


def grid_position(score: NDArray[np.floating]) -> GridPosition:
    """Scores in [0, 1], any shape, to their places on the grid; logits are clipped to +-LOGIT_LIMIT."""
    # Written for a handful of elements: this runs in every step of the server, and each call of numpy costs a microsecond.
    q = np.minimum(np.maximum(score, _LOWEST), _HIGHEST)
    x = np.log(q / (1.0 - q))
    x += LOGIT_LIMIT
    x *= _POINTS_PER_LOGIT
    low = x.astype(np.int64)
    x -= low
    return GridPosition(low, x)


@dataclass(frozen=True)
class SurvivalMap:
    """Calibrated P(draft position j is accepted), as tables the engine can apply without knowing how they were fitted.

    table: float [K, GRID_POINTS], probabilities at the grid's logits. conditional: if true, row j maps the confidence of
    token j to P(accept j | all before accepted) and survival is the running product; if false, row j maps the cumulative
    score up to j to survival itself.
    """

    table: NDArray[np.float32]
    conditional: bool

    def survival(self, confidences: NDArray[np.floating]) -> Floats:
        """Confidences [b, k] in (0, 1] -> survival probabilities [b, k], never increasing along a row."""
        return self.survival_at(grid_position(confidences if self.conditional else np.cumprod(confidences, axis=1)))

    def survival_at(self, position: GridPosition) -> Floats:
        """The same for scores [b, k] whose places on the grid are known: of the confidences if conditional, else cumulative."""
        low, weight = position
        flat, offsets = self._flat
        index = low + offsets[: low.shape[1]]
        value = flat.take(index)
        index += 1
        above = flat.take(index)
        above -= value
        above *= weight
        value += above
        accumulate = np.multiply.accumulate if self.conditional else np.minimum.accumulate
        survival: Floats = accumulate(value, axis=1)
        return survival

    @cached_property
    def _flat(self) -> tuple[Floats, NDArray[np.int64]]:
        """The table in one row, and where each position begins in it."""
        return self.table.astype(np.float64).ravel(), np.arange(len(self.table)) * GRID_POINTS


@dataclass(frozen=True)
class Policy:
    """One immutable decision of the controller, as the engine adopts it.

    version: 1, 2, ... acting: False means "stay on the launch K" (shadow, fallback). mode, granularity: see the enums.
    max_k: largest K there is. k_table: uint8 [max_batch + 1, contexts], K by batch size and context bucket.
    context_edges: float [contexts - 1], mean KV tokens per request at which the next bucket begins.
    fixed_s: float32 [max_k + 1, max_batch + 1], seconds a step costs beside verification (draft, draft-extend, overhead).
    verify_s: float32 [tokens + 1], predicted verify seconds by num_tokens. context_s_per_token: seconds per KV token.
    survival: calibration. verify_all: True sends every drafted token to verification (pinned, and batch granularity).
    trials: run first, once.
    """

    version: int
    mode: Mode
    acting: bool
    granularity: Granularity
    max_k: int
    k_table: NDArray[np.uint8]
    context_edges: NDArray[np.float32]
    fixed_s: NDArray[np.float32]
    verify_s: NDArray[np.float32]
    context_s_per_token: float
    survival: SurvivalMap
    verify_all: bool
    trials: tuple[Trial, ...] = field(default=())

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """K of the table for a batch; beyond the table its last row holds."""
        row = self.k_table[min(batch_size, len(self.k_table) - 1)]
        if len(row) == 1:
            return int(row[0])
        return int(row[int(np.searchsorted(self.context_edges, kv_tokens / max(batch_size, 1), side="right"))])


def best_verified(survival: Floats, fixed_s: float, verify_s: NDArray[np.floating]) -> tuple[int, float]:
    """Search all numbers of verified draft tokens of one step.

    survival: [b, k]. fixed_s: seconds beside verification. verify_s: [>= b * (k + 1) + 1] seconds by num_tokens.
    Returns (draft tokens to verify, goodput in tokens/s).
    """
    return _best_count(survival, _best_first(survival), fixed_s, verify_s)


def best_slots(survival: Floats, count: int) -> NDArray[np.uint8]:
    """Give `count` verification slots to the (request, position) pairs most likely to survive: [b, k] -> verify_len [b].

    Survival never increases along a row, so the chosen slots of a request are always its first ones.
    """
    b, k = survival.shape
    return np.full(b, k, dtype=np.uint8) if count >= b * k else _slots(_best_first(survival), count, b, k)


def best_lengths(survival: Floats, fixed_s: float, verify_s: NDArray[np.floating]) -> NDArray[np.uint8]:
    """`best_slots` for the count of `best_verified`, in one sort: verify_len [b]."""
    b, k = survival.shape
    order = _best_first(survival)
    count, _ = _best_count(survival, order, fixed_s, verify_s)
    return _slots(order, count, b, k)


def _best_first(survival: Floats) -> NDArray[np.int64]:
    """Indices into the flat survival, best first; of equals the earlier one, which within a request is the one that must come."""
    return (-survival).ravel().argsort(kind="stable")


def _best_count(survival: Floats, order: NDArray[np.int64], fixed_s: float, verify_s: NDArray[np.floating]) -> tuple[int, float]:
    b, k = survival.shape
    expected = np.empty(b * k + 1)
    expected[0] = b
    expected[1:] = survival.take(order)
    np.add.accumulate(expected, out=expected)
    expected /= verify_s[b : b * (k + 1) + 1] + fixed_s
    best = int(expected.argmax())
    return best, float(expected[best])


def _slots(order: NDArray[np.int64], count: int, b: int, k: int) -> NDArray[np.uint8]:
    return np.bincount(order[:count] // max(k, 1), minlength=b).astype(np.uint8)


class Planner:
    """Executes policies step by step inside the engine: trials first, then the table, then the per-request search.

    launch_k: K the engine was started with, used whenever no policy is acting. max_k: largest K it can run. A trial waits
    at most `PATIENCE_STEPS` for its batch size, so that a sweep cannot hang on a batch that never comes.
    """

    PATIENCE_STEPS = 64

    def __init__(self, launch_k: int, max_k: int) -> None:
        self.launch_k = launch_k
        self.max_k = max_k
        self.policy: Policy | None = None
        self._running: Trial | None = None
        self._trial = 0
        self._trial_steps = 0
        self._waited = 0
        self._k = launch_k
        self._kv_tokens = 0

    @property
    def version(self) -> int:
        """Version of the policy this planner acts on, 0 on the launch K."""
        return self.policy.version if self.policy is not None and self.policy.acting else 0

    @property
    def in_trial(self) -> bool:
        """Whether the step `draft_length` was last asked for is a trial."""
        return self._running is not None

    @property
    def trial_tokens(self) -> int:
        """Tokens the trial `in_trial` speaks of wants verified, 0 for all; 0 outside a trial too."""
        return self._running.num_tokens if self._running is not None else 0

    @property
    def held_batch_size(self) -> int:
        """Batch size the current trial wants, 0 when any will do."""
        trial = self._current_trial()
        return trial.batch_size if trial is not None else 0

    def adopt(self, policy: Policy | None) -> None:
        """Take a new policy (None: back to the launch K); its trials start from the first."""
        self.policy = policy
        self._trial = self._trial_steps = self._waited = 0

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """Return K of the coming step, 0..max_k."""
        self._kv_tokens, self._running = kv_tokens, None
        policy = self.policy
        if policy is None or not policy.acting:
            self._k = self.launch_k
            return self._k
        trial = self._current_trial()
        if trial is not None:
            if trial.batch_size in (0, batch_size):
                self._running = trial
                self._trial_steps += 1
                self._k = min(trial.k, self.max_k)
                return self._k
            self._waited += 1
        self._k = min(policy.draft_length(batch_size, kv_tokens), self.max_k)
        return self._k

    def verify_lengths(self, confidences: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return verify_len [b] for the drafted confidences [b, k] of the step `draft_length` was asked for."""
        b, k = confidences.shape
        policy = self.policy
        if policy is None or not policy.acting or k == 0:
            return np.full(b, k, dtype=np.uint8)
        if self._running is not None:
            wanted = self._running.num_tokens
            if wanted == 0 or policy.granularity is Granularity.BATCH:
                return np.full(b, k, dtype=np.uint8)
            return best_slots(policy.survival.survival(confidences), min(max(wanted - b, 0), b * k))
        if policy.verify_all or b * (k + 1) >= len(policy.verify_s):
            return np.full(b, k, dtype=np.uint8)
        survival = policy.survival.survival(confidences)
        fixed = float(policy.fixed_s[k, min(b, policy.fixed_s.shape[1] - 1)]) + policy.context_s_per_token * self._kv_tokens
        return best_lengths(survival, fixed, policy.verify_s)

    def _current_trial(self) -> Trial | None:
        if self.policy is None or not self.policy.acting:
            return None
        trials = self.policy.trials
        while self._trial < len(trials):
            if self._trial_steps < trials[self._trial].steps and self._waited < self.PATIENCE_STEPS:
                return trials[self._trial]
            self._trial += 1
            self._trial_steps = self._waited = 0
        return None
