"""Which K an engine runs at each batch size: compact ranges, the mask, and the K that runs in place of one that is not allowed.

Used in the engine's process: numpy and the standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from adaptive_spec.domain.arrays import Bools, KTable

LARGEST_K = 32
"""Draft tokens per request, of any engine."""
AllowedFrom = tuple[tuple[int, tuple[int, ...]], ...]
"""(batch size, K ascending): from this batch size on, these K. Ascending batch sizes, the first at 1; () allows every K."""


def allowed_at(allowed_from: AllowedFrom, batch_size: int) -> tuple[int, ...]:
    """K allowed at a batch size, ascending. allowed_from: not empty. A batch below the first entry uses the first entry."""
    at = bisect_right(allowed_from, batch_size, key=lambda entry: entry[0])
    return allowed_from[max(at - 1, 0)][1]


def ranges(by_batch_size: Sequence[tuple[int, ...]]) -> AllowedFrom:
    """The compact form of the K allowed at batch sizes 1, 2, ..."""
    starts = [b for b, ks in enumerate(by_batch_size) if b == 0 or ks != by_batch_size[b - 1]]
    return tuple((b + 1, by_batch_size[b]) for b in starts)


def mask_ranges(mask: Bools) -> AllowedFrom:
    """The compact form of a mask [max_batch + 1, max_k + 1], whose row 0 is row 1; () where every K is allowed."""
    return () if mask.all() else ranges([tuple(np.flatnonzero(row).tolist()) for row in mask[1:]])


def within_rails(mask: Bools, k_min: int, k_max: int) -> Bools:
    """The mask without the K outside [k_min, k_max].

    At a batch size where no allowed K is inside, the one nearest to k_max stays. mask: [rows, K + 1], at least one K allowed in
    every row.
    """
    k = np.arange(mask.shape[1])
    inside = mask & (k >= k_min) & (k <= k_max)
    nearest = np.where(mask, np.abs(k - k_max), len(k) + abs(k_max)).argmin(axis=1)
    return np.asarray(inside | (~inside.any(axis=1, keepdims=True) & (k == nearest[:, None])))


def verified_rails(candidates: Sequence[int], k_min: int, k_max: int) -> tuple[int, int]:
    """Least and most draft tokens per request, on the mean of a step's requests, that an engine may verify by the rails.

    An engine with one candidate always drafts it, so that the rails are those of what it verifies of it. Elsewhere they are those
    of K, and a step may verify from none to all of what is drafted. candidates: ascending, at least one.
    """
    longest = candidates[-1]
    return (min(k_min, longest), min(k_max, longest)) if len(candidates) == 1 else (0, longest)


def runnable_table(mask: Bools) -> KTable:
    """What runs in place of each K, uint8 [rows, K + 1]: the largest allowed K that is not larger, else the smallest allowed one.

    mask: [rows, K + 1], at least one K allowed in every row.
    """
    k = np.arange(mask.shape[1])
    below = np.maximum.accumulate(np.where(mask, k, -1), axis=1)
    return np.where(below >= 0, below, mask.argmax(axis=1)[:, None]).astype(np.uint8)
