"""The cost of changes of K, charged to the K table: a K that differs from its neighbours' must pay for the changes it causes.

    lost[b, K]  = steps at batch size b * step seconds * (1 - goodput[b, K] / best goodput[b])
    cost(table) = sum over b of lost[b, K_b]  +  switch_s * sum over b of crossings[b] where K_b differs from the next K

The sums run over recent batch sizes; crossings[b] counts consecutive steps of which one has at most b requests and the other
more. Both tallies forget alike, so their ratio is a rate. The least cost of a table with K_b = K is found for all b and K at once
by passing minima up and down the batch sizes (min-sum on a chain), and an entry's goodput falls by what its K costs above the
best one, per step at that batch size. Regimes: where the batch rarely changes nothing is charged; where it wanders between two
sizes they share a K unless their own K gain more than the changes cost; a size that is only passed through gets a neighbour's K.
"""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.arrays import Floats

MIN_STEPS = 0.01
"""Forgotten tally below which a batch size is not a recent one."""
MOST_SIZES = 256
"""Recent batch sizes that are told apart, the most frequent ones: it bounds the time of a decision."""
NOT_ALLOWED_S = 1e9
"""Seconds lost by a K that is not allowed: more than any table loses."""


def charge_switches(goodput: Floats, tokens_per_request: Floats, batches: Floats, crossings: Floats, switch_s: float) -> Floats:
    """Goodput less the changes of K that each entry causes, [max_batch + 1, contexts, K + 1]; 0 stays 0 (not allowed).

    goodput, tokens_per_request: of the same shape. batches, crossings: tallies [max_batch + 1]. switch_s: seconds, 0: unknown.
    """
    sizes = np.flatnonzero(batches > MIN_STEPS)
    sizes = sizes[sizes > 0]
    if switch_s <= 0.0 or len(sizes) < 2:
        return goodput
    sizes = np.sort(sizes[np.argsort(-batches[sizes], kind="stable")[:MOST_SIZES]])
    # A step from one of these sizes to the next, or beyond, crosses all sizes between them.
    change_s = switch_s * np.minimum.reduceat(crossings, sizes)[:-1]
    rows = goodput[sizes]
    best = rows.max(axis=2, keepdims=True)
    tokens = np.take_along_axis(tokens_per_request[sizes], rows.argmax(axis=2, keepdims=True), axis=2)
    spent_s = (batches[sizes] * sizes)[:, None, None] * tokens / best
    lost = np.where(rows > 0.0, spent_s * (1.0 - rows / best), NOT_ALLOWED_S)
    # Least cost of the sizes up to and including each, by its K; and the same from the other end.
    passed = np.stack((lost, lost[::-1]), axis=1)
    changes_s = np.stack((change_s, change_s[::-1]), axis=1)[:, :, None, None]
    for i in range(1, len(sizes)):
        passed[i] += np.minimum(passed[i - 1], passed[i - 1].min(axis=-1, keepdims=True) + changes_s[i - 1])
    total = passed[:, 0] + passed[::-1, 1] - lost
    extra = (total - total.min(axis=2, keepdims=True)) / spent_s
    charged = goodput.copy()
    charged[sizes] = np.where(rows > 0.0, best * np.maximum(1.0 - extra, 1e-6), 0.0)
    return charged
