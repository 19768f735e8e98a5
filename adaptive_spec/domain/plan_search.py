"""The search of all plans of one step.

    goodput(plan) = E[tokens out] / E[step time]
                  = (b + sum of the survival probabilities of the verified draft tokens) / (fixed_s[K, b] + verify_s[num_tokens])

Goodput is not unimodal on a staircase: filling a tile is free, crossing its boundary is not, and beyond it may pay again.
So every plan is evaluated, never only the neighbours of the current one. Regimes: inside a tile more draft tokens always
help; at a boundary the next token must earn the jump together with all that fits behind it; far up the staircase, where
latency grows with tokens, only near-certain tokens pay and K falls to 0.

This module runs in the server's process too: numpy only.
"""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.arrays import AnyFloats, Floats, Ints, Lengths


def best_verified(survival: Floats, fixed_s: float, verify_s: AnyFloats) -> tuple[int, float]:
    """Search all numbers of verified draft tokens of one step.

    survival: [b, k]. fixed_s: seconds beside verification. verify_s: [>= b * (k + 1) + 1] seconds by num_tokens.
    Returns (draft tokens to verify, goodput in tokens/s).
    """
    return _best_count(survival, _best_first(survival), fixed_s, verify_s)


def best_slots(survival: Floats, count: int) -> Lengths:
    """Give `count` verification slots to the (request, position) pairs most likely to survive: [b, k] -> verify_len [b].

    Survival never increases along a row, so the chosen slots of a request are always its first ones.
    """
    b, k = survival.shape
    return np.full(b, k, dtype=np.uint8) if count >= b * k else _slots(_best_first(survival), count, b, k)


def best_lengths(survival: Floats, fixed_s: float, verify_s: AnyFloats) -> Lengths:
    """`best_slots` for the count of `best_verified`, in one sort: verify_len [b]."""
    b, k = survival.shape
    order = _best_first(survival)
    count, _ = _best_count(survival, order, fixed_s, verify_s)
    return _slots(order, count, b, k)


def _best_first(survival: Floats) -> Ints:
    """Indices into the flat survival, best first; of equals the earlier one, which within a request is the one that must come."""
    return (-survival).ravel().argsort(kind="stable")


def _best_count(survival: Floats, order: Ints, fixed_s: float, verify_s: AnyFloats) -> tuple[int, float]:
    b, k = survival.shape
    expected = np.empty(b * k + 1)
    expected[0] = b
    expected[1:] = survival.take(order)
    np.add.accumulate(expected, out=expected)
    expected /= verify_s[b : b * (k + 1) + 1] + fixed_s
    best = int(expected.argmax())
    return best, float(expected[best])


def _slots(order: Ints, count: int, b: int, k: int) -> Lengths:
    return np.bincount(order[:count] // max(k, 1), minlength=b).astype(np.uint8)
