"""The cold-start sweep: which token counts to measure next, so that few steps find every tile boundary.

Rounds of trials. The first measures 1, 2, 4, ... tokens; every later one halves each interval between measured counts whose
latencies differ by more than the jump threshold, until such intervals are one token wide. A staircase with s boundaries up to
T tokens costs about log2(T) + s log2(T) token counts instead of T: the steps are spent where the curve bends. Draft lengths
and batch sizes are varied along the way, so that the same steps teach the draft's cost and the calibration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.config.settings import SweepSettings
from adaptive_spec.domain.engine_info import EngineInfo
from adaptive_spec.domain.policy import Granularity, Trial
from adaptive_spec.models.latency.robust_mean import RobustMean

EVEN_LOOKS = 32
"""Evenly spaced token counts of the first round."""
WIDE_TOKENS = 16


class Sweep:
    """Plans one sweep. Each token count is asked for at most `MAX_ASKS` times: an engine may be unable to reach it.

    On a noisy machine every count is measured until its standard error is a quarter of the jump threshold, or `MOST_LOOKS`.
    """

    MAX_ASKS = 4
    FIRST_LOOK = 2
    """Samples of a first look: one may be a first replay, and that is never too short."""
    MOST_LOOKS = 12

    def __init__(self, settings: SweepSettings, info: EngineInfo, jump_threshold: float) -> None:
        self._settings, self._info, self._threshold = settings, info, jump_threshold
        self._asked: dict[int, int] = {}
        self._turn = 0
        self.steps = 0
        """Trial steps planned so far."""
        self.open_intervals = 0
        """Intervals that were still too wide when the last round was planned."""

    def reachable(self, batch_size: int) -> NDArray[np.int64]:
        """Token counts the engine can be made to verify, ascending; `batch_size` is what it serves now."""
        info = self._info
        batches = range(1, info.max_batch + 1) if info.holds_batch else [max(batch_size, 1)]
        if info.granularity is Granularity.REQUEST:
            counts = np.arange(batches[0], batches[-1] * (info.max_k + 1) + 1)
        else:
            counts = np.unique([b * (k + 1) for b in batches for k in info.candidates])
        return counts[counts <= max(self._settings.max_tokens, int(counts[0]))]

    def next_round(
        self, cells: Mapping[int, RobustMean], sigma: float, batch_size: int, padded_to: Mapping[int, int]
    ) -> tuple[Trial, ...]:
        """Trials of the next round, empty when the sweep is over.

        cells: what is measured, by padded token count. sigma: relative noise of one sample. padded_to: where num_tokens and
        padded tokens were seen to differ.
        """
        counts = self.reachable(batch_size)
        looks = int(min(max(math.ceil((sigma / (0.25 * self._threshold)) ** 2), self.FIRST_LOOK), self.MOST_LOOKS))
        wanted = self._refinement(counts, cells, looks, padded_to) if self._asked else self._first_round(counts)
        trials: list[Trial] = []
        for tokens, steps in wanted:
            if self.steps + steps > self._settings.max_steps:
                break
            trial = self._trial(tokens, steps, batch_size)
            if trial is not None:
                self._asked[tokens] = self._asked.get(tokens, 0) + 1
                self.steps += steps
                trials.append(trial)
        return tuple(sorted(trials))

    def _first_round(self, counts: NDArray[np.int64]) -> list[tuple[int, int]]:
        # Doublings, and even steps besides: a curve may rise and fall again between two doublings.
        grid = np.concatenate((2.0 ** np.arange(0, np.log2(counts[-1]) + 1), np.linspace(0, counts[-1], EVEN_LOOKS + 1)[1:]))
        if self._info.granularity is Granularity.BATCH and not self._info.holds_batch:
            chosen = counts  # only a handful: every K at the present batch size
        else:
            chosen = np.unique(counts[np.minimum(np.searchsorted(counts, grid), len(counts) - 1)])
        return [(int(t), self.FIRST_LOOK) for t in chosen]

    def _refinement(
        self, counts: NDArray[np.int64], cells: Mapping[int, RobustMean], looks: int, padded_to: Mapping[int, int]
    ) -> list[tuple[int, int]]:
        measured = [int(t) for t in counts if _measured(cells, padded_to.get(int(t), int(t)))]
        mean = {t: cells[padded_to.get(t, t)].mean_y for t in measured}
        wanted = {t: looks - n for t in measured if (n := cells[padded_to.get(t, t)].samples) < looks}
        self.open_intervals = 0
        for low, high in itertools.pairwise(measured):
            ratio = mean[high] / mean[low]
            # In a wide interval a jump may be half hidden by a slope the other way.
            bend = self._threshold * (0.6 if high - low > WIDE_TOKENS else 1.0)
            if max(ratio, 1.0 / ratio) < 1.0 + bend:
                continue
            inside = counts[(counts > low) & (counts < high)]
            if len(inside):
                self.open_intervals += 1
                wanted[int(inside[np.argmin(np.abs(inside - (low + high) / 2))])] = looks
            else:
                # A boundary, to the token: make both its sides sure.
                for t in (low, high):
                    missing = max(self._settings.samples_per_count, looks) - cells[padded_to.get(t, t)].samples
                    if missing > 0:
                        wanted[t] = missing
        return [(t, n) for t, n in sorted(wanted.items()) if self._asked.get(t, 0) < self.MAX_ASKS]

    def _trial(self, tokens: int, steps: int, batch_size: int) -> Trial | None:
        info = self._info
        self._turn += 1
        preferred = info.candidates[-1 - self._turn % max(len(info.candidates) - 1, 1)]
        if not info.holds_batch:
            batch = max(batch_size, 1)
        elif info.granularity is Granularity.REQUEST:
            lowest = -(-tokens // (info.max_k + 1))
            batch = min(max(-(-tokens // (preferred + 1)), lowest), min(tokens, info.max_batch))
        else:
            fitting = [
                tokens // (k + 1) for k in info.candidates if tokens % (k + 1) == 0 and tokens // (k + 1) <= info.max_batch
            ]
            if not fitting:
                return None
            batch = fitting[self._turn % len(fitting)]
        k = next((k for k in info.candidates if batch * (k + 1) >= tokens), None)
        if k is None or batch > tokens:
            return None
        return Trial(batch if info.holds_batch else 0, k, tokens if info.granularity is Granularity.REQUEST else 0, steps)


def _measured(cells: Mapping[int, RobustMean], padded: int) -> bool:
    return padded in cells and cells[padded].weight > 0.0
