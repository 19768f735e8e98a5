"""The cold-start sweep: which token counts to measure next, so that few steps find every tile boundary.

The sweep runs in rounds of trials. The first round measures 1, 2, 4, ... tokens; every later one halves each interval between
measured counts whose latencies differ by more than the jump threshold, until such intervals are one token wide. A staircase
with s boundaries up to T tokens needs about log2(T) + s log2(T) token counts instead of T. K and batch size are varied along
the way, so that the same steps measure the draft's cost and the calibration.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import SweepSettings
from adaptive_spec.domain.allowed import LARGEST_K
from adaptive_spec.domain.arrays import Bools
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Trial
from adaptive_spec.models.latency.measured_counts import MeasuredCounts

EVEN_COUNTS = 32
"""Evenly spaced token counts of the first round."""
WIDE_TOKENS = 16


class Sweep:
    """Plans one sweep. Each token count is requested at most `MAX_REQUESTS` times: an engine may be unable to run it.

    On a noisy machine every count gets samples until its standard error is a quarter of the jump threshold, at most
    `MAX_SAMPLES`.
    """

    MAX_REQUESTS = 4
    FIRST_SAMPLES = 2
    """Samples of a count when it is first measured: a first replay of a captured graph may take too long, never too short."""
    MAX_SAMPLES = 12

    def __init__(
        self, settings: SweepSettings, info: EngineInfo, jump_threshold: float, allowed: Bools | None = None,
        verified: tuple[int, int] = (0, LARGEST_K),
    ) -> None:  # fmt: skip
        """allowed: K within the guard rails, [max_batch + 1, max_k + 1]; None: all that the engine runs. verified: see
        `verified_rails`; at request granularity every count of a sweep is within them.
        """
        self._least, self._most = verified
        self._settings, self._info, self._threshold = settings, info, jump_threshold
        mask = info.allowed_mask() if allowed is None else allowed
        self._allowed: list[tuple[int, ...]] = [tuple(np.flatnonzero(row).tolist()) for row in mask]
        self._candidates: tuple[int, ...] = tuple(np.flatnonzero(mask.any(axis=0)).tolist())
        self._requested: dict[int, int] = {}
        self._turn = 0
        self.steps = 0
        """Trial steps planned so far."""
        self.open_intervals = 0
        """Intervals that were still too wide when the last round was planned."""

    @property
    def progress(self) -> float:
        """Estimated share of the sweep that is done, 0..1: every open interval needs about six more first measurements."""
        return self.steps / (self.steps + 6.0 * self.FIRST_SAMPLES * max(self.open_intervals, 1))

    def reachable(self, batch_size: int) -> NDArray[np.int64]:
        """Token counts the engine can be made to verify, ascending; `batch_size` is what it serves now."""
        info = self._info
        batches = range(1, info.max_batch + 1) if info.holds_batch else [max(batch_size, 1)]
        if info.granularity is Granularity.REQUEST:
            counts = np.arange(batches[0] * (self._least + 1), max(self._most_tokens(b) for b in batches) + 1)
            # Of the batches whose least count a count reaches, the largest one has the most tokens.
            largest = np.minimum(counts // (self._least + 1), batches[-1])
            counts = counts[counts <= largest * (self._most + 1)]
        else:
            counts = np.unique([b * (k + 1) for b in batches for k in self._allowed_k(b)])
        return counts[counts <= max(self._settings.max_tokens, int(counts[0]))]

    def next_round(self, measured: MeasuredCounts, batch_size: int) -> tuple[Trial, ...]:
        """Trials of the next round, empty when the sweep is over. batch_size: what the engine serves now."""
        counts = self.reachable(batch_size)
        samples = int(min(max(math.ceil((measured.noise / (0.25 * self._threshold)) ** 2), self.FIRST_SAMPLES), self.MAX_SAMPLES))
        wanted = self._refinement(counts, measured, samples) if self._requested else self._first_round(counts)
        trials: list[Trial] = []
        for tokens, steps in wanted:
            if self.steps + steps > self._settings.max_steps:
                break
            trial = self._trial(tokens, steps, batch_size)
            if trial is not None:
                self._requested[tokens] = self._requested.get(tokens, 0) + 1
                self.steps += steps
                trials.append(trial)
        return tuple(sorted(trials))

    def _first_round(self, counts: NDArray[np.int64]) -> list[tuple[int, int]]:
        # Doublings and evenly spaced counts: a curve may rise and fall again between two doublings.
        grid = np.concatenate((2.0 ** np.arange(0, np.log2(counts[-1]) + 1), np.linspace(0, counts[-1], EVEN_COUNTS + 1)[1:]))
        if self._info.granularity is Granularity.BATCH and not self._info.holds_batch:
            chosen = counts  # every K at the present batch size
        else:
            chosen = np.unique(counts[np.minimum(np.searchsorted(counts, grid), len(counts) - 1)])
        return [(int(t), self.FIRST_SAMPLES) for t in chosen]

    def _refinement(self, counts: NDArray[np.int64], measured: MeasuredCounts, samples: int) -> list[tuple[int, int]]:
        """(token count, trial steps) of a later round. samples: wanted of every count."""
        known = {t: found for t in counts.tolist() if (found := measured.get(t)) is not None}
        wanted = {t: samples - found.samples for t, found in known.items() if found.samples < samples}
        self.open_intervals = 0
        for low, high in itertools.pairwise(known):
            ratio = known[high].mean_s / known[low].mean_s
            # In a wide interval a falling slope may hide half of a jump.
            bend = self._threshold * (0.6 if high - low > WIDE_TOKENS else 1.0)
            if max(ratio, 1.0 / ratio) < 1.0 + bend:
                continue
            inside = counts[(counts > low) & (counts < high)]
            if len(inside):
                self.open_intervals += 1
                wanted[int(inside[np.argmin(np.abs(inside - (low + high) / 2))])] = samples
            else:
                # A boundary, to the token: measure both its sides well.
                for t in (low, high):
                    missing = max(self._settings.samples_per_count, samples) - known[t].samples
                    if missing > 0:
                        wanted[t] = missing
        return [(t, n) for t, n in sorted(wanted.items()) if self._requested.get(t, 0) < self.MAX_REQUESTS]

    def _allowed_k(self, batch_size: int) -> tuple[int, ...]:
        return self._allowed[min(batch_size, len(self._allowed) - 1)]

    def _most_tokens(self, batch_size: int) -> int:
        """Most tokens of a step at request granularity."""
        return batch_size * (min(self._allowed_k(batch_size)[-1], self._most) + 1)

    def _trial(self, tokens: int, steps: int, batch_size: int) -> Trial | None:
        info = self._info
        self._turn += 1
        preferred = self._candidates[-1 - self._turn % max(len(self._candidates) - 1, 1)]
        if not info.holds_batch:
            batch = max(batch_size, 1)
        elif info.granularity is Granularity.REQUEST:
            lowest = -(-tokens // (min(self._candidates[-1], self._most) + 1))
            batch = min(max(-(-tokens // (preferred + 1)), lowest), min(tokens // (self._least + 1), info.max_batch))
            if self._most_tokens(batch) < tokens:
                # Not enough K is allowed at that size: the smallest one that reaches the count.
                sizes_up = range(1, info.max_batch + 1)
                reaching = (b for b in sizes_up if b * (self._least + 1) <= tokens <= self._most_tokens(b))
                batch = next(reaching, batch)
        else:
            sizes = [(tokens // (k + 1), k) for k in self._candidates if tokens % (k + 1) == 0]
            fitting = [b for b, k in sizes if b <= info.max_batch and k in self._allowed_k(b)]
            if not fitting:
                return None
            batch = fitting[self._turn % len(fitting)]
        k = next((k for k in self._allowed_k(batch) if batch * (k + 1) >= tokens), None)
        if k is None or batch > tokens:
            return None
        return Trial(batch if info.holds_batch else 0, k, tokens if info.granularity is Granularity.REQUEST else 0, steps)
