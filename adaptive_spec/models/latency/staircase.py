"""Verify latency: time against verified tokens, a staircase.

    verify_s(tokens, kv) = staircase(tokens) + context_s_per_token * kv
    staircase(tokens)    = intercept_s + slope_s_per_token * tokens   within the segment of `tokens`

`LatencyModel` keeps one robust forgetting mean per token count and partitions the means into segments. The prediction
for a token count is its segment's line, corrected by the mean of that count in proportion to how precisely it was measured.
Regimes: a measured count is predicted by its own mean; a count between measured ones by the line; beyond the last measured
count the line continues and the standard error grows, so that such a count is probed before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.staircase import Boundary, Segment
from adaptive_spec.models.latency.measured_counts import MeasuredCount, MeasuredCounts
from adaptive_spec.models.latency.robust_mean import STALE_STEPS, LeadingMeans
from adaptive_spec.models.latency.segments import find_boundaries, fit_segments
from adaptive_spec.models.latency.speed_factor import Shift, SpeedFactor

MISFIT = 0.02
"""Relative deviation of real tiles from straight lines (1-3 % in published curves): no mean counts as more precise than this."""
STALE_ERROR = 0.3
"""Relative standard error of a mean as old as `STALE_STEPS`; it grows with the square root of age."""
UNKNOWN_PER_DOUBLING = 0.15
"""Relative standard error added per doubling of the token count, or the batch, away from what was measured."""

OWN_SHARE = 1.0 / 3.0
"""Share of a mean's error from changes since it was measured that is its own. The rest is common to all means of that age, and
says nothing against the shape of the curve between them."""

Gap = tuple[NDArray[np.int64], Floats, Floats, Floats]
"""See `LatencyFit._gap`."""


@dataclass(frozen=True)
class LatencyFit:
    """A fitted staircase.

    tokens, mean_s, weight, samples, stale_error: [counts] measured token counts, their mean seconds without context, effective
    and raw samples, relative standard error from age and from changes since they were measured. mape: mean absolute relative
    deviation of mean_s from the lines. sigma: relative noise of one sample. excess_spread: relative standard deviation between
    neighbouring counts beyond noise and misfit.
    """

    segments: tuple[Segment, ...]
    boundaries: tuple[Boundary, ...]
    tokens: NDArray[np.int64]
    mean_s: Floats
    weight: Floats
    samples: NDArray[np.int64]
    stale_error: Floats
    mape: float
    sigma: float
    excess_spread: float
    context_s_per_token: float

    def line_s(self, tokens: NDArray[np.int64]) -> Floats:
        """Seconds on the segments' lines, for any token counts >= 0.

        Between two segments lies a boundary, anywhere: the mean is a line from the end of the left to the start of the right one.
        """
        return self._line_and_gap(tokens)[0]

    def _line_and_gap(self, tokens: NDArray[np.int64]) -> tuple[Floats, Gap | None]:
        index, intercept, slope = self._line_at(tokens)
        value: Floats = intercept + slope * tokens
        gap = self._gap(tokens, index)
        if gap is not None:
            inside, low, high, share = gap
            value[inside] = low + share * (high - low)
        last = self.segments[-1]
        at_end = last.intercept_s + last.slope_s_per_token * last.last
        beyond = np.asarray(tokens) > last.last
        if beyond.any():
            value = np.where(beyond, at_end + self._outer_slope() * (tokens - last.last), value)
        # A line through two noisy points can have any slope: never below half of the nearest measured mean.
        nearest = np.clip(np.searchsorted(self.tokens, tokens), 0, len(self.tokens) - 1)
        return np.maximum(value, 0.5 * self.mean_s[nearest]), gap

    def predict(self, tokens: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Token counts [n] >= 1 -> (seconds without context [n], standard errors in seconds [n])."""
        value, gap = self._line_and_gap(tokens)
        at = np.clip(np.searchsorted(self.tokens, tokens), 0, len(self.tokens) - 1)
        measured = self.tokens[at] == tokens
        noise = self.sigma**2 / np.maximum(self.weight[at], 1e-9) + self.excess_spread**2
        trust = MISFIT**2 / (MISFIT**2 + noise)
        value = np.where(measured, value + trust * (self.mean_s[at] - value), value)
        octave, known = np.log2(np.maximum(tokens, 1)), np.log2(self.tokens)
        distance = np.minimum(np.abs(octave - known[at]), np.abs(octave - known[np.maximum(at - 1, 0)]))
        far = MISFIT**2 + (UNKNOWN_PER_DOUBLING * distance) ** 2
        if gap is not None:
            # A boundary lies anywhere in the gap: on its left side a count costs the left segment's time.
            inside, low, high, share = gap
            far[inside] += share * (1.0 - share) * ((high - low) / value[inside]) ** 2
        relative = np.sqrt(np.where(measured, trust * noise, far + noise) + self.stale_error[at] ** 2 + 1e-8)
        return value, relative * value

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Arrays of `latency_model.npz`: the fit, in seconds."""
        return {
            "segments": np.array(
                [[s.first, s.last, s.intercept_s, s.slope_s_per_token] for s in self.segments], dtype=np.float64
            ),
            "boundaries": np.array([[b.tokens, b.jump_ratio] for b in self.boundaries], dtype=np.float64).reshape(-1, 2),
            "points": np.stack((self.tokens.astype(np.float64), self.mean_s, self.weight, self.samples.astype(np.float64))),
            "quality": np.array([self.mape, self.sigma, self.context_s_per_token]),
        }

    @cached_property
    def _lines(self) -> Floats:
        """Columns of all segments, [4, segments]: first, last, intercept, slope."""
        rows = [(s.first, s.last, s.intercept_s, s.slope_s_per_token) for s in self.segments]
        return np.array(rows, dtype=np.float64).T

    def _line_at(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Index, intercept and slope of the segment each count belongs to."""
        _, last, intercept, slope = self._lines
        index = np.minimum(np.searchsorted(last, tokens), len(last) - 1)
        return index, intercept[index], slope[index]

    def _gap(self, tokens: NDArray[np.int64], index: NDArray[np.int64]) -> Gap | None:
        """Counts between two segments, None without any: where they are in `tokens`, seconds at the left segment's last count
        and at the right one's first, and how far each is from left to right, 0..1.
        """
        first, last, intercept, slope = self._lines
        inside = np.flatnonzero((tokens < first[index]) & (index > 0))
        if not len(inside):
            return None
        right = index[inside]
        left = right - 1
        share = (tokens[inside] - last[left]) / (first[right] - last[left])
        return inside, intercept[left] + slope[left] * last[left], intercept[right] + slope[right] * first[right], share

    def _outer_slope(self) -> float:
        """Slope beyond the last measured count: the trend over the outer half of the curve, never falling."""
        first = int(np.searchsorted(self.tokens, self.tokens[-1] / 2))
        x, y = self.tokens[first:].astype(np.float64), self.mean_s[first:]
        if len(x) < 2:
            return float(self.mean_s[-1] / self.tokens[-1]) * 0.5
        return max(float(np.polyfit(x, y, 1)[0]), 0.0)


