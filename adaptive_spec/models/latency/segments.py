"""Exact optimal partitioning of a latency curve into straight pieces, and the tile boundaries between them.

    minimise  sum over segments of [ sum_i weight_i (y_i - intercept - slope x_i)^2  +  min((e / FLAT)^2, steep)  +  penalty ]
    e = slope mean_x / mean_y      relative rise of a piece over a doubling of its token count, about
    steep = STEEP_PENALTIES penalty

by dynamic programming over the last break (Jackson et al., 2005, "An algorithm for optimal partitioning of data on an
interval"), with the pruning rule of PELT (Killick et al., 2012, arXiv:1101.1438), which drops breaks that can never be
optimal. The curve need not rise: latency may fall where another kernel is picked.

A tile is nearly flat: e has a normal prior with mean 0 and standard deviation `FLAT`, up to a bound. Without it a line through
two counts fits any jump between them; with the bound a ramp, or the curve of a card without flat tiles, is still a line.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.staircase import Boundary, Segment

FLAT = 0.1
"""Standard deviation of e in published staircases: their tiles rise by 0 to 10 % over a doubling."""
STEEP_PENALTIES = 3.0
"""Penalties that any slope costs at most: five counts on a steep line are a line, fewer are jumps between tiles."""
_BLOCK = 32
"""Ends handled at a time: large enough to spare numpy calls, small enough to stay in cache."""


def partition(x: Floats, y: Floats, weight: Floats, penalty: float, flat: float = np.inf) -> list[int]:
    """Return the first index of every segment of the optimal partition.

    x: [n] ascending. y, weight: [n], weight > 0 in units of 1 / y^2. penalty >= 0 in units of weight * y^2: larger gives
    fewer segments. flat: standard deviation of e; inf: no prior. Of equally good partitions the one with the longer last
    segment is taken.
    """
    n = len(x)
    if n == 0:
        return []
    # Centring and scaling keep the prefix sums far from cancellation.
    scale = max(float(np.ptp(x)), 1.0)
    u = (x - x.mean()) / scale
    v = y - y.mean()
    origin = float(x.mean()) / scale, float(y.mean())
    sums = np.zeros((6, n + 1))
    np.cumsum(np.stack((weight, weight * u, weight * v, weight * u * u, weight * u * v, weight * v * v)), axis=1, out=sums[:, 1:])
    steep = STEEP_PENALTIES * penalty
    cost = np.full(n + 1, np.inf)
    cost[0] = -penalty
    back = np.zeros(n + 1, dtype=np.int64)
    candidates = np.empty(0, dtype=np.int64)
    for start in range(0, n, _BLOCK):
        ends = np.arange(start + 1, min(start + _BLOCK, n) + 1)
        candidates = np.concatenate((candidates, ends - 1))
        residual = _residual(sums, candidates, ends, origin, flat, steep)
        before = cost[candidates]
        fresh = len(candidates) - len(ends)
        total = before
        for row, end in enumerate(ends.tolist()):
            open_ = fresh + row + 1
            total = before[:open_] + residual[row, :open_]
            best = int(total.argmin())
            cost[end] = total[best] + penalty
            back[end] = candidates[best]
            if row + 1 < len(ends):
                before[open_] = cost[end]
        # PELT: a break that loses to the best by more than a penalty now can never win later; with the prior, by more than what
        # two pieces of a line can cost above the whole.
        candidates = candidates[total < cost[ends[-1]] + (2.0 * steep if np.isfinite(flat) else 0.0)]
    starts: list[int] = []
    end = n
    while end > 0:
        end = int(back[end])
        starts.append(end)
    return starts[::-1]


def _residual(
    sums: Floats, firsts: NDArray[np.int64], ends: NDArray[np.int64], origin: tuple[float, float], flat: float, steep: float
) -> Floats:
    """Weighted squared residual, and prior, of the best line over points first..end-1: [ends, firsts]; 0 for one point.

    origin: what was subtracted of the scaled x and of y. Entries with first >= end are undefined.
    """
    w, wu, wv, wuu, wuv, wvv = sums[:, ends, None] - sums[:, None, firsts]
    with np.errstate(divide="ignore", invalid="ignore"):
        ridge = ((origin[0] + wu / w) / ((origin[1] + wv / w) * flat)) ** 2 if np.isfinite(flat) else 0.0
        np.divide(1.0, w, out=w)
        wuu -= wu * wu * w
        wuv -= wu * wv * w
        wvv -= wv * wv * w
        wuv *= wuv
        # The sums are of order 1 per unit of weight, so this is rounding, not spread: one point, or two equal ones.
        alone = wuu * w <= 1e-13
        explained = wuv / wuu
        if np.isfinite(flat):
            explained = np.maximum(wuv / (wuu + ridge), explained - steep)
        explained[alone] = 0.0
        wvv -= explained
    np.maximum(wvv, 0.0, out=wvv)
    return np.asarray(wvv)


def line(x: Floats, y: Floats, weight: Floats, flat: float = np.inf, steep: float = 0.0) -> tuple[float, float]:
    """Weighted least-squares intercept and slope, with the prior of the module unless `flat` is inf; slope 0 for a single x.

    x: counts, so at least 1 apart. With the prior the intercept is at least 0, and the line never falls below half its mean.
    """
    total = weight.sum()
    mean_x, mean_y = float(weight @ x / total), float(weight @ y / total)
    xx, xy = float(weight @ (x - mean_x) ** 2), float(weight @ ((x - mean_x) * (y - mean_y)))
    if xx <= 1e-9 * total:
        return mean_y, 0.0
    slope = xy / xx
    if np.isfinite(flat):
        ridge = (mean_x / (mean_y * flat)) ** 2
        if xy * xy / (xx + ridge) >= xy * xy / xx - steep:
            slope = xy / (xx + ridge)
        slope = min(max(slope, -0.5 * mean_y / max(float(x[-1]) - mean_x, 1.0)), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def fit_segments(tokens: Floats, seconds: Floats, weight: Floats, penalty: float) -> tuple[Segment, ...]:
    """Partition measured (tokens, seconds) and fit each piece. A segment ends at its last measured token count."""
    starts = partition(tokens, seconds, weight, penalty, FLAT)
    segments = []
    for first, last in zip(starts, [*starts[1:], len(tokens)], strict=True):
        piece = slice(first, last)
        intercept, slope = line(tokens[piece], seconds[piece], weight[piece], FLAT, STEEP_PENALTIES * penalty)
        segments.append(Segment(int(tokens[first]), int(tokens[last - 1]), intercept, slope))
    return tuple(segments)


def find_boundaries(
    segments: tuple[Segment, ...], at_first: Floats, at_last: Floats, jump_threshold: float
) -> tuple[Boundary, ...]:
    """Return the breaks at which latency jumps up by at least `jump_threshold` (relative).

    at_first, at_last: [segments] best estimates of the seconds at each segment's first and last token count. Where the
    counts between two segments were not measured, the left segment's line is continued to the right one's first count, at most
    in proportion to the tokens, and only what exceeds it is a jump.
    """
    found = []
    for i, (left, right) in enumerate(itertools.pairwise(segments)):
        gap = right.first - left.last - 1
        low = at_last[i] + min(max(left.slope_s_per_token * gap, 0.0), at_last[i] * gap / left.last)
        if low > 0.0 and at_first[i + 1] / low >= 1.0 + jump_threshold:
            found.append(Boundary(left.last, float(at_first[i + 1] / low)))
    return tuple(found)
