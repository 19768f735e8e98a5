"""The policy: what the sidecar decides and the engine executes. Used in the engine's process: numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from adaptive_spec.domain.allowed import LARGEST_K, AllowedFrom, allowed_at, verified_rails
from adaptive_spec.domain.arrays import Float32s, KTable
from adaptive_spec.domain.survival import SurvivalMap


class Mode(StrEnum):
    """What the controller does. In SHADOW and FALLBACK its policies do not act; in the other modes they set K."""

    SWEEP = "sweep"
    SHADOW = "shadow"
    ACTIVE = "active"
    PAUSED = "paused"
    PINNED = "pinned"
    FALLBACK = "fallback"


class Granularity(StrEnum):
    """BATCH: one K for all requests of a step. REQUEST: verify_len may differ by request (ragged verification)."""

    BATCH = "batch"
    REQUEST = "request"


STEP_CHOICE_GAIN = 0.01
"""Least relative gain in predicted goodput for which the step choice leaves the table's K, so that usual requests stay on it."""
TRIAL_PATIENCE_STEPS = 64
"""Steps without the trial's batch size after which the engine skips the trial, so that a sweep always ends."""


LARGEST_PADDING = 2
"""A policy has times for batches padded to up to so many times the engine's largest batch. Nothing larger is planned for."""


def largest_tokens(max_batch: int, max_k: int) -> int:
    """Largest token count that a policy has a verify time for."""
    return LARGEST_PADDING * max_batch * (max_k + 1)


class Trial(NamedTuple):
    """A plan that is run for some steps to measure it, in place of the table's.

    batch_size: the batch it is for; an engine that can keeps its batch at this size (0: any). k: draft length. num_tokens:
    tokens to verify (0: all drafted ones). steps: number of steps.
    """

    batch_size: int
    k: int
    num_tokens: int
    steps: int


@dataclass(frozen=True)
class Policy:
    """One immutable decision of the controller, as the engine adopts it.

    version: 1, 2, ... acting: False in SHADOW and FALLBACK: the engine's fallback decides K. mode, granularity: see the enums.
    max_k: largest K. k_table: uint8 [max_batch + 1, contexts], K by batch size and context bucket.
    context_edges: float [contexts - 1], mean KV tokens per request at which the next context bucket begins.
    fixed_s: float32 [max_k + 1, max_batch + 1], seconds of a step other than verification (draft, draft-extend, overhead).
    verify_s: float32 [tokens + 1], predicted verify seconds by num_tokens. context_s_per_token: seconds per KV token.
    survival: calibration. verify_all: verify every drafted token (pinned, and batch granularity). trials: run once, before the
    table is used. allowed_from: K allowed by batch size, () for every K; every entry of k_table is allowed at its batch size.
    min_gain: relative gain that the step choice needs, >= 0. switch_s: seconds that a change of K costs, 0 when not known.
    k_min, k_max: the guard rails, 0 <= k_min <= k_max <= LARGEST_K; 0 and LARGEST_K are none. The table and the trials are within
    them; an engine that always drafts the same K keeps to them in what it verifies, see `verified_rails`.
    """

    version: int
    mode: Mode
    acting: bool
    granularity: Granularity
    max_k: int
    k_table: KTable
    context_edges: Float32s
    fixed_s: Float32s
    verify_s: Float32s
    context_s_per_token: float
    survival: SurvivalMap
    verify_all: bool
    trials: tuple[Trial, ...] = field(default=())
    allowed_from: AllowedFrom = ()
    min_gain: float = STEP_CHOICE_GAIN
    switch_s: float = 0.0
    k_min: int = 0
    k_max: int = LARGEST_K

    def allows(self, batch_size: int, k: int) -> bool:
        """Whether K is allowed at a batch size."""
        return not self.allowed_from or k in allowed_at(self.allowed_from, batch_size)

    def verified_rails(self, k: int) -> tuple[int, int]:
        """Least and most draft tokens per request, on the mean, that a step of an engine verifies which always drafts k."""
        return verified_rails((k,), self.k_min, self.k_max)

    def draft_length(self, batch_size: int, kv_tokens: int) -> int:
        """K of the table for a batch. A batch larger than the table uses its last row."""
        row = self.k_table[min(batch_size, len(self.k_table) - 1)]
        if len(row) == 1:
            return int(row[0])
        return int(row[int(np.searchsorted(self.context_edges, kv_tokens / max(batch_size, 1), side="right"))])
