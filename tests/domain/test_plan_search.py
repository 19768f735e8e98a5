"""The search of all plans of one step, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.plan_search import best_lengths, best_slots, best_verified


def survivals(max_b: int = 3, max_k: int = 3) -> st.SearchStrategy[Floats]:
    """Arrays [b, k] that never increase along a row, with ties."""
    steps = st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]) | st.floats(0.0, 1.0)
    shapes = st.tuples(st.integers(1, max_b), st.integers(0, max_k))
    return shapes.flatmap(
        lambda shape: st.lists(steps, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda values: np.array(values, np.float64).reshape(shape).cumprod(axis=1, dtype=np.float64)
        )
    )


@given(survivals(), st.floats(0.0, 1.0), st.data())
def test_the_best_plan_is_the_best_of_all_prefix_closed_plans(survival: Floats, fixed_s: float, data: st.DataObject) -> None:
    b, k = survival.shape
    size = b * (k + 1) + 1
    verify_s = np.array(data.draw(st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)))
    plans = itertools.product(range(k + 1), repeat=b)
    brute = max(
        (b + sum(survival[i, :n].sum() for i, n in enumerate(plan))) / (fixed_s + verify_s[b + sum(plan)]) for plan in plans
    )
    count, goodput = best_verified(survival, fixed_s, verify_s)
    assert goodput == pytest.approx(brute, rel=1e-12)
    chosen = best_slots(survival, count)
    assert int(chosen.sum()) == count
    np.testing.assert_array_equal(best_lengths(survival, fixed_s, verify_s), chosen)
    reached = (b + sum(survival[i, :n].sum() for i, n in enumerate(chosen))) / (fixed_s + verify_s[b + count])
    assert reached == pytest.approx(brute, rel=1e-12)


@given(survivals(6, 7), st.integers(0, 50))
def test_slots_go_to_the_likeliest(survival: Floats, count: int) -> None:
    b, k = survival.shape
    chosen = best_slots(survival, count)
    assert chosen.dtype == np.uint8
    assert chosen.shape == (b,)
    assert (chosen <= k).all()
    assert int(chosen.sum()) == min(count, b * k)
    taken = sum(survival[i, :n].sum() for i, n in enumerate(chosen))
    assert taken == pytest.approx(np.sort(survival, axis=None)[::-1][:count].sum(), abs=1e-12)
