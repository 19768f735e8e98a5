"""The cost of changes of K in the table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from adaptive_spec.control import switching
from adaptive_spec.control.switching import charge_switches

TOKENS = np.ones((5, 1, 2))


def goodput(*rows: tuple[float, float]) -> np.ndarray:
    """Row 0 is not used; one context."""
    return np.array([(0.0, 0.0), *rows])[:, None, :]


def tally(*values: float) -> np.ndarray:
    return np.array([0.0, *values])


STEPS = tally(100, 100, 100, 100)


def test_nothing_is_charged_while_the_cost_is_unknown_or_the_batch_rests() -> None:
    rows = goodput((100, 101), (101, 100), (100, 101), (101, 100))
    assert charge_switches(rows, TOKENS, STEPS, tally(50, 50, 50, 0), 0.0) is rows
    charged = charge_switches(rows, TOKENS, STEPS, tally(0, 0, 0, 0), 0.001)
    assert charged == pytest.approx(rows)


def test_sizes_the_batch_wanders_between_share_a_k_unless_their_own_pays() -> None:
    wandering = tally(50, 50, 50, 0)
    small = charge_switches(goodput((100, 101), (101, 100), (100, 101), (100, 101)), TOKENS, STEPS, wandering, 0.001)
    assert small[1:, 0].argmax(axis=1).tolist() == [1, 1, 1, 1]
    large = charge_switches(goodput((100, 101), (150, 100), (100, 101), (100, 101)), TOKENS, STEPS, wandering, 0.001)
    assert large[1:, 0].argmax(axis=1).tolist() == [0, 0, 1, 1], "its lower neighbour gains too little to differ"


def test_a_size_that_is_only_passed_through_gets_a_neighbours_k() -> None:
    passed = charge_switches(
        goodput((100, 110), (110, 100), (100, 110), (100, 110)), TOKENS, tally(100, 1, 100, 0), tally(10, 10, 0, 0), 0.001
    )
    assert passed[2, 0].argmax() == 1


def test_a_k_that_is_not_allowed_stays_so() -> None:
    charged = charge_switches(goodput((100, 0), (0, 100), (100, 0), (0, 1)), TOKENS, STEPS, tally(50, 50, 50, 0), 1.0)
    assert ((charged > 0.0) == (goodput((1, 0), (0, 1), (1, 0), (0, 1)) > 0.0)).all()


def test_the_best_entries_are_the_table_of_least_cost() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        rows = np.concatenate((np.zeros((1, 1, 3)), rng.uniform(80, 120, (4, 1, 3))))
        batches, crossings, switch_s = tally(*rng.uniform(1, 100, 4)), tally(*rng.uniform(0, 50, 4)), float(rng.uniform(0, 0.01))
        best = rows[1:, 0].max(axis=1)
        step_s = np.arange(1, 5) / best

        def cost(
            table: tuple[int, ...],
            rows: np.ndarray = rows,
            best: np.ndarray = best,
            spent_s: np.ndarray = batches[1:] * step_s,
            change_s: np.ndarray = crossings[1:] * switch_s,
        ) -> float:
            lost = sum(spent_s[i] * (1 - rows[i + 1, 0, k] / best[i]) for i, k in enumerate(table))
            return float(lost + sum(change_s[i] for i in range(3) if table[i] != table[i + 1]))

        found = charge_switches(rows, np.ones((5, 1, 3)), batches, crossings, switch_s)[1:, 0].argmax(axis=1)
        assert cost(tuple(found.tolist())) == pytest.approx(min(map(cost, itertools.product(range(3), repeat=4))))


def test_contexts_are_charged_apart_and_only_the_most_frequent_sizes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    rows, tokens = rng.uniform(80, 120, (9, 2, 3)), rng.uniform(1, 3, (9, 2, 3))
    batches, crossings = np.arange(9.0), np.full(9, 5.0)
    both = charge_switches(rows, tokens, batches, crossings, 0.01)
    for c in range(2):
        alone = charge_switches(rows[:, [c]], tokens[:, [c]], batches, crossings, 0.01)
        np.testing.assert_array_equal(both[:, c], alone[:, 0])
    monkeypatch.setattr(switching, "MOST_SIZES", 4)
    few = charge_switches(rows, tokens, batches, crossings, 0.01)
    np.testing.assert_array_equal(few, charge_switches(rows, tokens, np.where(batches > 4, batches, 0.0), crossings, 0.01))
    np.testing.assert_array_equal(few[:5], rows[:5])
