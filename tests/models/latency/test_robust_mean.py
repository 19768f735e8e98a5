from __future__ import annotations

import math

import numpy as np
import pytest

from adaptive_spec.models.latency.robust_mean import FAR, STALE_STEPS, LeadingMeans, RobustMeans
from adaptive_spec.models.latency.speed_factor import SpeedFactor


def test_only_leading_means_move_the_speed_factor() -> None:
    speed_factor = SpeedFactor()
    leader, follower = LeadingMeans(64, speed_factor), RobustMeans(64, speed_factor)
    for step in range(200):
        follower.observe(step % 4, 0.0, 0.010 if step < 60 else 0.012, step)
    assert speed_factor.value == 0.0
    for step in range(200):
        leader.observe(step % 4, 0.0, 0.010 if step < 60 else 0.012, step)
    assert speed_factor.value == pytest.approx(math.log(1.2), abs=0.01)


def test_a_mean_measured_at_another_speed_factor_is_uncertain_until_it_is_measured_again() -> None:
    rng = np.random.default_rng(4)
    table = LeadingMeans(64, SpeedFactor())

    def feed(keys: list[int], factor: float, steps: int, start: int) -> None:
        for step in range(start, start + steps):
            key = keys[step % len(keys)]
            table.observe(key, 0.0, 0.001 * key * factor * float(np.exp(rng.normal(0.0, 0.01))), step)

    feed([8, 16], 1.0, 400, 0)
    settled = table.unseen_error(table.means[16])
    feed([8], 1.2, 200, 400)
    uncertain = table.unseen_error(table.means[16])
    rows = {int(row[0]): row for row in table.rows()}
    assert settled < 0.01 < 0.08 < uncertain
    assert rows[16][3] == pytest.approx(1.2 * 0.016, rel=0.03), "it is assumed to have moved with the others"
    assert rows[16][1] < 0.1 * rows[8][1]
    feed([16], 1.2, 20, 600)
    assert table.unseen_error(table.means[16]) < 0.01


def test_a_mean_that_changes_alone_enlarges_the_error_of_the_others() -> None:
    rng = np.random.default_rng(5)
    table = LeadingMeans(64, SpeedFactor())
    step = 0
    for _ in range(400):
        for key in (8, 16, 24):
            step += 1
            table.observe(key, 0.0, 0.001 * key * float(np.exp(rng.normal(0.0, 0.01))), step)
    assert table.unseen_error(table.means[24]) < 0.01
    for i in range(400):
        step += 1
        key, slower = (16, 1.4) if i % 8 == 0 else (8, 1.0)
        table.observe(key, 0.0, 0.001 * key * slower * float(np.exp(rng.normal(0.0, 0.01))), step)
    assert table.unseen_error(table.means[24]) > 0.1
    assert table.means[16].mean_y * math.exp(table.speed_factor.value) == pytest.approx(1.4 * 0.016, rel=0.03)


def test_repeated_bursts_leave_unmeasured_counts_near_their_true_cost() -> None:
    """Repeated bursts of up to ten times while only some counts are measured: no count may follow the speed factor away."""
    rng = np.random.default_rng(6)
    table = LeadingMeans(64, SpeedFactor())
    for step in range(300):
        key = (8, 16, 24, 64)[step % 4]
        table.observe(key, 0.0, 0.001 * key * float(np.exp(rng.normal(0.0, 0.03))), step)
    step, slower = 300, 1.0
    for _ in range(400):
        slower = 1.0 if slower > 1.0 else float(rng.uniform(1.5, 10.0))
        for _ in range(int(rng.integers(5, 60))):
            step += 1
            key = int(rng.choice([8, 16, 24]))
            table.observe(key, 0.0, 0.001 * key * slower * float(np.exp(rng.normal(0.0, 0.1))), step)
    seconds = {int(row[0]): row[3] for row in table.rows()}
    assert 0.064 / 2.5 < seconds[64] < 0.064 * 2.5
    for _ in range(300):
        step += 1
        key = int(rng.choice([8, 16, 24]))
        table.observe(key, 0.0, 0.001 * key * float(np.exp(rng.normal(0.0, 0.03))), step)
    seconds = {int(row[0]): row[3] for row in table.rows()}
    assert [seconds[k] / k for k in (8, 16, 24)] == pytest.approx([0.001] * 3, rel=0.1)


def test_rows_give_the_unseen_error_of_each_mean_and_leave_out_those_too_far_from_the_speed_factor() -> None:
    rng = np.random.default_rng(8)
    table = LeadingMeans(64, SpeedFactor())
    for step in range(4000):
        key = int(rng.integers(1, 20)) if step < 2000 else int(rng.integers(8, 20))
        factor = 1.0 if step < 2000 else 1.4 if step < 3900 else 9.0
        table.observe(key, 0.0, 0.01 * (1 + key // 8) * factor * float(rng.lognormal(0.0, 0.02)), step)
        table.speed_factor.shift()
        if step in (1999, 3899):
            rows = table.rows()
            assert len(rows) == len(table.means)
            alone = [table.unseen_error(table.means[int(key)]) for key in rows[:, 0]]
            np.testing.assert_allclose(rows[:, 6], alone, rtol=1e-12)
            weights = [
                1 / (1 / table.means[int(k)].weight + (d / table.sigma) ** 2) for k, d in zip(rows[:, 0], alone, strict=True)
            ]
            np.testing.assert_allclose(rows[:, 1], weights, rtol=1e-12)
    assert set(table.rows()[:, 0].astype(int)) == {
        k for k, m in table.means.items() if abs(table.speed_factor.announced - m.log_speed) <= FAR
    }
    assert len(table.rows()) < len(table.means)


def test_a_short_burst_leaves_no_mean_out() -> None:
    rng = np.random.default_rng(9)
    table = LeadingMeans(64, SpeedFactor())
    for step in range(1000):
        table.observe(step % 10 + 1, 0.0, 0.01 * float(rng.lognormal(0.0, 0.02)), step)
    for step in range(1000, 1030):
        table.observe(1, 0.0, 0.08 * float(rng.lognormal(0.0, 0.02)), step)
    assert table.speed_factor.value > FAR
    assert len(table.rows()) == 10


def test_a_stale_mean_restarts_when_it_is_measured_again() -> None:
    table = RobustMeans(64, SpeedFactor())
    for step in range(20):
        table.observe(8, 0.0, 0.020, step)
    for step in range(STALE_STEPS, STALE_STEPS + 3):
        table.observe(8, 0.0, 0.010, step)
    assert table.means[8].mean_y == pytest.approx(0.010), "the old samples do not count"


def test_the_mean_measured_longest_ago_makes_room() -> None:
    table = RobustMeans(64, SpeedFactor(), most=100)
    rng = np.random.default_rng(1)
    for step, key in enumerate(rng.integers(0, 10_000, 5000).tolist()):
        table.observe(key, 0.0, 0.001 * (key + 1), step)
        table.observe(7, 0.0, 0.008, step)
    assert len(table.means) == 100
    assert table.means[7].samples == pytest.approx(5000, abs=5), "the one measured again and again stays"
    last = sorted(m.last_step for m in table.means.values())
    assert last[0] > 4880, "the others are the latest"
    again = RobustMeans(64, SpeedFactor(), most=10)
    again.restore(table.state())
    assert len(again.means) == 10
    assert 7 in again.means
    again.observe(20_000, 0.0, 0.01, 1)
    assert len(again.means) == 10
    assert {7, 20_000} <= set(again.means)
