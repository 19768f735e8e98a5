from __future__ import annotations

import numpy as np
import pytest

from adaptive_spec.control.guard_rails import SwapWatch, better_table, hurdles, table_for


def table(k: int) -> np.ndarray:
    return np.full((3, 1), k, dtype=np.uint8)


def goodput(*values: float) -> np.ndarray:
    return np.tile(np.array(values), (3, 1, 1))


def better(values: np.ndarray, errors: np.ndarray, banned: np.ndarray | None = None) -> np.ndarray:
    return better_table(values, hurdles(errors, table(0), 0.01), table(0), banned)


def test_a_better_plan_is_taken_even_across_a_valley() -> None:
    assert (better(goodput(100, 80, 70, 130), np.zeros((3, 1, 4))) == 3).all()


def test_a_gain_below_the_minimum_is_not_worth_a_swap() -> None:
    assert (better(goodput(100, 100.9), np.zeros((3, 1, 2))) == 0).all()
    assert (better(goodput(100, 101.1), np.zeros((3, 1, 2))) == 1).all()


def test_an_unmeasured_plan_needs_a_larger_gain() -> None:
    unsure = np.zeros((3, 1, 2))
    unsure[..., 1] = 0.3
    assert (better(goodput(100, 110), unsure) == 0).all()
    assert (better(goodput(100, 120), unsure) == 1).all()


def test_an_unsure_plan_does_not_hide_a_sure_one() -> None:
    unsure = np.zeros((3, 1, 3))
    unsure[..., 2] = 0.5  # needs 26 %
    assert (better(goodput(100, 110, 112), unsure) == 1).all()
    assert (better(goodput(100, 110, 140), unsure) == 2).all()


def test_a_present_plan_that_cannot_run_is_left_for_the_best() -> None:
    assert (better(goodput(0, 90, 100), np.ones((3, 1, 3))) == 2).all()


def test_a_banned_plan_is_not_moved_to() -> None:
    banned = np.zeros((3, 1, 2), dtype=bool)
    banned[..., 1] = True
    assert (better(goodput(100, 200), np.zeros((3, 1, 2)), banned) == 0).all()


@pytest.mark.parametrize(("measured", "ratio", "fails"), [(70, 1.0, True), (99, 1.0, False), (70, 0.7, False)])
def test_rollback_when_the_previous_policy_would_have_given_more(measured: int, ratio: float, fails: bool) -> None:
    watch = SwapWatch(table(0), table(1), 0.05, ratio, 1)
    due = False
    for i in range(SwapWatch.MIN_STEPS):
        due = watch.add(1, 0, measured + (i % 3 - 1), 1.0)
    assert due
    assert watch.failed(goodput(100, 120)) is fails


def test_steps_the_swap_did_not_change_are_not_judged() -> None:
    previous, changed = table(0), table(0)
    changed[2] = 1
    watch = SwapWatch(previous, changed, 0.05, 1.0, 1)
    assert not any(watch.add(1, 0, 1, 1.0) for _ in range(500))
    assert watch.steps == 0


def test_table_keeps_its_k_when_context_buckets_appear() -> None:
    assert table_for(table(4), 3).shape == (3, 3)
    assert (table_for(table(4), 3) == 4).all()


def test_a_verdict_survives_a_forecast_with_fewer_context_buckets() -> None:
    two = np.zeros((3, 2), dtype=np.uint8)
    watch = SwapWatch(two, two + 1, 0.05, 1.0, 1)
    for _ in range(SwapWatch.MIN_STEPS):
        watch.add(1, 1, 10, 0.1)
    assert not watch.failed(goodput(100, 100))


def test_a_gain_no_larger_than_the_unrest_is_not_taken() -> None:
    values, errors = goodput(100, 120), np.zeros((3, 1, 2))
    assert (better_table(values, hurdles(errors, table(0), 0.01, 0.1), table(0)) == 1).all()
    assert (better_table(values, hurdles(errors, table(0), 0.01, 0.3), table(0)) == 0).all()