def fit_staircase(rows: Floats, sigma: float, context_s_per_token: float, jump_threshold: float) -> LatencyFit:
    """Fit the staircase to weighted means: rows [n >= 1, 7] as `RobustMeans.rows()`. A pure function."""
    tokens = rows[:, 0].astype(np.int64)
    mean = np.maximum(rows[:, 3] - context_s_per_token * rows[:, 2], 0.05 * rows[:, 3])
    noise = np.maximum(sigma**2 / rows[:, 1] - rows[:, 6] ** 2, 0.0) + (OWN_SHARE * rows[:, 6]) ** 2
    noise = np.maximum(noise, 1e-9)
    excess_spread = _excess_spread(tokens, mean, noise)
    stale_error = np.hypot(rows[:, 6], STALE_ERROR * np.sqrt(np.minimum(rows[:, 5] / STALE_STEPS, 1.0)))
    relative_variance = noise + excess_spread**2 + MISFIT**2
    x = tokens.astype(np.float64)
    # Three parameters a segment (a break, an intercept, a slope) at ln(n) each: Schwarz's criterion in units of variance.
    penalty = 3.0 * math.log(max(len(x), 3))
    segments = fit_segments(x, mean, 1.0 / (relative_variance * mean**2), penalty)
    samples = rows[:, 4].astype(np.int64)
    stale_error = _known_by_neighbours(stale_error, tokens, segments)
    fit = LatencyFit(
        segments, (), tokens, mean, sigma**2 / noise, samples, stale_error, 0.0, sigma, excess_spread, context_s_per_token
    )  # fmt: skip
    mape = float(np.mean(np.abs(fit.line_s(tokens) / mean - 1.0)))
    ends_s, _ = fit.predict(np.array([s.first for s in segments] + [s.last for s in segments]))
    boundaries = find_boundaries(segments, ends_s[: len(segments)], ends_s[len(segments) :], jump_threshold)
    return replace(fit, boundaries=boundaries, mape=mape)


