"""K by batch size: ranges, and the K that runs in place of one that is not allowed."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.allowed import allowed_at, ranges, runnable_table

SETS = st.lists(st.sets(st.integers(0, 7), min_size=1).map(lambda ks: tuple(sorted(ks))), min_size=1, max_size=40)


@given(SETS)
def test_ranges_keep_the_set_of_every_batch_size(sets: list[tuple[int, ...]]) -> None:
    compact = ranges(sets)
    assert [allowed_at(compact, b) for b in range(1, len(sets) + 1)] == sets
    assert allowed_at(compact, len(sets) + 9) == sets[-1]
    assert all(a[1] != b[1] for a, b in itertools.pairwise(compact))


@given(SETS)
def test_what_runs_is_the_largest_allowed_k_that_is_not_larger_else_the_smallest(sets: list[tuple[int, ...]]) -> None:
    table = runnable_table(np.array([[k in ks for k in range(8)] for ks in sets]))
    for row, ks in zip(table.tolist(), sets, strict=True):
        assert row == [max((a for a in ks if a <= k), default=ks[0]) for k in range(8)]
