"""Optimal partitioning of a latency curve into straight pieces, and the tile boundaries between them.

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

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.staircase import Boundary, Segment

FLAT = 0.1
"""Standard deviation of e in published staircases: their tiles rise by 0 to 10 % over a doubling."""
STEEP_PENALTIES = 3.0
"""Penalties that any slope costs at most: five counts on a steep line are a line, fewer are jumps between tiles."""
EXACT_POINTS = 256
"""Breaks between more than twice as many points are sought in two steps, which bounds the time of a refit. On random staircases
of 512 to 1024 points the partition then costs 0.04 penalties more than the best one in the mean, and one at most: where two
partitions are about as good, the other one may be taken."""
COARSE_PENALTY = 0.3
"""Share of the penalty in the first step, so that a break is found there too where its exact place pays and the nearest coarse
one does not."""
_ENDS, _FIRSTS = 32, 256
"""Ends and first points handled at a time: enough to spare numpy calls, few enough that their arrays stay in cache."""


def partition(x: Floats, y: Floats, weight: Floats, penalty: float) -> list[int]:
    """Return the first index of every segment of the optimal partition.

    x: [n] ascending, > 0. y, weight: [n], > 0, weight in units of 1 / y^2. penalty >= 0 in units of weight * y^2: larger gives
    fewer segments. Of equally good partitions the one with the longer last segment is taken.
    """
    n = len(x)
    if n == 0:
        return []
    u = x / x[-1]
    sums = np.zeros((5, n + 1))
    np.cumsum(np.stack((weight, weight * u, weight * y, weight * u * u, weight * u * y)), axis=1, out=sums[:, 1:])
    steep = STEEP_PENALTIES * penalty
    nodes = np.arange(n + 1)
    stride = n // EXACT_POINTS
    if stride > 1:
        coarse = np.append(nodes[:-1:stride], n)
        found = coarse[_best_breaks(sums[:, coarse], COARSE_PENALTY * penalty, steep)]
        nodes = np.unique(np.clip(np.append(found, n)[:, None] + np.arange(-2 * stride, 2 * stride + 1), 0, n))
    return [int(nodes[first]) for first in _best_breaks(sums[:, nodes], penalty, steep)]


def _best_breaks(sums: Floats, penalty: float, steep: float) -> list[int]:
    """Return the nodes at which the segments of the best partition begin, of those whose segments begin and end at nodes.

    sums: [5, nodes], over the points before each node: of the weight, and of it times u, y, u^2 and u y. steep: what a slope
    costs at most.
    """
    n = sums.shape[1] - 1
    # Differences of all ends and firsts as matrix products: three times as fast as subtracting rows from columns.
    by_end, by_first = np.stack((sums, np.ones_like(sums)), axis=2), np.stack((np.ones_like(sums), -sums), axis=1)
    cost = np.full(n + 1, -penalty)
    """Least cost of the points before each node, without their sum of squares, which every partition has."""
    back = np.zeros(n + 1, dtype=np.int64)
    candidates = np.empty(0, dtype=np.int64)
    for start in range(0, n, _ENDS):
        ends = np.arange(start + 1, min(start + _ENDS, n) + 1)
        firsts = np.concatenate((candidates, ends - 1))
        at_once = (firsts[at : at + _FIRSTS] for at in range(0, len(firsts), _FIRSTS))
        explained = np.concatenate([_explained(by_end[:, ends] @ by_first[:, :, part], steep) for part in at_once], axis=1)
        within = explained[:, len(candidates) :]
        within[ends[:, None] < ends] = -np.inf
        # The cost of an end depends on those before it in this block: settled after as many rounds as breaks are in the block.
        known = (cost[candidates] - explained[:, : len(candidates)]).min(axis=1, initial=np.inf) + penalty
        cost[ends] = known
        for _ in ends:
            least = np.minimum(known, (cost[ends - 1] - within).min(axis=1) + penalty)
            settled = np.array_equal(least, cost[ends])
            cost[ends] = least
            if settled:
                break
        totals = cost[firsts] - explained
        back[ends] = firsts[totals.argmin(axis=1)]
        # PELT: a break that loses to the best by more than a penalty now can never win later. With the prior, by more than what
        # two pieces of a line can cost above the whole: `steep`, because mean_x / mean_y of the whole lies between those of the
        # pieces, so one of them has no larger e.
        candidates = firsts[totals[-1] < cost[ends[-1]] + steep]
    starts: list[int] = []
    end = n
    while end > 0:
        end = int(back[end])
        starts.append(end)
    return starts[::-1]


def _explained(sums: Floats, steep: float) -> Floats:
    """What the best line over some points takes off their sum of squares, less its prior.

    sums: [5, ...], over these points: of the weight, and of it times u, y, u^2 and u y. Changed in place. 0 where the sums
    say nothing.
    """
    w, wu, wy, wuu, wuy = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_u, mean_y = wu / w, wy / w
        wuu -= wu * mean_u
        wuy -= wu * mean_y
        wy *= mean_y
        mean_u /= mean_y
        mean_u *= mean_u
        mean_u *= 1.0 / FLAT**2
        # u is at most 1, so less is rounding, not spread: one point.
        w *= 1e-12
        np.maximum(wuu, w, out=wuu)
        mean_u += wuu
        wuy *= wuy
        np.divide(wuy, mean_u, out=mean_u)
        wuy /= wuu
        wuy -= steep
        explained: Floats = wy + np.maximum(mean_u, wuy)
    # Where weights differ by more than a float's precision, nothing is left of a light point in the sums.
    explained[~np.isfinite(explained)] = 0.0
    return explained


def fit_segments(tokens: Floats, seconds: Floats, weight: Floats, penalty: float) -> tuple[Segment, ...]:
    """Partition measured (tokens, seconds) and fit a line to each piece, by weighted least squares with the prior of the module.

    A segment ends at its last measured token count. Its intercept is at least 0, it never falls below half its mean, and its
    slope is 0 where only one count was measured.
    """
    starts = np.array(partition(tokens, seconds, weight, penalty))
    lasts = np.append(starts[1:], len(tokens)) - 1
    total = np.add.reduceat(weight, starts)
    mean_x, mean_y = np.add.reduceat(weight * tokens, starts) / total, np.add.reduceat(weight * seconds, starts) / total
    dx, dy = (a - np.repeat(mean, lasts - starts + 1) for a, mean in ((tokens, mean_x), (seconds, mean_y)))
    # Counts are at least 1 apart, so less is rounding: a single count.
    xx = np.maximum(np.add.reduceat(weight * dx * dx, starts), 1e-9 * total)
    xy = np.add.reduceat(weight * dx * dy, starts)
    free, held = xy / xx, xy / (xx + (mean_x / (mean_y * FLAT)) ** 2)
    slope = np.where(xy * held >= xy * free - STEEP_PENALTIES * penalty, held, free)
    slope = np.clip(slope, -0.5 * mean_y / np.maximum(tokens[lasts] - mean_x, 1.0), mean_y / mean_x)
    slope[starts == lasts] = 0.0
    rows = (tokens[starts].astype(np.int64), tokens[lasts].astype(np.int64), mean_y - slope * mean_x, slope)
    return tuple(Segment(*row) for row in zip(*(column.tolist() for column in rows), strict=True))


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