def _known_by_neighbours(stale_error: Floats, tokens: NDArray[np.int64], segments: tuple[Segment, ...]) -> Floats:
    """Errors from age of measured counts [n]: at most that of a fresher count in the same segment and of the distance to it.

    A tile is one line, so a fresh count in it says what the old ones take now; without this each of them would be probed.
    """
    octaves = UNKNOWN_PER_DOUBLING * np.log2(tokens)
    # So far apart that the running minima below never reach into another segment.
    apart = 100.0 * np.searchsorted([s.first for s in segments], tokens, side="right")
    from_left = np.minimum.accumulate(stale_error - octaves - apart) + octaves + apart
    from_right = np.minimum.accumulate((stale_error + octaves + apart)[::-1])[::-1] - octaves - apart
    return np.minimum(from_left, from_right)


def _excess_spread(tokens: NDArray[np.int64], mean: Floats, noise: Floats) -> float:
    """Relative standard deviation between neighbouring token counts beyond noise [n] and the misfit of real tiles.

    Counts measured under different background load differ even when each was measured often. Of three counts in a row the middle
    one is compared with the mean of its neighbours; the median over all such triples ignores those at boundaries. Pairs say
    nothing: whoever measures pairs puts them at the boundaries. 0 with fewer than 8 triples.
    """
    triple = np.flatnonzero(tokens[2:] - tokens[:-2] == 2)
    if len(triple) < 8:
        return 0.0
    level = np.log(mean)
    middle = level[triple + 1] - 0.5 * (level[triple] + level[triple + 2])
    spread = float(np.median(np.abs(middle))) / (0.6745 * math.sqrt(1.5))
    return math.sqrt(max(spread**2 - MISFIT**2 - float(np.median(noise)), 0.0))


class LatencyModel:
    """Verify latency, learnt online.

    memory_samples: samples a token count remembers. jump_threshold: relative jump that makes a tile boundary. speed_factor: led
    by the samples of this model.
    """

    def __init__(self, memory_samples: float, jump_threshold: float, speed_factor: SpeedFactor) -> None:
        self.speed_factor = speed_factor
        self._means = LeadingMeans(memory_samples, speed_factor)
        self.jump_threshold = jump_threshold
        self.fit: LatencyFit | None = None
        self.context_s_per_token = 0.0

    def observe(self, tokens: int, kv_tokens: int, seconds: float, step: int) -> Shift | None:
        """Learn one verify of `tokens` >= 1 tokens over `kv_tokens` of context; seconds > 0.

        Returns a Shift when with this sample a new speed factor has lasted long enough.
        """
        self._means.observe(tokens, float(kv_tokens), seconds, step, self.context_s_per_token)
        return self.speed_factor.shift(seconds)

    @property
    def noise(self) -> float:
        """Relative standard deviation of one sample."""
        return self._means.sigma

    def measured(self, padded_to: Mapping[int, int]) -> MeasuredCounts:
        """What is measured, by padded token count. padded_to: padded count of those counts that were seen padded."""
        by_padded = {t: MeasuredCount(m.mean_y, m.samples) for t, m in self._means.means.items() if m.weight > 0.0}
        return MeasuredCounts(by_padded, padded_to, self.noise)

    def refit(self) -> LatencyFit | None:
        """Fit segments and boundaries to the present means; None before the first sample."""
        rows = self._means.rows()
        if not len(rows):
            return None
        typical = max(float(np.average(rows[:, 2], weights=rows[:, 1])), 1.0)
        level = float(np.average(rows[:, 3], weights=rows[:, 1]))
        self.context_s_per_token = level * self._means.slope.relative(self.noise, typical)
        self.fit = fit_staircase(rows, self.noise, self.context_s_per_token, self.jump_threshold)
        return self.fit

    def state(self) -> dict[str, NDArray[np.float64]]:
        return self._means.state()

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()` and refit. Raises ValueError when it cannot be one."""
        self._means.restore(state)
        self.refit()
