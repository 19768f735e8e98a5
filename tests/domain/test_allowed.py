"""K by batch size: ranges, and the K that runs in place of one that is not allowed."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptive_spec.domain.allowed import allowed_at, mask_ranges, ranges, runnable_table, within_rails

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


def test_rails_keep_the_nearest_allowed_k_of_every_batch_size() -> None:
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0]], dtype=bool)
    k = np.arange(4)
    assert [k[row].tolist() for row in within_rails(mask, 0, 32)[1:]] == [[0, 1, 2, 3], [0, 3], [1]]
    assert [k[row].tolist() for row in within_rails(mask, 1, 2)[1:]] == [[1, 2], [3], [1]]
    assert [k[row].tolist() for row in within_rails(mask, 3, 9)[1:]] == [[3], [3], [1]]


def test_the_ranges_of_a_mask() -> None:
    assert mask_ranges(np.ones((5, 4), dtype=bool)) == ()
    assert mask_ranges(within_rails(np.ones((5, 4), dtype=bool), 1, 2)) == ((1, (1, 2)),)
