"""Exact optimal partitioning of a latency curve into straight pieces, and the tile boundaries between them.

    minimise  sum over segments of [ sum_i weight_i (y_i - intercept - slope x_i)^2  +  (e / flatness)^2  +  penalty ]
    e = slope mean_x / mean_y      relative rise of a piece over a doubling of its token count, about

by dynamic programming over the last break (Jackson et al., 2005, "An algorithm for optimal partitioning of data on an
interval"), with the pruning rule of PELT (Killick et al., 2012, arXiv:1101.1438), which drops breaks that can never be
optimal. The curve need not rise: latency may fall where another kernel is picked.

A tile is nearly flat: e has a normal prior with mean 0 and standard deviation `flatness`. Without it a line through two counts
fits any jump between them. A curve that rises as a whole (a consumer card, a CPU) has no flat tiles, so the prior is relative to
the curve's own trend, see `flatness`.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.staircase import Boundary, Segment

FLAT = 0.1
"""Standard deviation of e in published staircases: their tiles rise by 0 to 10 % over a doubling."""
PRUNE_SLACK = 3.0
"""Penalties by which a break must lose to be dropped: with the prior the pieces of a split line can cost more than the line."""
_BLOCK = 32
"""Ends handled at a time: large enough to spare numpy calls, small enough to stay in cache."""


def flatness(x: Floats, y: Floats) -> float:
    """Prior standard deviation of e for a curve: x, y [n] ascending in x, > 0.

    `FLAT`, or the square of the curve's own trend (the slope of log y over log x between its ends) if that is more: where
    latency grows almost as the tokens do, the trend is near 1 and so is e of every piece.
    """
    if len(x) < 2 or x[-1] <= x[0]:
        return FLAT
    trend = float(np.log(y[-1] / y[0]) / np.log(x[-1] / x[0]))
    return max(FLAT, min(max(trend, 0.0), 1.0) ** 2)


def partition(x: Floats, y: Floats, weight: Floats, penalty: float, flat: float = np.inf) -> list[int]:
    """Return the first index of every segment of the optimal partition.

    x: [n] ascending. y, weight: [n], weight > 0 in units of 1 / y^2. penalty >= 0 in units of weight * y^2: larger gives
    fewer segments. flat: `flatness`; inf: no prior. Of equally good partitions the one with the longer last segment is taken.
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
    cost = np.full(n + 1, np.inf)
    cost[0] = -penalty
    back = np.zeros(n + 1, dtype=np.int64)
    candidates = np.empty(0, dtype=np.int64)
    for start in range(0, n, _BLOCK):
        ends = np.arange(start + 1, min(start + _BLOCK, n) + 1)
        candidates = np.concatenate((candidates, ends - 1))
        residual = _residual(sums, candidates, ends, origin, flat)
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
        # PELT: a break that loses to the best by more than a penalty now can never win later.
        candidates = candidates[total < cost[ends[-1]] + (PRUNE_SLACK * penalty if np.isfinite(flat) else 0.0)]
    starts: list[int] = []
    end = n
    while end > 0:
        end = int(back[end])
        starts.append(end)
    return starts[::-1]


def _residual(
    sums: Floats, firsts: NDArray[np.int64], ends: NDArray[np.int64], origin: tuple[float, float], flat: float
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
        wuu += ridge
        wuv /= wuu
        wuv[alone] = 0.0
        wvv -= wuv
    np.maximum(wvv, 0.0, out=wvv)
    return np.asarray(wvv)


def line(x: Floats, y: Floats, weight: Floats, flat: float = np.inf) -> tuple[float, float]:
    """Weighted least-squares intercept and slope, with the prior `flat` on the slope; slope 0 for a single distinct x.

    x: counts, so at least 1 apart. With the prior the intercept is at least 0, and the line never falls below half its mean.
    """
    total = weight.sum()
    mean_x, mean_y = float(weight @ x / total), float(weight @ y / total)
    xx = float(weight @ (x - mean_x) ** 2)
    if xx <= 1e-9 * total:
        return mean_y, 0.0
    if not np.isfinite(flat):
        slope = float(weight @ ((x - mean_x) * (y - mean_y))) / xx
        return mean_y - slope * mean_x, slope
    slope = float(weight @ ((x - mean_x) * (y - mean_y))) / (xx + (mean_x / (mean_y * flat)) ** 2)
    slope = min(max(slope, -0.5 * mean_y / max(float(x[-1]) - mean_x, 1.0)), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def fit_segments(tokens: Floats, seconds: Floats, weight: Floats, penalty: float) -> tuple[Segment, ...]:
    """Partition measured (tokens, seconds) and fit each piece. A segment ends at its last measured token count."""
    flat = flatness(tokens, seconds)
    starts = partition(tokens, seconds, weight, penalty, flat)
    segments = []
    for first, last in zip(starts, [*starts[1:], len(tokens)], strict=True):
        piece = slice(first, last)
        intercept, slope = line(tokens[piece], seconds[piece], weight[piece], flat)
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
