"""The search of all plans of one step.

    goodput(plan) = E[tokens out] / E[step time]
                  = (b + sum of the survival probabilities of the verified draft tokens) / (fixed_s[K, b] + verify_s[num_tokens])

On a staircase goodput has several local maxima: more tokens inside a tile cost nothing, a tile boundary costs a jump. So every
plan is evaluated, not only the neighbours of the current one. Regimes: inside a tile more draft tokens always help; a boundary
is crossed when the tokens that fit behind it pay for the jump; where latency grows with every token, only near-certain tokens
pay, down to K = 0.

Runs in the engine's process: numpy only.
"""

from __future__ import annotations

import numpy as np

from adaptive_spec.domain.arrays import AnyFloats, Floats, Ints, Lengths


def best_verified(survival: Floats, fixed_s: float, verify_s: AnyFloats) -> tuple[int, float]:
    """Search all numbers of verified draft tokens of one step.

    survival: [b, k]. fixed_s: seconds of the step other than verification. verify_s: [>= b * (k + 1) + 1] seconds by num_tokens.
    Returns (draft tokens to verify, goodput in tokens/s).
    """
    return _best_count(survival, _best_first(survival), fixed_s, verify_s)


def best_slots(survival: Floats, count: int) -> Lengths:
    """Verify the `count` (request, position) pairs with the highest survival: [b, k] -> verify_len [b].

    Survival never increases along a row, so the chosen positions of a request are always its first ones.
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
    """Indices into the flat survival, highest first. Equal values keep their order, so earlier positions come first."""
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
